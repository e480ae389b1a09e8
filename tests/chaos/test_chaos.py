"""A short, seeded sample of the chaos runs; `make bench-chaos` runs them in full and writes the table."""

from __future__ import annotations

import pytest

from tests.chaos import faults
from tests.chaos.world import Books

pytestmark = pytest.mark.e2e


def balanced(books: Books) -> None:
    print(books.line())
    assert books.sent > 100
    assert books.merged == books.sent and books.fires_merged == books.fires_sent
    assert books.lost == books.doubled == books.shed == 0


def test_collectors_that_are_killed_lose_nothing_and_count_nothing_twice():
    balanced(faults.kills(5, seed=1))


def test_what_engines_spooled_before_they_and_their_exporters_were_killed_is_counted_once():
    balanced(faults.spooled_deaths(2, seed=1))


def test_connections_that_are_reset_lose_nothing_and_count_nothing_twice():
    balanced(faults.cuts(3, seed=1))
