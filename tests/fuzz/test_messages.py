"""A short sample of `make fuzz`."""

from __future__ import annotations

from tests.fuzz import messages


def test_broken_messages_are_taken_or_refused_and_the_books_stay_right():
    outcome = messages.run(6000, seed=7)
    assert outcome.messages == 6000 and outcome.taken > 500
    assert outcome.refused["malformed_batch"] > 500 and outcome.refused["malformed_hello"] > 50
    assert outcome.taken + outcome.refused.total() <= outcome.messages
