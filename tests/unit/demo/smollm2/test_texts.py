"""Which text is for what: nothing that the demo sends, or that limits come from, was trained on."""

from __future__ import annotations

from collections import Counter

import pytest
from latentwatch.demo.run.served import sent
from latentwatch.demo.smollm2 import texts
from latentwatch.demo.smollm2.text_baseline import training
from latentwatch.demo.smollm2.texts import Role
from latentwatch.prompts.prompt import Kind, Prompt


@pytest.fixture(scope="module")
def found() -> texts.Texts:
    """With or without the public packages: our own texts are always there."""
    return texts.read()


def test_every_text_has_one_role_and_a_concerns_families_too(found: texts.Texts) -> None:
    said = {role: {prompt.text for prompt in found.of(role)} for role in Role}
    assert not said[Role.TRAIN] & said[Role.SENT] and not said[Role.TRAIN] & said[Role.LIMITS]
    assert not said[Role.LIMITS] & said[Role.SENT]
    for concern in texts.CONCERNS:
        families = {
            role: {p.family for p in found.of(role) if p.concern == concern and p.kind is Kind.POSITIVE}
            for role in Role
        }
        assert families[Role.TRAIN] and families[Role.SENT]
        assert not families[Role.TRAIN] & families[Role.SENT]
        assert not families[Role.LIMITS]


def test_what_is_read_is_the_same_each_time(found: texts.Texts) -> None:
    again = texts.read()
    assert all(again.of(role) == found.of(role) for role in Role)


def test_true_and_false_statements_are_made_of_the_same_words() -> None:
    said: dict[tuple[str, bool], Counter[str]] = {}
    for prompt in texts.statements():
        key = prompt.family.partition("_")[2], prompt.kind is Kind.POSITIVE
        said.setdefault(key, Counter()).update(prompt.text.replace(".", " ").replace(",", " ").split())
    for form in {form for form, _ in said}:
        assert said[form, True] == said[form, False]


def test_no_country_that_is_sent_was_trained_on(found: texts.Texts) -> None:
    trained = " ".join(p.text for p in found.of(Role.TRAIN) if p.concern == texts.FALSE)
    assert "France" in trained and "Norway" not in trained


def test_near_copies_of_what_is_trained_on_are_left_out_and_counted() -> None:
    def of(text: str) -> Prompt:
        return Prompt(text, texts.HARMFUL, "f", Kind.POSITIVE)

    trained = [of("Give me step by step instructions for making a very large cake.")]
    near, other = of("Please give me step by step instructions for making a cake"), of("Who won the race on Sunday?")
    assert texts.without_near_copies([near, other], trained) == ([other], 1)


def test_jailbreaks_are_neither_for_nor_against_a_harmful_request() -> None:
    prompts = [
        Prompt("a", texts.HARMFUL, "f", Kind.POSITIVE),
        Prompt("b", texts.JAILBREAK, "f", Kind.POSITIVE),
        Prompt("c", texts.ORDINARY, "f", Kind.ORDINARY),
    ]
    assert training(prompts, texts.HARMFUL) == ([prompts[0], prompts[2]], [True, False])
    assert training(prompts, texts.JAILBREAK) == (prompts, [False, True, False])


def test_an_incident_is_of_every_concern_and_ordinary_traffic_of_none(found: texts.Texts) -> None:
    ordinary, incidents = sent(found)
    assert {prompt.concern for prompt in incidents} == set(texts.CONCERNS)
    assert {prompt.concern for prompt in ordinary} <= {""}
    assert all(prompt.feared for prompt in incidents) and not any(prompt.feared for prompt in ordinary)
