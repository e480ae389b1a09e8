"""Places that peers share."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentwatch.transport.places import Full, Places, peer_of


def test_the_one_that_waits_for_longest_of_the_peer_with_most_goes_for_a_newcomer():
    places: Places[int] = Places(4, 3)
    assert [places.reserve(number, "flood") for number in (1, 2, 3)] == [None] * 3
    assert places.reserve(4, "other") is None
    assert places.reserve(5, "third") == 1
    assert 1 not in places and 4 in places and len(places) == 4


def test_a_peer_at_its_own_bound_loses_its_own():
    places: Places[int] = Places(10, 2)
    places.reserve(1, "a"), places.reserve(2, "a"), places.reserve(3, "b")
    places.wait(1)  # it waited already, and waits from now on
    assert places.reserve(4, "a") == 2


def test_whoever_works_stays_and_when_all_work_nobody_comes():
    places: Places[int] = Places(2, 2)
    places.reserve(1, "a"), places.reserve(2, "a")
    places.work(1)
    assert places.reserve(3, "b") == 2
    places.work(3)
    with pytest.raises(Full):
        places.reserve(4, "c")
    places.leave(1)
    assert places.reserve(4, "c") is None


def test_a_peer_whose_places_all_work_gets_none_of_another_ones():
    places: Places[int] = Places(10, 1)
    places.reserve(1, "a"), places.reserve(2, "b")
    places.work(1)
    with pytest.raises(Full):
        places.reserve(3, "a")


@given(st.lists(st.tuples(st.sampled_from("twlx"), st.integers(0, 9), st.sampled_from("abc")), max_size=80))
def test_the_bounds_hold_whatever_happens(events):
    places: Places[int] = Places(4, 2)
    here: dict[int, str] = {}
    working: set[int] = set()
    for what, item, peer in events:
        if what == "t" and item not in here:
            try:
                lost = places.reserve(item, peer)
            except Full:
                continue
            if lost is not None:
                assert lost not in working
                del here[lost]
            here[item] = peer
        elif what == "w":
            places.work(item)
            working |= {item} & here.keys()
        elif what == "x":
            places.wait(item)
            working.discard(item)
        elif what == "l":
            places.leave(item)
            here.pop(item, None)
            working.discard(item)
        assert len(places) == len(here) <= 4
        assert max(Counter(here.values()).values(), default=0) <= 2
        assert all(number in places for number in here)


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("unix:", "unix:"),
    ],
)
def test_a_peer_is_an_address_or_the_64_bits_that_a_host_takes_its_own_from(address, peer):
    assert peer_of(address) == peer
