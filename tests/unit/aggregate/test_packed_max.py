"""Packed maxima: a plain integer maximum keeps the larger value and, between equals, the earlier position."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from latentwatch.aggregate.packed_max import NOTHING, pack, positions, values

VALUE = st.floats(allow_nan=False, allow_infinity=False, width=32)
CELL = st.tuples(VALUE, st.integers(0, 2**32 - 1))


def packed(cells):
    value, position = zip(*cells, strict=True)
    return pack(np.array(value, np.float32), np.array(position, np.int64))


@given(st.lists(CELL, min_size=1))
def test_what_goes_in_comes_out(cells):
    both = packed(cells)
    value, position = values(both), positions(both)
    np.testing.assert_array_equal(value, np.array([v for v, _ in cells], np.float32))
    assert position.tolist() == [p for _, p in cells]


@given(st.lists(CELL, min_size=1))
def test_the_maximum_is_the_largest_value_at_its_earliest_position(cells):
    most = packed(cells).max(keepdims=True)
    value, position = values(most), positions(most)
    largest = max(v for v, _ in cells)
    assert value[0] == largest
    # -0.0 ranks below 0.0, which no statistic can tell apart.
    assert position[0] == min(p for v, p in cells if v == largest and np.signbit(v) == np.signbit(value[0]))


@given(CELL)
def test_every_finite_value_is_more_than_nothing(cell):
    assert packed([cell])[0] > NOTHING


def test_nothing_reads_as_nan_and_minus_one():
    nothing = np.zeros(2, np.uint64)
    assert np.isnan(values(nothing)).all() and values(nothing, -np.inf).tolist() == [-np.inf] * 2
    assert positions(nothing).tolist() == [-1, -1]
