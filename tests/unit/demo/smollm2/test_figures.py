"""Areas and rates against scikit-learn's, and the edges that it does not have."""

from __future__ import annotations

import math

import numpy as np
import pytest
from latentwatch.demo.smollm2 import figures


def test_areas_are_those_of_scikit_learn_with_ties_too() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    for size in (3, 40):
        positive, negative = rng.integers(0, 6, size).astype(float), rng.integers(0, 5, 50).astype(float)
        expected = roc_auc_score(np.r_[np.ones(size), np.zeros(50)], np.r_[positive, negative])
        assert figures.auroc(positive, negative) == pytest.approx(expected)
    assert math.isnan(figures.auroc(np.array([]), np.array([1.0])))


def test_a_threshold_keeps_its_rate_and_no_lower_one_does() -> None:
    negative = np.arange(200.0)
    limit = figures.threshold(negative, 0.01)
    assert (negative > limit).sum() == 2
    assert figures.tpr(np.array([197.0, 198.0, 250.0]), negative, 0.01) == pytest.approx(2 / 3)


def test_the_roc_rises_from_the_strictest_threshold_to_everything() -> None:
    points = figures.roc(np.array([2.0, 0.5]), np.array([0.0, 1.0]))
    assert points == [(0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]


def test_intervals_hold_what_they_are_of() -> None:
    assert figures.wilson(0, 0) == (0.0, 1.0)
    low, high = figures.wilson(1, 100)
    assert low == pytest.approx(0.0018, abs=1e-4) and high == pytest.approx(0.0545, abs=1e-4)
