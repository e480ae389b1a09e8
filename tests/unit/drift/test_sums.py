"""Counts that add, and the sums that a baseline is made of."""

from __future__ import annotations

import numpy as np
import pytest
from latentwatch.aggregate.counts import CELLS, Layout, RequestCounts, above, cell_values, cells_of
from latentwatch.drift.sums import HOURS, SCALES, STRATA, TrafficSums, hour_of_week

from tests.support.drift import layout_of, observe, rows
from tests.support.streams import probe, sparse

FEATURES = (sparse("a"), probe("b"), sparse("c"), sparse("d"))
LAYOUT = layout_of(FEATURES)


def counted(seed: int, requests: int = 200, groups: int = 3) -> RequestCounts:
    rng = np.random.default_rng(seed)
    counts = RequestCounts.empty(LAYOUT, groups)
    counts.add(LAYOUT, rng.integers(0, groups, requests), *rows(rng, LAYOUT, requests, 0.3))
    return counts


def same(one, other) -> bool:
    return all(np.array_equal(vars(one)[name], vars(other)[name]) for name in vars(one))


def test_counts_add_in_any_order_and_grouping():
    a, b, c = counted(1), counted(2), counted(3)
    assert same(a.merge(b), b.merge(a))
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same(a.merge(RequestCounts.empty(LAYOUT, 3)), a)


def test_counts_do_not_depend_on_how_requests_are_batched():
    rng = np.random.default_rng(4)
    group, (fired, value) = rng.integers(0, 3, 100), rows(rng, LAYOUT, 100, 0.3)
    whole, cut = RequestCounts.empty(LAYOUT, 3), RequestCounts.empty(LAYOUT, 3)
    whole.add(LAYOUT, group, fired, value)
    for i in range(0, 100, 7):
        cut.add(LAYOUT, group[i : i + 7], fired[i : i + 7], value[i : i + 7])
    assert same(whole, cut)


def test_every_request_is_counted_once_per_feature_and_a_value_only_where_there_is_one():
    rng = np.random.default_rng(5)
    fired, value = rows(rng, LAYOUT, 100, 0.3)
    value[:10] = np.nan
    counts = RequestCounts.empty(LAYOUT, 1)
    counts.add(LAYOUT, np.zeros(100, int), fired, value)
    assert counts.requests_GF.tolist() == [[100, 90, 100, 100]], "a dense feature without a score says nothing"
    seen = np.isfinite(value) & ((fired > 0) | ~LAYOUT.sparse_F)
    assert counts.cells_FC.sum(axis=1).tolist() == seen.sum(axis=0).tolist()
    assert above(counts.levels_GFB)[0, :, 0].tolist()[0] == int((fired[:, 0] > 0).sum())
    fires = fired[:, LAYOUT.pairs_P] > 0
    assert np.array_equal(counts.coactive_PP, fires.T.astype(int) @ fires.astype(int))


@pytest.mark.parametrize("value", [1e-3, 0.02, 0.5, 7.0, 900.0, 60000.0, -3.0])
def test_a_cell_keeps_a_value_to_a_seventh(value):
    middle = cell_values()[cells_of(np.array([value]))[0]]
    assert abs(middle - value) <= max(0.14 * abs(value), 0.0015)


def test_values_beyond_the_cells_go_to_the_last_ones():
    assert cells_of(np.array([-1e9, 0.0, 1e9])).tolist() == [0, CELLS // 2, CELLS - 1]


def test_hours_of_the_week_begin_on_monday_in_utc():
    assert hour_of_week(1_700_438_400) == 0  # 2023-11-20 00:00, a Monday
    assert hour_of_week(1_700_438_400 + 3600 * 25) == 25
    assert hour_of_week(1_700_438_400 + 86400 * 7) == 0


def seen(seed: int, windows: int = 40, start: float = 1e9, adapter: str = "") -> TrafficSums:
    rng, observed = np.random.default_rng(seed), TrafficSums.empty(LAYOUT)
    for window in range(windows):
        observe(observed, LAYOUT, *rows(rng, LAYOUT, 50, 0.2), end_seconds=start + 60 * window, adapter=adapter)
    observed.add_canary(3, rng.random(4))
    return observed


def test_baselines_add_in_any_order_and_grouping():
    a, b, c = seen(1), seen(2, start=2e9, adapter="x"), seen(3, adapter="y")

    def close(one: TrafficSums, other: TrafficSums) -> bool:
        mine, theirs = one.arrays(), other.arrays()
        return one.strata == other.strata and all(np.allclose(mine[n], theirs[n], rtol=1e-12) for n in mine)

    assert close(a.merge(b), b.merge(a))
    assert close(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert a.merge(b).requests == a.requests + b.requests == 4000


def test_what_several_replicas_serve_adds_up_by_adapter():
    counts, observed = counted(1, groups=6), TrafficSums.empty(LAYOUT)
    stratum_G = np.array([2, 0, 2, 1, 0, 2])
    observed.add_window(counts, stratum_G, 1e9)
    expected_SFB = np.zeros_like(observed.strata_SFB)
    np.add.at(expected_SFB, stratum_G, counts.levels_GFB)
    assert np.array_equal(observed.strata_SFB, expected_SFB)
    assert np.array_equal(observed.levels_FB, counts.levels_GFB.sum(axis=0))
    requests_S = observed.hour_strata_HS[hour_of_week(1e9)]
    assert np.array_equal(requests_S, np.bincount(stratum_G, counts.levels_GFB.sum(axis=2).max(axis=1), minlength=8))


def windows_of(observed: TrafficSums, requests: dict[str, int], windows: int = 1) -> None:
    for _ in range(windows):
        names, counted_G = list(requests), np.array(list(requests.values()))
        counts = RequestCounts.empty(LAYOUT, len(names))
        counts.levels_GFB[:, :, 0] = counted_G[:, None]
        observed.add_window(counts, observed.strata_of(names, counted_G), 1e9)


def test_invented_names_take_no_place_for_ever_and_none_from_who_has_traffic():
    observed = TrafficSums.empty(LAYOUT)
    windows_of(observed, {"invented 0": 1, **{f"invented {i}": 1 for i in range(1, 20)}})
    assert len(observed.strata) == STRATA - 1 and observed.unnamed_requests == 20 - (STRATA - 1)
    windows_of(observed, {"chat": 3000, "code": 1000}, windows=5)
    assert {"chat", "code"} <= set(observed.strata)
    for number in range(50):
        windows_of(observed, {"chat": 3000, "code": 1000, **{f"again {number} {i}": 1 for i in range(100)}})
    assert {"chat", "code"} <= set(observed.strata)
    kept = observed.strata_SFB[observed.strata.index("chat"), 0].sum()
    assert kept == 55 * 3000, "who has a place loses nothing of it"
    assert observed.strata_SFB[:, 0].sum() == observed.requests, "whose place is gone is counted with the others"


def test_a_route_that_comes_late_gets_the_place_of_the_smallest():
    observed = TrafficSums.empty(LAYOUT)
    windows_of(observed, {"chat": 3000, **{f"small {i}": 2 for i in range(STRATA - 2)}}, windows=3)
    windows_of(observed, {"chat": 3000, "late": 500})
    assert "late" in observed.strata and "chat" in observed.strata
    assert observed.unnamed_requests == 6, "what the smallest had is everybody's"


def test_a_window_without_requests_changes_nothing():
    observed = seen(1)
    before = {name: array.copy() for name, array in observed.arrays().items()}
    observed.add_window(RequestCounts.empty(LAYOUT, 2), np.zeros(2, int), 1e9 + 1e6)
    assert all(np.array_equal(before[name], array) for name, array in observed.arrays().items())


def test_hours_add_up_to_the_requests_and_a_clock_that_steps_back_loses_none():
    observed = seen(1)
    observe(observed, LAYOUT, *rows(np.random.default_rng(0), LAYOUT, 50, 0.2), end_seconds=1e9 - 7200)
    observed.finish_hour()
    assert observed.hour_levels_HFB[:, 0].sum() == observed.requests == 41 * 50
    assert observed.hour_levels_HFB.shape[0] == HOURS


def test_the_differences_of_blocks_estimate_the_variance_of_independent_requests():
    observed = TrafficSums.empty(LAYOUT)
    rng = np.random.default_rng(7)
    for window in range(1200):
        observe(observed, LAYOUT, *rows(rng, LAYOUT, 20, 0.3), end_seconds=1e9 + 60 * window)
    share = 0.3 * 0.7
    for z, scale in enumerate(SCALES):
        expected = pytest.approx(share, rel=6 / np.sqrt(1200 / scale))
        assert observed.difference_ZFL[z, 0, 0] / observed.differences_Z[z] == expected


def test_the_largest_values_are_kept_exactly():
    rng = np.random.default_rng(8)
    observed, values = TrafficSums.empty(LAYOUT), rng.normal(size=(1000, 4)).astype(np.float32)
    for i in range(0, 1000, 30):
        observed.add_tail(values[i : i + 30])
    assert np.array_equal(observed.tail_FK, -np.sort(-values, axis=0)[: observed.tail_FK.shape[1]].T)


def test_sums_over_other_features_are_refused_by_name():
    seen(1).check(LAYOUT)
    fewer = Layout(LAYOUT.sparse_F[1:], LAYOUT.levels_FL[1:], LAYOUT.pairs_P)
    with pytest.raises(ValueError, match="hour_levels_HFB"):
        seen(1).check(fewer)
