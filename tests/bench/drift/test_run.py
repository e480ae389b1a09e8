"""The benchmark's own code on hours instead of months, so that CI notices when it breaks or a detector goes blind."""

from __future__ import annotations

import numpy as np
import pytest
from river.drift import PageHinkley as RiversPageHinkley

from tests.bench.drift.detectors_others import PageHinkley
from tests.bench.drift.run import (
    QUICK,
    calibrated,
    drifts,
    limits_of_others,
    nulls,
    poisson_interval,
    run_canary,
    run_drift,
    run_null,
    run_null_of_others,
)


@pytest.fixture(scope="module")
def limits():
    return limits_of_others(QUICK, lambda _: None)


def test_ours_is_silent_on_a_null(limits):
    assert run_null("conversations of 5", QUICK, lambda _: None)["pages"] == 0
    rows = run_null_of_others("conversations of 5", QUICK, limits, lambda _: None)
    assert {row["detector"] for row in rows} >= {"PSI", "KS", "Page-Hinkley", "ADWIN", "CUSUM"}


@pytest.mark.parametrize("name", ["rate x3", "values +0.3 sd", "1 % of tokens, single, x3, small pod"])
def test_ours_finds_a_drift(limits, name):
    number = [drift.name for drift in drifts()].index(name)
    rows = run_drift(number, QUICK, limits, lambda _: None)
    assert rows[0]["detector"] == "latentwatch" and rows[0]["found_fraction"] >= 0.95


def test_a_swapped_model_is_found_by_the_canary():
    assert run_canary(lambda _: None)["found_fraction"] == 1


def test_our_page_hinkley_is_rivers():
    reference, cells_FC = calibrated(nulls()["independent"], 86400.0, 0)
    ours = PageHinkley(reference, cells_FC)
    theirs = RiversPageHinkley(min_instances=1, delta=ours.DELTA, threshold=20.0, alpha=ours.ALPHA)
    rng = np.random.default_rng(0)
    for x in np.concatenate((rng.normal(0, 1, 200), rng.normal(1, 1, 200))):
        statistic = ours.update(np.full(len(ours.rate_F), x))[0]
        theirs.update(x)
        assert theirs.drift_detected == (statistic > 20.0)
        if theirs.drift_detected:
            break
    assert theirs.drift_detected


def test_poisson_intervals_are_the_exact_ones():
    assert poisson_interval(0) == pytest.approx((0, 3.689), abs=1e-3)
    assert poisson_interval(10) == pytest.approx((4.795, 18.39), abs=1e-2)
