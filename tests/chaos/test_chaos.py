"""A short, seeded sample of the chaos runs; `make bench-chaos` runs them in full and writes the table."""

from __future__ import annotations

import pytest

from tests.chaos import faults
from tests.chaos.world import Books

pytestmark = pytest.mark.e2e


def balanced(books: Books, *, exporters: bool = False) -> None:
    print(books.line())
    assert books.sent > 100
    assert books.merged == books.sent
    # The scores of what an exporter computed before its death are not inherited after it.
    assert books.fires_merged == books.fires_sent or (exporters and books.fires_merged > 0)
    assert books.lost == books.doubled == books.shed == books.unbooked == books.open == 0


def test_collectors_that_are_killed_lose_nothing_and_count_nothing_twice():
    balanced(faults.kills(5, seed=1))


def test_what_engines_spooled_before_they_and_their_exporters_were_killed_is_counted_once():
    balanced(faults.spooled_deaths(2, seed=1))


def test_connections_that_are_reset_lose_nothing_and_count_nothing_twice():
    balanced(faults.cuts(3, seed=1))


@pytest.mark.parametrize("spool", [True, False], ids=["spool", "memory"])
def test_exporters_that_are_killed_lose_nothing_and_count_nothing_twice(spool):
    balanced(faults.exporter_kills(6, seed=1, spool=spool, collector_kills=True), exporters=True)


def test_what_is_computed_while_the_ring_is_full_and_the_exporter_dead_is_dropped_by_name_and_stands_nowhere_else():
    books = faults.exporter_kills(4, seed=1, **faults.FULL_RING)
    print(books.line())
    assert books.lost == books.doubled == books.unbooked == books.open == 0
    assert set(books.dropped) <= {"ring_full"}


def test_exporters_that_are_stopped_go_on_or_are_ended_and_every_token_is_in_one_state():
    books = faults.exporter_stops(2, seed=1)
    print(books.line())
    assert books.merged > 0
    assert books.lost == books.doubled == books.unbooked == books.open == 0
    assert set(books.dropped) <= {"ring_full"}
