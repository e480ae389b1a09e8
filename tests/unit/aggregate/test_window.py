"""Windows merge, and the ring of them forgets in order."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from latentwatch.aggregate.window import FeatureWindow, WindowRing


def window(tokens: int, peak: float = 1.0, fired: int = 1) -> FeatureWindow:
    made = FeatureWindow.empty(2)
    made.tokens_by_state[1] = tokens
    made.fired_F[0] = fired
    made.peak_F[1] = peak
    return made


WINDOWS = st.builds(window, st.integers(0, 1000), st.floats(-10, 10, width=32), st.integers(0, 9))


def same(a: FeatureWindow, b: FeatureWindow) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


@given(WINDOWS, WINDOWS, WINDOWS)
def test_merging_is_associative_and_commutative_with_the_empty_window_as_neutral(a, b, c):
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same(a.merge(b), b.merge(a))
    assert same(a.merge(FeatureWindow.empty(2)), a)


@given(st.lists(st.tuples(st.floats(0, 40), WINDOWS), max_size=30))
def test_the_ring_holds_the_merge_of_what_fell_into_each_window(events):
    """Times may step back: what comes late counts into the newest window, and nothing is counted twice or lost."""
    ring = WindowRing(2, 50, 1.0)
    expected: dict[int, list[FeatureWindow]] = {}
    newest = 0
    for seconds, made in events:
        newest = max(newest, int(seconds))
        expected.setdefault(newest, []).append(made)
        ring.add(made, seconds)
    end, held = ring.recent(float(newest))
    assert end == newest + 1
    for i in range(50):
        number = newest - 49 + i
        whole = functools.reduce(FeatureWindow.merge, expected.get(number, []), FeatureWindow.empty(2))
        assert held.tokens_by_state[i].tolist() == whole.tokens_by_state.tolist()
        assert held.fired_F[i].tolist() == whole.fired_F.tolist()
        assert held.peak_F[i].tolist() == whole.peak_F.tolist()


def test_windows_in_which_nothing_came_are_empty_and_old_ones_are_gone():
    ring = WindowRing(2, 4, 2.0)
    ring.add(window(7), 10.0)
    assert ring.recent(15.0)[1].tokens_by_state[:, 1].tolist() == [0, 7, 0, 0]
    assert ring.recent(16.5)[1].tokens_by_state[:, 1].tolist() == [7, 0, 0, 0]
    assert ring.recent(18.5)[1].tokens_by_state.sum() == 0
    ring.add(window(3), 1e9)
    assert ring.recent(1e9)[1].tokens_by_state[:, 1].tolist() == [0, 0, 0, 3]
