"""Every feature of the watchlist: what is known of it, what was counted, and whether its limit keeps its promise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from latentwatch.collector.lookup import Lookup
from latentwatch.collector.totals import ModelTotals
from latentwatch.watchlist.file import Limit
from latentwatch.watchlist.show import statistic_text

_SDS: Final = 1.96


@dataclass(frozen=True)
class Reliability:
    """How often requests go above a limit: as its baseline promised, and as it was seen here."""

    promised_ratio: float | None
    """Share of the baseline's requests at or above the limit; where there was none, 1 / its requests. None without a
    baseline."""
    exceedances: int
    """Since the collector started."""
    requests: int
    """That ended meanwhile and had a value to compare."""
    seen_ratio: float | None
    """None before the first request ended."""
    seen_low: float | None
    """95 % confidence interval of `seen_ratio`, by Wilson, as of requests that know nothing of each other."""
    seen_high: float | None


@dataclass(frozen=True)
class FeatureTotals:
    """One feature, as the watchlist describes it and as this collector counted it over all models."""

    id: str
    label: str
    severity: str
    hook_point: str
    kind: str
    gate: str
    units: str
    limit: Limit | None
    statistic: str
    """What the limit is on, in words."""
    skip_first_positions: int
    source: dict[str, Any]
    evidence: dict[str, Any]
    fired_tokens: int
    requests: int
    exceedances: int
    reliability: Reliability | None
    """None without a limit."""


@dataclass(frozen=True)
class Features:
    """The watchlist's features with their totals."""

    watchlist: str
    sha256: str
    features: list[FeatureTotals]


def features_of(lookup: Lookup, now: float) -> Features:
    """All of them, in watchlist order."""
    models = lookup.snapshot(now).models
    watchlist = lookup.watchlist
    totals = [
        FeatureTotals(
            **dataclasses.asdict(feature),
            hook_point=str(point),
            statistic=statistic_text(feature.limit),
            fired_tokens=sum(int(model.fired_F[i]) for model in models),
            requests=sum(int(model.requests_F[i]) for model in models),
            exceedances=sum(int(model.exceedances_F[i]) for model in models),
            reliability=_reliability(lookup, models, i),
        )
        for i, (feature, point) in enumerate(zip(lookup.features, watchlist.hook_point_F, strict=True))
    ]
    return Features(watchlist.name, watchlist.sha256, totals)


def _reliability(lookup: Lookup, models: Sequence[ModelTotals], i: int) -> Reliability | None:
    limit = lookup.features[i].limit
    if limit is None:
        return None
    exceedances = sum(int(model.exceedances_F[i]) for model in models)
    requests = sum(int(model.statistic.counts_FB[i].sum()) for model in models)
    low, high = share_interval(exceedances, requests)
    return Reliability(
        promised_ratio=lookup.drift.tail_probability(i, limit.value),
        exceedances=exceedances,
        requests=requests,
        seen_ratio=min(1.0, exceedances / requests) if requests else None,
        seen_low=low,
        seen_high=high,
    )


def share_interval(count: int, of: int) -> tuple[float | None, float | None]:
    """95 % confidence interval of a share, Wilson's; None for a share of nothing. A count above `of` is as large."""
    if not of:
        return None, None
    share, z2 = min(count, of) / of, _SDS**2
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _SDS * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    return max(0.0, centre - half), min(1.0, centre + half)
