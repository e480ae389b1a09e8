"""Detectors against what textbooks print, and against what their proofs promise."""

from __future__ import annotations

import numpy as np
import pytest
from latentwatch.drift.alarms import Alarm, sentence
from latentwatch.drift.common import FALL, RISE
from latentwatch.drift.detection import KINDS, Budget, DetectorState, evidence, update
from latentwatch.drift.detectors import CEILING, binomial_llr, cusum, pair_llr, replica_llr, shiryaev_roberts
from latentwatch.drift.reference import DriftTolerance, fit, poisson_limits
from latentwatch.drift.sums import TrafficSums

from tests.support.drift_traffic import Change, Scenario, Traffic


def two_sided_cusum_run_lengths(mean: float, h: float, *, runs: int, k: float = 0.5, seed: int = 0) -> np.ndarray:
    """Steps until either side of the tabular CUSUM of N(mean, 1) goes above h."""
    rng, walk, length, out = np.random.default_rng(seed), np.zeros((2, runs)), np.zeros(runs), np.zeros(runs, bool)
    while not out.all():
        x = rng.normal(mean, 1, runs)
        cusum(walk[0], x - k)
        cusum(walk[1], -x - k)
        length += ~out
        out |= (walk > h).any(axis=0)
    return length


@pytest.mark.parametrize(
    ("mean", "h", "arl"),
    [(0, 4, 168), (1, 4, 8.38), (2, 4, 3.34), (0, 5, 465), (1, 5, 10.4), (2, 5, 4.01)],
)
def test_the_cusum_has_the_average_run_lengths_of_the_textbook(mean, h, arl):
    """Two-sided, k = 0.5: Montgomery, Introduction to Statistical Quality Control, table 9.3."""
    lengths = two_sided_cusum_run_lengths(mean, h, runs=4000)
    assert lengths.mean() == pytest.approx(arl, abs=4 * lengths.std() / np.sqrt(len(lengths)) + 0.01 * arl)


def test_the_mean_run_of_a_shiryaev_roberts_detector_is_at_least_its_limit():
    """The bound needs no distribution: here requests are drawn at the very rate that is the null."""
    rng, runs, limit = np.random.default_rng(1), 2000, 100.0
    statistic, length, out = np.zeros(runs), np.zeros(runs), np.zeros(runs, bool)
    while not out.all():
        shiryaev_roberts(statistic, binomial_llr(rng.binomial(100, 0.1, runs), 100, np.array(0.1), np.array(0.15)))
        length += ~out
        out |= statistic >= limit
    assert limit <= length.mean() < 3 * limit


def test_the_mean_of_the_statistic_is_the_number_of_windows():
    """E[R_t] = t on the null: what makes log10 of it evidence on a known scale."""
    rng, runs = np.random.default_rng(2), 200_000
    statistic = np.zeros(runs)
    for _ in range(5):
        shiryaev_roberts(statistic, binomial_llr(rng.binomial(50, 0.1, runs), 50, np.array(0.1), np.array(0.12)))
    assert statistic.mean() == pytest.approx(5, rel=0.02)


def test_a_statistic_stops_at_its_ceiling_and_comes_down_again():
    statistic = np.zeros(1)
    for _ in range(100):
        shiryaev_roberts(statistic, np.array([50.0]))
    assert statistic[0] == CEILING
    for _ in range(100):
        shiryaev_roberts(statistic, np.array([-3.0]))
    assert statistic[0] < 1


@pytest.mark.parametrize("count", [1, 2, 5, 30, 1000])
@pytest.mark.parametrize("sds", [1.96, 3.5])
def test_poisson_limits_are_close_to_the_exact_ones(count, sds):
    from scipy.stats import chi2, norm

    tail = norm.sf(sds)
    low, high = poisson_limits(np.array(count), sds)
    assert high == pytest.approx(chi2.isf(tail, 2 * count + 2) / 2, rel=0.03)
    assert low == pytest.approx(chi2.ppf(tail, 2 * count) / 2, rel=0.03, abs=0.1)


def test_a_count_of_zero_has_an_upper_limit_and_no_lower_one():
    low, high = poisson_limits(np.array(0), 3.5)
    assert low == 0 and high > 8


def test_replicas_that_move_together_say_nothing_about_one_of_them():
    expected_DF = np.full((4, 1), 100.0)
    llr = replica_llr(np.full((4, 1), 300.0), expected_DF, np.ones(1), ratio=1.5, tolerance=1.1)
    assert (llr < 0).all()
    one_higher = np.array([[150.0], [100.0], [100.0], [100.0]])
    llr = replica_llr(one_higher, expected_DF, np.ones(1), ratio=1.5, tolerance=1.1)
    assert llr[0] > 0 and (llr[1:] < 0).all()


def test_pairs_are_judged_given_their_own_rates():
    """Three times as many of both, independent, is no joint activity beyond chance."""
    lift_PP, phi_PP = np.array([[np.inf, 1.2], [np.inf, np.inf]]), np.ones((2, 2))
    for active in (100, 300):
        chance = active * active / 10_000
        together = np.array([[active, chance], [chance, active]])
        assert pair_llr(together, 10_000, lift_PP, phi_PP, ratio=3.0)[0, 1] < 0
        together[0, 1] = together[1, 0] = 5 * chance
        assert pair_llr(together, 10_000, lift_PP, phi_PP, ratio=3.0)[0, 1] > 0


# -- all detectors together, on simulated traffic


def calibrated(scenario: Scenario, windows: int, seed: int = 0):
    traffic = Traffic(scenario, np.random.default_rng(seed))
    observed = TrafficSums.empty(traffic.layout)
    for _ in range(windows):
        window = traffic.window()
        observed.add_window(window.counts, window.stratum_G, window.end_seconds)
    return traffic, fit(observed, traffic.layout, DriftTolerance())


def watched(traffic: Traffic, reference, change: Change | None, windows: int, replicas: int = 1):
    state, budget = DetectorState.empty(traffic.layout, replicas), Budget()
    for _ in range(windows):
        update(state, reference, traffic.layout, traffic.window(change), budget)
    return evidence(state, traffic.layout, reference, budget)


PLAIN = Scenario(np.full(16, 0.02), replicas=4, pairs=8)
SOME_F = np.arange(16) < 4
"""Features that drift by themselves: what most do is a movement that they have in common."""


@pytest.fixture(scope="module")
def plain():
    return calibrated(PLAIN, 3000)


def fresh(seed: int) -> Traffic:
    return Traffic(PLAIN, np.random.default_rng(seed))


def test_no_kind_alarms_on_more_of_the_same_traffic(plain):
    found = watched(fresh(1), plain[1], None, 500, 4)
    assert not any(alarm_F.any() for alarm_F in found.alarms.values())


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (Change(rate_ratio=lambda _: np.where(SOME_F, 2.0, 1.0)), "rate"),
        (Change(rate_ratio=lambda _: np.where(SOME_F, 0.5, 1.0)), "rate"),
        (Change(value_shift=0.5), "shape"),
        (Change(value_shift=-0.5), "shape"),
        (Change(tail_share=0.1), "shape"),
        (Change(rate_ratio=lambda _: 2.0, replica=2), "replica"),
        (Change(rate_ratio=lambda _: 0.4, replica=2), "replica"),
    ],
    ids=["more", "fewer", "higher", "lower", "tail", "a replica more", "a replica fewer"],
)
def test_each_drift_is_found_by_its_own_kind_of_detector(plain, change, kind):
    found = watched(fresh(2), plain[1], change, 120, 4)
    drifts_F = SOME_F if kind == "rate" else np.ones(16, bool)
    assert (found.alarms[kind] == drifts_F).all()
    # All features of one replica are something that all have in common.
    assert found.common.alarm == (kind == "replica")
    if kind == "replica":
        assert (found.replica_F == 2).all()
    fewer = np.min(change.rate_ratio(0.0)) < 1 or change.value_shift < 0
    assert (found.direction[kind][drifts_F] == (FALL if fewer else RISE)).all()
    if kind == "shape":
        assert not found.alarms["rate"].any()


def test_joint_activity_is_found_where_no_rate_moves(plain):
    found = watched(fresh(3), plain[1], Change(pair_lift=5.0), 120, 4)
    assert found.alarms["coactivation"][:8].all() and not found.alarms["rate"].any()
    assert found.partner_F[:8].tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


def test_an_alarm_says_how_much_since_when_and_which_way(plain):
    traffic, began = fresh(4), 200
    state, budget = DetectorState.empty(traffic.layout, 4), Budget()
    for number in range(300):
        change = Change(rate_ratio=lambda _: np.where(SOME_F, 1.6, 1.0))
        window = traffic.window(change if number >= began else None)
        update(state, plain[1], traffic.layout, window, budget)
    found = evidence(state, traffic.layout, plain[1], budget)
    start = PLAIN.start_seconds + began * PLAIN.window_seconds
    assert (found.alarms["rate"] == SOME_F).all() and (found.direction["rate"][SOME_F] == RISE).all()
    assert np.median(np.abs(found.since_seconds["rate"][SOME_F] - start)) <= 3 * PLAIN.window_seconds
    inside = (found.ratio_low_F <= 1.6) & (found.ratio_high_F >= 1.6)
    assert inside[SOME_F].mean() >= 0.75 and found.ratio_F[SOME_F].mean() == pytest.approx(1.6, rel=0.05)


def test_single_fires_of_a_feature_that_never_fired_alarm_since_the_first_of_them():
    """One a window, and windows without between them, which do not make the beginning later."""
    scenario = Scenario(np.array([0.0, 0.05]), 1000)
    traffic, reference = calibrated(scenario, 500)
    state, budget, firing = DetectorState.empty(traffic.layout, 1), Budget(), 0
    for number in range(60):
        window = traffic.window()
        if number >= 20 and number % 3:
            window.counts.levels_GFB[0, 0] += (-1, 1)
            firing += 1
        update(state, reference, traffic.layout, window, budget)
        found = evidence(state, traffic.layout, reference, budget)
        if found.alarms["rate"][0]:
            break
    assert 3 <= firing <= 15 and found.direction["rate"][0] == RISE
    assert found.since_seconds["rate"][0] == scenario.start_seconds + (500 + 20) * 60
    assert found.ratio_F[0] != found.ratio_F[0], "there is no ratio to a rate of 0"
    assert not found.alarms["rate"][1]


def test_the_limit_grows_with_what_is_watched_and_with_the_time_between_pages():
    month = Budget()
    assert month.limit(256) == 256 * (len(KINDS) + 1) * 43200  # what all have in common is watched too
    assert Budget(seconds_per_page=12 * 30 * 86400).limit(1) == 12 * month.limit(1)


def test_conversations_raise_the_dispersion_and_not_the_pages():
    talks = Scenario(np.full(16, 0.02), conversation=5)
    _, reference = calibrated(talks, 2000)
    assert reference.phi_F.mean() == pytest.approx(5, rel=0.15)
    found = watched(Traffic(talks, np.random.default_rng(9)), reference, None, 500)
    assert not any(alarm_F.any() for alarm_F in found.alarms.values())


def test_an_adapter_that_takes_over_is_no_drift_where_adapters_are_labelled():
    two = np.array([[0.5], [1.5]]) * np.ones((1, 8))
    scenario = Scenario(
        np.full(8, 0.02), adapter_ratio_AF=two, adapter_share=lambda t: (0.8, 0.2) if t < 7e4 else (0.2, 0.8)
    )
    traffic, reference = calibrated(scenario, 2500)
    found = watched(traffic, reference, None, 200)
    assert not any(alarm_F.any() for alarm_F in found.alarms.values())
    assert reference.stratum_SF[1, 0] / reference.stratum_SF[0, 0] == pytest.approx(3, rel=0.1)


def test_an_adapter_that_has_its_own_hours_does_not_count_twice():
    """Its share is in the hour's rate already."""
    two = np.array([[0.5], [1.5]]) * np.ones((1, 8))
    scenario = Scenario(
        np.full(8, 0.02),
        20_000,
        300,
        adapter_ratio_AF=two,
        adapter_share=lambda t: (0.7, 0.3) if t % 86400 < 43200 else (0.3, 0.7),
    )
    traffic, reference = calibrated(scenario, 4 * 288)
    assert (reference.season_F == 1).all()
    found = watched(traffic, reference, None, 288)
    assert not any(alarm_F.any() for alarm_F in found.alarms.values())
    assert found.ratio_F == pytest.approx(np.ones(8), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_alarm_has_its_sentence(kind):
    alarm = Alarm("jailbreak", kind, "up", 9.0, 8.0, 0.0, 3.0, 2.0, 4.0, "pod-0/0", "deceive", None, [], "")
    assert sentence(alarm).startswith("jailbreak fires" if kind != "canary" else "jailbreak scores")
