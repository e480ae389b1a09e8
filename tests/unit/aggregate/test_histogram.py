"""Histograms: buckets as `le` says, and sums that merge."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentwatch.aggregate.histogram import ACTIVATION_EDGES, Histograms, ScalarHistogram, limit_edges

EDGES = np.array([[0.0, 1.0, 2.0], [-1.0, 0.5, 10.0]])
VALUES = st.lists(st.tuples(*[st.floats(-20, 20, width=32)] * 2), max_size=20)


def over(values) -> Histograms:
    made = Histograms.empty(EDGES)
    made.observe(np.array(values, np.float32).reshape(-1, 2))
    return made


def same(a: Histograms, b: Histograms) -> bool:
    return np.array_equal(a.counts_FB, b.counts_FB) and np.allclose(a.sum_F, b.sum_F)


def test_a_value_on_a_bound_belongs_below_it_as_le_says():
    made = over([(0.0, -1.0), (1.0, 0.5), (2.0, 10.0), (2.1, 11.0)])
    assert made.counts_FB.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert made.cumulative_FB[:, -1].tolist() == [4, 4]


@given(VALUES, VALUES, VALUES)
def test_merging_is_associative_and_commutative_and_equals_counting_at_once(a, b, c):
    one, two, three = over(a), over(b), over(c)
    assert same(one.merge(two).merge(three), one.merge(two.merge(three)))
    assert same(one.merge(two), two.merge(one))
    assert same(one.merge(two), over(a + b))


def test_values_that_are_not_counted_leave_no_trace():
    made = Histograms.empty(EDGES)
    made.observe(np.array([[5.0, np.nan], [1.0, 2.0]]), np.array([[False, False], [True, False]]))
    assert made.counts_FB.sum() == 1 and made.sum_F.tolist() == [1.0, 0.0]


def test_equal_bounds_take_the_quick_path_to_the_same_buckets():
    values = np.random.default_rng(0).normal(0, 3, (50, 2))
    quick, slow = Histograms.empty(EDGES[[0, 0]]), [Histograms.empty(EDGES[[0]]) for _ in range(2)]
    quick.observe(values)
    for i, one in enumerate(slow):
        one.observe(values[:, [i]])
    assert quick.counts_FB.tolist() == [one.counts_FB[0].tolist() for one in slow]


def test_bounds_that_differ_or_do_not_rise_are_refused():
    with pytest.raises(ValueError, match="different bounds"):
        over([]).merge(Histograms.empty(EDGES + 1))
    for bad in ([[1.0, 1.0]], [[0.0, np.inf]]):
        with pytest.raises(ValueError, match="ascending"):
            Histograms.empty(np.array(bad))


@pytest.mark.parametrize("limit", [None, 0.0, 1e-9, 0.35, 3.0, -7.5, 1e6])
def test_bounds_around_a_limit_rise_and_hold_the_limit_itself(limit):
    edges = limit_edges(limit)
    assert len(edges) == len(ACTIVATION_EDGES) and all(a < b for a, b in itertools.pairwise(edges))
    assert (limit or 0.0) in edges
    assert edges[0] < 0, "so that every dense histogram is one of signed scores"


@given(st.lists(st.floats(-5, 5)))
def test_a_histogram_of_single_values_agrees_with_the_arrays(values):
    scalar, arrays = ScalarHistogram((0.0, 1.0, 2.0)), Histograms.empty(EDGES[:1])
    for value in values:
        scalar.observe(value)
    arrays.observe(np.array(values).reshape(-1, 1))
    assert scalar.counts == arrays.counts_FB[0].tolist()
