"""What the live page shows: two verdicts in words, coverage, and every feature over time. A pure function of the state.

Shape legend: F features, M windows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from latentwatch import __version__
from latentwatch.aggregate.window import FeatureWindow
from latentwatch.arrays import Array
from latentwatch.collector.health.cause import FoundCause
from latentwatch.collector.http.verdicts import Coverage, Engine, Verdict, is_anything_wrong, is_everything_seen
from latentwatch.collector.lookup import Lookup
from latentwatch.collector.snapshot import Anomaly, ReplicaView, Snapshot
from latentwatch.names import Reason, Severity, TokenState
from latentwatch.transport.report import TOKEN_SHAPE
from latentwatch.watchlist.file import Feature
from latentwatch.watchlist.show import statistic_text

REQUESTS_SHOWN: Final = 40
_WEIGHT: Final = {Severity.CRITICAL: 3, Severity.WARNING: 2, Severity.INFO: 1, Severity.NONE: 0}


@dataclass(frozen=True)
class FeatureSeries:
    """One feature over the windows shown, oldest first."""

    feature: str
    label: str
    severity: Severity
    hook_point: str
    kind: str
    units: str
    limit: float | None
    statistic: str
    """What is plotted and what the limit is on, in words: see watchlist.show.statistic_text."""
    exceedances: int
    """Since the collector started."""
    recent_exceedances: int
    fired_ratio: float | None
    """Tokens on which it fired among those seen in the windows shown; None for dense features and without tokens."""
    drifts: bool
    """Whether a detector of it is above its limit, of some model."""
    peak: float | None
    """Largest value of `statistic` in the windows shown."""
    series: list[float | None]
    """Largest value per window; None where there was none. A sparse feature without a fire on tokens seen is at 0."""


@dataclass(frozen=True)
class Links:
    """Where what this collector does not serve is; an empty text where that was not said."""

    runbook: str = ""
    """Of the runbook's text: what to do about an alert stands at #<its name in small letters>."""
    grafana: str = ""
    """Of the Grafana that has the dashboards, without a / behind."""


@dataclass(frozen=True)
class Overview:
    """One refresh of the page."""

    now: float
    version: str
    watchlist: str
    watchlist_sha256: str
    watchlist_notes: str
    wrong: Verdict
    """Is anything wrong?"""
    seen: Verdict
    """Is everything seen?"""
    coverage: Coverage
    open_requests: int
    requests: dict[str, int]
    """Ended ones by outcome."""
    window_seconds: float
    window_end: float
    tokens_seen: list[int]
    """Per window."""
    tokens_missed: list[int]
    features: list[FeatureSeries]
    """The most abnormal first; some of those that were asked for."""
    features_found: int
    """How many were asked for."""
    features_total: int
    flagged: list[Anomaly]
    """Requests that exceeded a limit, the latest first, each with everything that it exceeded."""
    engines: list[Engine]
    links: Links
    causes: list[FoundCause]
    """What is wrong with the monitor itself, the worst first."""


def overview(
    lookup: Lookup,
    now: float,
    *,
    most_features: int,
    first_feature: int = 0,
    search: str = "",
    links: Links = Links(),
    causes_of: Callable[[Snapshot], Sequence[FoundCause]] = lambda _: (),
) -> Overview:
    """The state as the page shows it: of the features that match `search`, at most so many from this rank on.

    A feature's id matches that feature alone; any other text those that have it in id, label, hook point or severity.
    """
    snapshot = lookup.snapshot(now)
    causes = causes_of(snapshot)
    end, windows = lookup.recent(now)
    totals = sum((engine.tokens for engine in snapshot.engines), np.zeros(TOKEN_SHAPE, np.int64))
    missed_M = windows.tokens_by_state[:, [TokenState.UNSEEN, TokenState.DROPPED]].sum(axis=1)
    seen_M = windows.tokens_by_state[:, [TokenState.SCORED, TokenState.INHERITED]].sum(axis=1)
    coverage = _coverage(totals, seen_M, missed_M, lookup.bounds.window_seconds)
    engines = [_engine(replica, now) for replica in snapshot.replicas]
    flagged = lookup.anomalies(REQUESTS_SHOWN)
    drifting = _drifting(lookup, snapshot)
    minutes = lookup.bounds.windows * lookup.bounds.window_seconds / 60
    seen = is_everything_seen(coverage, engines, minutes, causes)
    found = _found(lookup, windows, drifting, search.strip())
    return Overview(
        now=now,
        version=__version__,
        watchlist=lookup.watchlist.name,
        watchlist_sha256=lookup.watchlist.sha256,
        watchlist_notes=lookup.watchlist.notes,
        wrong=is_anything_wrong(
            _by_severity(lookup.features, windows),
            {severity: lookup.requests_over(now - 60 * minutes, severity) for severity in Severity},
            sorted((each for anomaly in flagged for each in anomaly.exceedances), key=lambda each: -each.seconds),
            drifting,
            seen,
            minutes,
        ),
        seen=seen,
        coverage=coverage,
        open_requests=sum(engine.open_requests for engine in snapshot.engines),
        requests=_outcomes(snapshot),
        window_seconds=lookup.bounds.window_seconds,
        window_end=end,
        tokens_seen=seen_M.tolist(),
        tokens_missed=missed_M.tolist(),
        features=_features(
            lookup, snapshot, windows, seen_M, drifting, found[first_feature : first_feature + most_features]
        ),
        features_found=len(found),
        features_total=len(lookup.features),
        flagged=flagged,
        engines=engines,
        links=links,
        causes=list(causes),
    )


def _drifting(lookup: Lookup, snapshot: Snapshot) -> list[Feature]:
    """Features of which a detector of some model alarms, the strongest first."""
    features = {feature.id: feature for feature in lookup.features}
    alarms = sorted(
        (alarm for model in snapshot.drift for alarm in model.alarms), key=lambda a: a.log10_limit - a.log10_evalue
    )
    return [features[id] for id in dict.fromkeys(alarm.feature for alarm in alarms if alarm.feature)]


def _coverage(totals: Array, seen_M: Array, missed_M: Array, window_seconds: float) -> Coverage:
    by_state = {state.name.lower(): int(totals[state].sum()) for state in TokenState}
    by_reason = totals[[TokenState.UNSEEN, TokenState.DROPPED]].sum(axis=(0, 2))
    all_M = seen_M + missed_M
    return Coverage(
        tokens=by_state,
        missing={reason.name.lower(): int(by_reason[reason]) for reason in Reason if by_reason[reason]},
        seen_ratio=_ratio(by_state["scored"] + by_state["inherited"], int(totals.sum())),
        recent_seen_ratio=_ratio(int(seen_M.sum()), int(all_M.sum())),
        tokens_per_second=float(all_M[-6:-1].sum() / (5 * window_seconds)),
    )


def _by_severity(features: Sequence[Feature], windows: FeatureWindow) -> dict[Severity, int]:
    """Requests that went above a limit in the windows, by the feature's severity."""
    counts = dict.fromkeys(Severity, 0)
    for feature, count in zip(features, windows.exceedances_F.sum(axis=0).tolist(), strict=True):
        counts[feature.severity] += count
    return counts


def _found(lookup: Lookup, windows: FeatureWindow, drifting: Sequence[Feature], text: str) -> list[int]:
    """Numbers of the features that match, the most abnormal first."""
    exceeded_F, peak_F = windows.exceedances_F.sum(axis=0), windows.peak_F.max(axis=0)
    ranked = _by_abnormality(lookup.features, exceeded_F, peak_F, {feature.id for feature in drifting})
    if not text:
        return ranked
    if exact := [i for i in ranked if lookup.features[i].id == text]:
        return exact
    words = [
        f"{f.id} {f.label} {point} {f.severity}".lower()
        for f, point in zip(lookup.features, lookup.watchlist.hook_point_F, strict=True)
    ]
    return [i for i in ranked if text.lower() in words[i]]


def _features(
    lookup: Lookup,
    snapshot: Snapshot,
    windows: FeatureWindow,
    seen_M: Array,
    drifting: Collection[Feature],
    wanted: Sequence[int],
) -> list[FeatureSeries]:
    points = lookup.watchlist.hook_point_F
    total_F = sum((model.exceedances_F for model in snapshot.models), np.zeros(len(points), np.int64))
    seen = int(seen_M.sum())
    made = []
    for i in wanted:
        feature = lookup.features[i]
        made.append(
            FeatureSeries(
                feature=feature.id,
                label=feature.label,
                severity=feature.severity,
                hook_point=str(points[i]),
                kind=feature.kind,
                units=feature.units,
                limit=feature.limit.value if feature.limit else None,
                statistic=statistic_text(feature.limit),
                exceedances=int(total_F[i]),
                recent_exceedances=int(windows.exceedances_F[:, i].sum()),
                fired_ratio=None if feature.dense else _ratio(int(windows.fired_F[:, i].sum()), seen),
                drifts=feature in drifting,
                peak=_number(float(windows.peak_F[:, i].max())),
                series=_series(windows.peak_F[:, i], None if feature.dense else seen_M),
            )
        )
    return made


def _by_abnormality(
    features: Sequence[Feature], exceeded_F: Array, peak_F: Array, drifting: Collection[str]
) -> list[int]:
    """Order of the page: exceeded lately or drifting, the severe first, and of those of one severity the exceeded;
    then nearness to the limit, those of no severity last.

    Nearness is cut to tenths of the limit, so that rows do not change places at every refresh.
    """

    def key(i: int) -> tuple[float, ...]:
        feature = features[i]
        limit = feature.limit
        nearness = -np.inf
        if limit and np.isfinite(peak_F[i]):
            nearness = round((float(peak_F[i]) - limit.value) / max(abs(limit.value), 1e-6), 1)
        exceeded, drifts = int(exceeded_F[i]), feature.id in drifting
        weight = _WEIGHT[feature.severity]
        abnormal = -weight if exceeded or drifts else 0
        return (abnormal, -exceeded, not drifts, not weight, -nearness, limit is None, i)

    return sorted(range(len(features)), key=key)


def _series(peak_M: Array, seen_M: Array | None) -> list[float | None]:
    """Values for a plot: four digits of the largest one are enough, and half the bytes."""
    finite_M = np.isfinite(peak_M)
    largest = float(np.abs(peak_M, where=finite_M, out=np.zeros(len(peak_M))).max())
    digits = 3 - int(np.floor(np.log10(largest))) if largest > 0 else 0
    values = np.round(np.where(finite_M, peak_M, 0.0).astype(np.float64), digits)
    gap_M = ~finite_M if seen_M is None else ~finite_M & (seen_M == 0)
    return [None if gap else value for value, gap in zip(values.tolist(), gap_M.tolist(), strict=True)]


def _engine(replica: ReplicaView, now: float) -> Engine:
    state: Literal["connected", "not armed", "disconnected"] = "connected" if replica.connected else "disconnected"
    return Engine(
        replica=replica.replica,
        model_name=replica.model_name,
        engine=replica.engine,
        state=state if replica.armed or not replica.connected else "not armed",
        reason=replica.not_armed_reason,
        text=replica.not_armed_text,
        model_match=replica.model_match,
        model_text=replica.model_text,
        last_seen_seconds_ago=max(0.0, now - replica.last_seen_seconds),
        open_requests=replica.open_requests,
        engine_version=replica.engine_version,
        plugin_version=replica.plugin_version,
    )


def _outcomes(snapshot: Snapshot) -> dict[str, int]:
    ended = {"finished": 0, "aborted": 0, "lost": 0}
    for engine in snapshot.engines:
        for outcome, count in engine.requests.items():
            ended[outcome.name.lower()] += count
    return ended


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _number(value: float) -> float | None:
    """Four digits are enough for a plot, and half the bytes."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
