"""The movement that features have in common: how far all of them went together, and whether that is drift.

One cause moves many rates at once: longer answers, another client, a feature of the product that people take up. A page
for each feature would say it a hundred times. So the common movement is estimated by itself and taken out of what each
feature is compared with; one detector watches it, and a feature pages where it stands out from it.

The estimate is a weighted median of the features' log ratios, so that features with less than half of the weight cannot
pass off their own drift as everybody's. It is no movement at all until it is three of its own standard deviations from
none: where nothing moves together, nothing is taken out.

Shape legend: F features, Z memories, 2 (active requests, expected ones), K alternatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from latentwatch.arrays import Array

COMMON: Final = "common"
"""The kind of the one detector that watches what all features have in common; it has a share of the page budget."""
RISE, FALL = 0, 1
MEMORIES: Final = (1.0, 8.0, 64.0, 512.0)
"""Windows over which ratios are averaged. Short ones follow a jump, where traffic is enough for them; long ones see
what moves slowly."""
LEAST_FEATURES: Final = 8
"""Fewer have nothing in common that could be told from what each does alone."""
LEAST_ACTIVE: Final = 10.0
"""Expected active requests, free of dispersion, that a feature needs in a memory to have a say."""
ALTERNATIVES: Final = (1.2, 1.5, 3.0)
"""Common ratios that the detector is tuned to, and their inverses."""
_SURE_SDS: Final = 3.0
_BEYOND: Final = 1.1
_SD_OF_MEDIAN: Final = 1.2533
_SD_OF_DEVIATION: Final = 1.4826
"""Standard deviation of normal values / their median absolute deviation."""
_FARTHEST: Final = math.log(20.0)


@dataclass(frozen=True)
class CommonNull:
    """How far the common movement may go without being drift; ratios of active requests to expected ones."""

    phi: float
    """Dispersion of a window's active requests, of all features together: a request that fires many adds to it."""
    high: float
    """inf where the baseline is too short to tell."""
    low: float


@dataclass(frozen=True)
class Movement:
    """How far all features went together."""

    log_ratio: float = 0.0
    """What is taken out of every feature's expectation; 0 while it is not certain."""
    seen_log_ratio: float = 0.0
    """The median of the quickest memory that knows enough."""
    sd: float = math.inf
    """Of that median; inf where too few features are known to say anything."""

    @property
    def ratio(self) -> float:
        """The factor that expectations are multiplied by."""
        return math.exp(self.log_ratio)


def remember(memory_Z2F: Array, active_F: Array, expected_F: Array) -> None:
    """Take one window into the memories, in place."""
    memory_Z2F *= (1 - 1 / np.array(MEMORIES))[:, None, None]
    memory_Z2F += np.stack((active_F, expected_F))


def movement(memory_Z2F: Array, phi_F: Array, slow_F: Array) -> Movement:
    """What the features have in common, from the longest memory to the shortest: each adds what it is certain of."""
    found = Movement()
    for active_F, expected_F in memory_Z2F[::-1]:
        (known,) = np.nonzero(expected_F >= LEAST_ACTIVE * phi_F)
        if len(known) < LEAST_FEATURES:
            continue
        active, expected = active_F[known], expected_F[known]
        sd = np.sqrt(phi_F[known] / expected + slow_F[known] ** 2)
        middle, sd_of_middle = _median(np.log((active + 0.5) / (expected + 0.5)), 1 / sd, sd)
        beyond = middle - found.log_ratio
        certain = math.copysign(max(abs(beyond) - _SURE_SDS * sd_of_middle, 0.0), beyond)
        log_ratio = min(max(found.log_ratio + certain, -_FARTHEST), _FARTHEST)
        found = Movement(log_ratio, middle, sd_of_middle)
    return found


def _median(values: Array, weights: Array, sds: Array) -> tuple[float, float]:
    """The weighted median, and its standard deviation: by what the values should scatter, or do if that is more."""
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    half = cumulated[-1] / 2
    middle = float(values[order[np.searchsorted(cumulated, half)]])
    distance = np.abs(values - middle)
    near = np.argsort(distance)
    spread = _SD_OF_DEVIATION * float(distance[near[np.searchsorted(np.cumsum(weights[near]), half)]])
    by_theory = float(np.sqrt((weights**2 * sds**2).sum()) / weights.sum())
    by_scatter = spread * float(np.sqrt((weights**2).sum()) / weights.sum())
    return middle, _SD_OF_MEDIAN * max(by_theory, by_scatter)


def common_llr(active_F: Array, expected_F: Array, null: CommonNull, moved: Movement) -> Array:
    """Log-likelihood ratios of one window's active requests of all features together, rises first; [K].

    Only a window in which the median feature is beyond the null as well counts for a drift: a few frequent features
    that move alone are no common movement.
    """
    if not math.isfinite(null.high):
        return np.full(2 * len(ALTERNATIVES), -1.0)
    rises = np.maximum(ALTERNATIVES, _BEYOND * null.high)
    falls = np.minimum(1 / np.array(ALTERNATIVES), null.low / _BEYOND)
    nulls = np.repeat((null.high, null.low), len(ALTERNATIVES))
    others = np.concatenate((rises, falls))
    llr = (active_F.sum() * np.log(others / nulls) - (others - nulls) * expected_F.sum()) / null.phi
    beyond = np.repeat((moved.ratio > null.high, moved.ratio < null.low), len(ALTERNATIVES))
    counted: Array = np.where(beyond, llr, np.minimum(llr, 0.0))
    return counted
