"""Limits per request from a baseline: quantiles of trusted traffic with their confidence, and how rare a value is.

Shape legend: F features, K kept tail values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from latentwatch.drift.baseline import Baseline
from latentwatch.drift.sums import TAIL, TrafficSums
from latentwatch.errors import BaselineRefused, RefusalReason
from latentwatch.watchlist.file import Feature, HookRows, Limit, Watchlist

MIN_BEYOND: Final = 10
"""Trusted requests that must lie beyond a limit: its rate is then known to a factor of two."""
_SDS: Final = 1.96


@dataclass(frozen=True)
class CalibratedLimit:
    """A limit that trusted requests go above at a stated rate."""

    value: float
    low: float
    """95 % confidence interval of the value, from the order statistics."""
    high: float
    fpr: float
    requests: int


def calibrated_limit(observed: TrafficSums, feature: int, fpr: float) -> CalibratedLimit | None:
    """The value that a share `fpr` of trusted requests lies above; None where so few showed the feature at all.

    Raises BaselineRefused "limit_fpr" where the baseline is too small for the rate, or keeps too few values for it.
    """
    requests = observed.requests_of(feature)
    beyond = fpr * requests
    if beyond < MIN_BEYOND or beyond + _SDS * math.sqrt(beyond) + 1 > TAIL:
        raise BaselineRefused(
            f"limits at a false-positive rate of {fpr:g}",
            found=f"{beyond:.1f} of {requests} trusted requests would lie beyond them",
            instead=f"Use a rate between {MIN_BEYOND / max(1, requests):.2g} and "
            f"{(TAIL - 40) / max(1, requests):.2g}, or calibrate on more traffic.",
            reason=RefusalReason.LIMIT_FPR,
        )
    spread = _SDS * math.sqrt(beyond)
    tail_K = observed.tail_FK[feature]
    value, low, high = (float(tail_K[max(0, round(rank) - 1)]) for rank in (beyond, beyond + spread, beyond - spread))
    if not math.isfinite(low):
        return None
    return CalibratedLimit(value, low, high, fpr, requests)


def tail_probability(observed: TrafficSums, feature: int, value: float) -> float:
    """Share of trusted requests with at least this value; at most 1 / requests where there was none.

    Exact among the kept values; below the smallest of them the share of those is given, which is too small.
    """
    requests = max(1, observed.requests_of(feature))
    return max(1, int((observed.tail_FK[feature] >= value).sum())) / requests


def with_limits(watchlist: Watchlist, baseline: Baseline | None) -> Watchlist:
    """The watchlist, with the baseline's limits on features that have none by hand; of the same hash."""
    if baseline is None or baseline.limit_fpr is None:
        return watchlist
    fpr, first, hooks = baseline.limit_fpr, 0, []
    for rows in watchlist.hooks:
        features = _limited(rows.features, baseline.observed, first, fpr)
        first += len(features)
        hooks.append(HookRows(rows.hook_point, features, rows.w_hi_KD, rows.w_lo_KD, rows.scale_6K))
    return dataclasses.replace(watchlist, hooks=tuple(hooks))


def _limited(features: Sequence[Feature], observed: TrafficSums, first: int, fpr: float) -> tuple[Feature, ...]:
    made = []
    for index, feature in enumerate(features, start=first):
        found = None if feature.limit else calibrated_limit(observed, index, fpr)
        made.append(dataclasses.replace(feature, limit=Limit("max", found.value)) if found else feature)
    return tuple(made)
