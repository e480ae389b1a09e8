"""How well scores tell a concern's requests from others: areas, rates at a false-positive rate, intervals.

Shape legend: P positive requests, N negative ones.
"""

from __future__ import annotations

import numpy as np

from latentwatch.arrays import F64

Interval = tuple[float, float]


def auroc(positive_P: F64, negative_N: F64) -> float:
    """Chance that a positive scores above a negative, ties counted half. NaN without either."""
    if not len(positive_P) or not len(negative_N):
        return float("nan")
    ordered = np.sort(negative_N)
    below = np.searchsorted(ordered, positive_P, "left") + np.searchsorted(ordered, positive_P, "right")
    return float(below.mean() / (2 * len(negative_N)))


def threshold(negative_N: F64, rate: float) -> float:
    """The lowest score such that at most this share of the negatives lies above it."""
    return float(np.sort(negative_N)[::-1][int(rate * len(negative_N))])


def tpr(positive_P: F64, negative_N: F64, rate: float) -> float:
    """Share of the positives above the threshold at this false-positive rate."""
    return float((positive_P > threshold(negative_N, rate)).mean())


def roc(positive_P: F64, negative_N: F64) -> list[tuple[float, float]]:
    """(false-positive rate, true-positive rate) at each negative's score as the threshold, from the strictest on."""
    ordered, positive = np.sort(negative_N)[::-1], np.sort(positive_P)
    caught = 1 - np.searchsorted(positive, ordered, "right") / max(1, len(positive))
    return [(k / len(ordered), float(share)) for k, share in enumerate(caught)] + [(1.0, 1.0)]


def wilson(count: int, total: int, z: float = 1.96) -> Interval:
    """The 95 % interval of a share. (0, 1) of nothing."""
    if not total:
        return 0.0, 1.0
    share, square = count / total, z * z / total
    middle, half = share + square / 2, z * (share * (1 - share) / total + square / (4 * total)) ** 0.5
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))
