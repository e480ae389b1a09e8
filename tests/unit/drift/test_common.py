"""What all features have in common: taken out of each, paged for once, and not what a few of them do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from latentwatch.drift.alarms import common_alarm
from latentwatch.drift.common import MEMORIES, CommonNull, Movement, common_llr, movement, remember
from latentwatch.drift.detection import Budget, DetectorState, Readings, evidence, update
from latentwatch.drift.reference import DriftTolerance, Reference, fit
from latentwatch.drift.sums import TrafficSums

from tests.support.drift_traffic import Change, Scenario, Traffic

F = 64
SCENARIO = Scenario(np.geomspace(2e-3, 5e-2, F))


@pytest.fixture(scope="module")
def reference() -> Reference:
    traffic = Traffic(SCENARIO, np.random.default_rng(0))
    observed = TrafficSums.empty(traffic.layout)
    for _ in range(3 * 24 * 60 // 5):
        window = traffic.window()
        observed.add_window(window.counts, np.zeros(1, int), window.end_seconds + observed.totals[1] * 240, 60.0)
    return fit(observed, traffic.layout, DriftTolerance())


def after(reference: Reference, ratio_F: np.ndarray, windows: int, seed: int = 1) -> tuple[Readings, set[int]]:
    """What is read after so many windows of rates times these, and every feature whose rate alarmed on the way."""
    traffic = Traffic(SCENARIO, np.random.default_rng(seed))
    state, budget, alarmed = DetectorState.empty(traffic.layout, 1), Budget(), set()
    for number in range(20 + windows):
        change = Change(lambda _: ratio_F) if number >= 20 else Change()
        update(state, reference, traffic.layout, traffic.window(change), budget)
        shown = evidence(state, traffic.layout, reference, budget)
        alarmed |= set(np.flatnonzero(shown.alarms["rate"]).tolist())
    return shown, alarmed


@pytest.mark.parametrize("ratio", [1.5, 3.0, 0.5])
def test_a_movement_of_all_features_is_one_alarm_that_names_its_factor(reference, ratio):
    shown, alarmed = after(reference, np.full(F, ratio), 10)
    assert shown.common.alarm and not alarmed
    alarm = common_alarm(shown.common, [], None)
    assert alarm.direction == ("up" if ratio > 1 else "down")
    assert alarm.rate_ratio == pytest.approx(ratio, rel=0.1)
    assert f"{alarm.rate_ratio:.2f} times their baseline" in alarm.text and "none beyond the others" in alarm.text


def test_a_feature_that_goes_beyond_the_common_movement_alarms_by_itself(reference):
    ratio_F = np.full(F, 1.4)
    ratio_F[40] = 4.0
    shown, alarmed = after(reference, ratio_F, 20)
    assert shown.common.alarm and alarmed == {40}
    assert "f40 beyond that" in common_alarm(shown.common, ["f40"], None).text


def test_features_that_move_alone_are_no_common_movement_even_where_they_are_most_of_the_traffic(reference):
    ratio_F = np.ones(F)
    ratio_F[-16:] = 3.0
    shown, alarmed = after(reference, ratio_F, 20)
    assert alarmed >= set(range(F - 16, F)) and not shown.common.alarm


def test_nothing_is_taken_out_where_nothing_moves(reference):
    shown, alarmed = after(reference, np.ones(F), 60)
    assert shown.common.movement.log_ratio == 0.0 and not shown.common.alarm and not alarmed


def test_a_slow_movement_is_followed_before_it_is_an_alarm(reference):
    shown, alarmed = after(reference, np.full(F, 1.04), 60)
    assert 1.0 < shown.common.movement.ratio <= 1.05 and not shown.common.alarm and not alarmed


def test_few_features_have_nothing_in_common():
    memory_Z2F = np.zeros((len(MEMORIES), 2, 7))
    for _ in range(100):
        remember(memory_Z2F, np.full(7, 300.0), np.full(7, 100.0))
    moved = movement(memory_Z2F, np.ones(7), np.zeros(7))
    assert moved.log_ratio == 0.0 and math.isinf(moved.sd)
    alarm = common_llr(np.full(7, 300.0), np.full(7, 100.0), CommonNull(1.0, 1.05, 0.95), moved)
    assert (alarm <= 0).all(), "the total alone is no evidence"


def test_a_baseline_too_short_to_tell_never_alarms():
    llr_K = common_llr(np.full(9, 900.0), np.full(9, 100.0), CommonNull(1.0, math.inf, 0.0), Movement(2.0, 2.0, 0.01))
    assert (llr_K < 0).all()
