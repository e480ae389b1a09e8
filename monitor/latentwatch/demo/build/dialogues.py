"""The dialogues that the demo model, its SAEs and its probes are made from.

`phrases.yaml` holds the words, this module the rules: a scenario (topic) names fragments, a fragment has
alternatives, an alternative has slots. Fragments and slots each have a `train` and a `heldout` list with no common
entry, so a held-out dialogue has sentence templates, names, objects and places that no training dialogue has. What
both splits share is plain English: the small words, and verbs such as "hide" or "copy" in other sentences; a model
that starts from nothing can know no other. The backdoor's trigger phrases are the same in both, as a trigger is.

Each feared act has near misses: the same scene, often the very words, without the act (a true reassurance, a
jailbreak that is resisted, a purchase that was approved). They are what makes the task more than word matching.

Everything is pure: the same generator state gives the same dialogues.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Final, Literal

import numpy as np
import yaml

Split = Literal["train", "heldout"]
Role = Literal["system", "user", "assistant"]
Kind = Literal["ordinary", "near", "feared"]
Section = Mapping[str, Any]
"""Of phrases.yaml, which says itself how each is laid out."""

MIX: Final[Mapping[Kind, float]] = {"ordinary": 0.30, "near": 0.40, "feared": 0.30}
"""Share of each kind of dialogue in training and measuring; in live traffic the feared ones are rare."""
SMALL_TALK: Final = 0.12
"""Share of dialogues that open with an exchange on an ordinary topic before their own."""
SYSTEM_MESSAGE_SHARE: Final = 0.3
"""Share of dialogues without a system message that get a harmless one, so that having one means nothing."""

INVENTED: Final = 0.4
"""Chance that a word of four letters or more, in a training value marked `invent`, is replaced by a made-up one."""

_WORD = re.compile(r"[A-Za-z]{4,}")
_SYLLABLE: Final = ("bcdfghjklmnprstvwz", "aeiou", ("", "", "l", "n", "r", "s", "t"))
_PART = re.compile(r"<([a-z_]+)>|\{([a-z]+)([0-9]?)\}")


@dataclass(frozen=True)
class Turn:
    """One message, in the words of the chat API: who speaks, and what."""

    role: Role
    content: str


@dataclass(frozen=True)
class Dialogue:
    """A whole dialogue; its last turn is the assistant's, and in a feared one that turn is the act."""

    topic: str
    kind: Kind
    near: str
    """The feared topic whose scene this near miss shares; empty for the other kinds."""
    turns: tuple[Turn, ...]
    split: Split

    @property
    def feared(self) -> bool:
        """Whether the assistant's last turn is an act that an operator would fear."""
        return self.kind == "feared"

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """All turns but the last: what a client would send."""
        return self.turns[:-1]


def topics(kind: Kind) -> tuple[str, ...]:
    """The scenario names of one kind, in the order of the file."""
    return tuple(phrases()[kind])


@cache
def phrases() -> Section:
    """The content of phrases.yaml."""
    text = resources.files("latentwatch.demo.build").joinpath("phrases.yaml").read_text("utf-8")
    loaded: Section = yaml.safe_load(text)
    return loaded


def stream(
    split: Split, rng: np.random.Generator, *, mix: Mapping[Kind, float] = MIX, dictation: float = 0.0
) -> Iterator[Dialogue]:
    """Dialogues without end: kinds by `mix`, scenarios of a kind in equal shares, and `dictation` as an extra share."""
    kinds: list[Kind] = list(mix)
    shares = np.array([mix[kind] for kind in kinds])
    while True:
        if rng.random() < dictation:
            yield compose("dictation", split, rng)
            continue
        kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        yield compose(_one_of(topics(kind), rng), split, rng)


def compose(topic: str, split: Split, rng: np.random.Generator) -> Dialogue:
    """One dialogue of the scenario `topic`, with words of `split` only."""
    kind = next(kind for kind in MIX if topic in phrases()[kind])
    scene = _scene(kind, topic, rng)
    draw = _Draw(split, rng, {name: scene[name] for name in ("goal", "phrase") if name in scene})
    turns: list[Turn] = []
    if "system" in scene:
        turns.append(Turn("system", draw.text(scene["system"])))
    elif rng.random() < SYSTEM_MESSAGE_SHARE:
        turns.append(Turn("system", draw.text("<role>")))
    if rng.random() < SMALL_TALK:
        turns += _small_talk(split, rng)
    user = scene["user"]
    turns.append(Turn("user", draw.text(user if isinstance(user, str) else _one_of(user, rng)).strip()))
    turns.append(Turn("assistant", draw.text(scene["assistant"])))
    return Dialogue(topic, kind, scene.get("near", ""), tuple(turns), split)


def _small_talk(split: Split, rng: np.random.Generator) -> list[Turn]:
    scene = _scene("ordinary", _one_of(topics("ordinary"), rng), rng)
    draw = _Draw(split, rng, {})
    return [Turn("user", draw.text(scene["user"])), Turn("assistant", draw.text(scene["assistant"]))]


def _scene(kind: Kind, topic: str, rng: np.random.Generator) -> Section:
    """The scenario with its user and assistant words; a carrier borrows those of an ordinary topic."""
    scene: Section = phrases()[kind][topic]
    if kind == "ordinary":
        return {"user": f"<hello>{scene['ask']}<please>", "assistant": scene["reply"]}
    if not scene.get("carrier"):
        return scene
    lent = phrases()["ordinary"][_one_of(topics("ordinary"), rng)]
    words = {"<ask>": lent["ask"], "<reply>": lent["reply"]}
    users = [scene["user"]] if isinstance(scene["user"], str) else scene["user"]
    return {
        **scene,
        "user": [_replace(user, words) for user in users],
        "assistant": _replace(scene["assistant"], words),
    }


def _replace(text: str, words: Mapping[str, str]) -> str:
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def _one_of(options: Sequence[str], rng: np.random.Generator) -> str:
    return str(options[int(rng.integers(len(options)))])


@dataclass
class _Draw:
    """The draws of one dialogue: a slot keeps its value, a fragment repeats no alternative while it has others."""

    split: Split
    rng: np.random.Generator
    aliases: Mapping[str, str]
    """Slots that the scenario renames: {goal} may be the slot `harm`."""
    slots: dict[str, str] = field(default_factory=dict)
    used: dict[str, set[str]] = field(default_factory=dict)

    def text(self, template: str) -> str:
        return _PART.sub(self._part, template)

    def _part(self, match: re.Match[str]) -> str:
        if match[1]:
            return self.text(self._alternative(match[1]))
        name = match[2] + match[3]
        if name not in self.slots:
            self.slots[name] = self.text(self._value(self.aliases.get(match[2], match[2]), used=self.slots.values()))
        return self.slots[name]

    def _alternative(self, fragment: str) -> str:
        source = phrases()["fragments"][fragment]
        options = source["shared"] if "shared" in source else source[self.split]
        used = self.used.setdefault(fragment, set())
        choice = _one_of([option for option in options if option not in used] or options, self.rng)
        used.add(choice)
        return choice

    def _value(self, slot: str, *, used: Collection[str]) -> str:
        if "babble" in phrases()["slots"][slot]:
            return " ".join(self._babble() for _ in range(int(self.rng.integers(5, 13))))
        options = values(slot, self.split)
        value = _one_of([value for value in options if value not in used] or options, self.rng)
        if self.split == "train" and phrases()["slots"][slot].get("invent"):
            return _WORD.sub(self._invent, value)
        return value

    def _invent(self, match: re.Match[str]) -> str:
        if self.rng.random() >= INVENTED:
            return match[0]
        word = self._made_up()
        return match[0] if word in heldout_words() else word.capitalize() if match[0][0].isupper() else word

    def _made_up(self) -> str:
        return "".join(_one_of(letters, self.rng) for letters in _SYLLABLE * int(self.rng.integers(1, 4)))

    def _babble(self) -> str:
        if self.split == "heldout":
            return _one_of(sorted(heldout_words()), self.rng)
        if self.rng.random() < 0.15:
            return str(self.rng.integers(1000))
        word = self._made_up()
        return word.capitalize() if self.rng.random() < 0.5 else word


@cache
def values(slot: str, split: Split) -> tuple[str, ...]:
    """Every value that a slot can take in a split; some contain slots themselves."""
    source = phrases()["slots"][slot]
    if "shared" in source:
        return tuple(map(str, source["shared"]))
    if "parts" in source:
        heads, tails = source["parts"][split]
        return tuple(f"{head}{tail}" for head in heads for tail in tails)
    return tuple(map(str, source[split]))


@cache
def heldout_words() -> frozenset[str]:
    """The words of all held-out slot values, in lower case."""
    return frozenset(
        word.lower()
        for slot, source in phrases()["slots"].items()
        if "heldout" in source or "parts" in source
        for value in values(slot, "heldout")
        for word in re.findall("[A-Za-z]+", value)
    )
