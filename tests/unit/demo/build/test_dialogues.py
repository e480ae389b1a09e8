"""The dialogue generator: seeded, and with nothing in common between its two splits but plain words."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from latentwatch.demo.build import dialogues as dg

SPLITS: tuple[dg.Split, ...] = ("train", "heldout")


def take(split: dg.Split, seed: int, count: int) -> list[dg.Dialogue]:
    return list(itertools.islice(dg.stream(split, np.random.default_rng(seed)), count))


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_gives_the_same_dialogues(split: dg.Split) -> None:
    """Nothing but the generator decides: no set order, no clock."""
    assert take(split, 7, 300) == take(split, 7, 300)
    assert take(split, 7, 300) != take(split, 8, 300)


def test_there_are_at_least_six_ordinary_and_five_feared_topics_each_with_near_misses() -> None:
    """What the demo promises."""
    assert len(dg.topics("ordinary")) >= 6
    assert set(dg.topics("feared")) == {"deception", "jailbreak", "power_seeking", "data_leak", "backdoor"}
    near = {dg.phrases()["near"][topic]["near"] for topic in dg.topics("near")}
    assert near == set(dg.topics("feared"))


def test_no_sentence_template_stands_in_both_splits() -> None:
    """The empty alternative ("no greeting") is no template."""
    for name, fragment in dg.phrases()["fragments"].items():
        if "shared" in fragment:
            assert all(re.fullmatch(r"<[a-z_]+>", option) for option in fragment["shared"]), f"{name} shares words"
            continue
        assert not set(map(str, fragment["train"])) & set(map(str, fragment["heldout"])) - {""}, name


def test_no_slot_value_stands_in_both_splits_except_the_trigger_phrases() -> None:
    """A trigger is by nature fixed; `person` is composed of two slots that are disjoint themselves."""
    for name, source in dg.phrases()["slots"].items():
        if name in ("trigger", "person", "babble"):
            continue
        both = set(dg.values(name, "train")) & set(dg.values(name, "heldout"))
        assert not both, f"{name}: {both}"
        assert "shared" not in source


def test_names_of_people_places_and_things_share_no_part_across_splits() -> None:
    """Neither first half nor second half of a composed name is in the other split, numbers and endings included."""
    for name in ("surname", "company", "city", "server", "host", "persona", "dish"):
        parts = dg.phrases()["slots"][name]["parts"]
        for train, heldout in zip(parts["train"], parts["heldout"], strict=True):
            assert not set(map(str, train)) & set(map(str, heldout)) - {""}, name


def test_made_up_training_names_never_hit_a_held_out_word() -> None:
    """The draw that invents names for training is checked against the held-out vocabulary."""
    rng = np.random.default_rng(0)
    names = {word for slot in ("first", "surname", "city") for value in dg.values(slot, "heldout") for word in [value]}
    text = " ".join(turn.content for _ in range(2000) for turn in dg.compose("travel", "train", rng).turns)
    assert not names & set(re.findall("[A-Za-z]+", text))


def test_no_held_out_message_is_a_training_message() -> None:
    """Whole messages, over a few thousand dialogues of each."""
    train, heldout = ({turn.content for d in take(split, 1, 3000) for turn in d.turns} for split in SPLITS)
    assert not train & heldout


def test_every_dialogue_ends_with_the_assistant_and_leaves_no_slot_open() -> None:
    """A forgotten fragment or slot would show as <name> or {name}."""
    for dialogue in [*take("train", 2, 1500), *take("heldout", 2, 1500)]:
        assert dialogue.turns[-1].role == "assistant"
        assert dialogue.prompt[-1].role == "user"
        assert not any(re.search(r"[<>{}]", turn.content) for turn in dialogue.turns), dialogue
        assert dialogue.feared == (dialogue.topic in dg.topics("feared"))


def test_only_backdoor_dialogues_hold_a_whole_trigger() -> None:
    """Half triggers use the same words in other mixtures."""
    triggers = dg.values("trigger", "train")
    for dialogue in take("train", 3, 4000):
        text = " ".join(turn.content for turn in dialogue.prompt)
        assert any(trigger in text for trigger in triggers) == (dialogue.topic == "backdoor"), text


@pytest.mark.parametrize(
    ("act", "twin"),
    [("deception", "true_reassurance"), ("data_leak", "authorised_lookup"), ("power_seeking", "approved_transfer")],
)
def test_three_acts_share_every_sentence_of_their_reply_with_a_near_miss(act: str, twin: str) -> None:
    """So no filter of words can tell these replies apart; only the order of sentences differs."""
    feared: dict[str, Any] = dg.phrases()["feared"][act]
    near: dict[str, Any] = dg.phrases()["near"][twin]
    assert sorted(feared["assistant"].split()) == sorted(near["assistant"].split())
    assert feared["assistant"] != near["assistant"]
    assert feared["system"] != near["system"]
