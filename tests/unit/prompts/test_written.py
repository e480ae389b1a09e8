"""Our own contrast texts: whole families apart, and no more told by a word than the concern itself tells."""

from __future__ import annotations

from collections import Counter

import pytest
from latentwatch.prompts import written
from latentwatch.prompts.prompt import Kind, Part

CONCERNS = [name for name in written.concerns() if name != written.ORDINARY]


def test_there_are_twelve_concerns():
    assert len(CONCERNS) >= 12


@pytest.mark.parametrize("concern", CONCERNS)
def test_every_part_has_positive_and_hard_families_of_some_size(concern):
    count = Counter((p.part, p.kind) for p in written.texts(concern))
    families = Counter({(p.part, p.kind): 0 for p in written.texts(concern)})
    for part, kind, _ in {(p.part, p.kind, p.family) for p in written.texts(concern)}:
        families[part, kind] += 1
    for kind in (Kind.POSITIVE, Kind.HARD):
        assert families[Part.TRAIN, kind] >= 2
        assert families[Part.SELECTION, kind] >= 1
        assert families[Part.TEST, kind] >= 2
        assert all(count[part, kind] >= 15 for part in Part), count


@pytest.mark.parametrize("concern", written.concerns())
def test_a_family_lies_in_one_part_and_no_text_twice(concern):
    texts = written.texts(concern)
    parts = {}
    for prompt in texts:
        assert parts.setdefault(prompt.family, (prompt.part, prompt.kind)) == (prompt.part, prompt.kind)
    assert len({(p.text, p.answer) for p in texts}) == len(texts)


@pytest.mark.parametrize("concern", written.concerns())
def test_no_form_of_a_test_family_is_one_that_is_trained_on(concern):
    forms = {part: {p.form for p in written.texts(concern) if p.part is part} for part in Part}
    assert not forms[Part.TEST] & (forms[Part.TRAIN] | forms[Part.SELECTION])


@pytest.mark.parametrize("concern", written.concerns())
def test_every_slot_is_filled(concern):
    code = written.concerns()[concern].get("code", False)
    assert not [p.whole for p in written.texts(concern) if not code and ("{" in p.whole or "=>" in p.whole)]


def test_false_statements_have_the_words_of_true_ones():
    """So that no list of words tells them apart."""
    texts = written.texts("false_statement")
    for family in {p.family for p in texts if p.kind is Kind.POSITIVE}:
        false, true = ([p.answer for p in texts if p.family == name] for name in (family, f"{family}_true"))
        words = [Counter(" ".join(answers).replace(",", "").lower().split()) for answers in (false, true)]
        assert sum((words[0] - words[1]).values()) <= 0.05 * sum(words[1].values())
        assert not set(false) & set(true)


def test_the_texts_are_the_same_every_time():
    assert written.texts("toxicity") == written.texts("toxicity")


def test_messages_are_what_a_chat_template_takes():
    prompt = next(p for p in written.texts("refusal") if p.answer)
    assert [m["role"] for m in prompt.messages] == ["user", "assistant"]
    assert prompt.messages[1]["content"] == prompt.answer
    assert prompt.whole == f"{prompt.text}\n{prompt.answer}"
