"""What a collector shows: plain values, copied out of its state, for metrics, API and page.

Times are seconds since the Unix epoch by the collector's clock, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from latentwatch.collector.config import Bounds
from latentwatch.collector.totals import EngineTotals, ForwardView, ModelTotals
from latentwatch.drift.model import DriftView
from latentwatch.facts import ExceedanceView, ShownFeature, ShownRequest
from latentwatch.names import Phase, Reason, Severity, TokenState
from latentwatch.step.batch import EngineCounters

TOKEN_SERIES = tuple(
    (state, reason, phase)
    for state, reasons in (
        (TokenState.SCORED, (Reason.NONE,)),
        (TokenState.INHERITED, (Reason.NONE,)),
        (TokenState.UNSEEN, tuple(r for r in Reason if r is not Reason.NONE)),
        (TokenState.DROPPED, tuple(r for r in Reason if r is not Reason.NONE)),
    )
    for reason in reasons
    for phase in Phase
)
"""Every combination that step.checks lets through."""


@dataclass(frozen=True)
class ReplicaView:
    """One engine process as its newest boot describes it."""

    replica: str
    model_name: str
    engine: str
    boot_id: str
    armed: bool
    not_armed_reason: str
    not_armed_text: str
    plugin_version: str
    engine_version: str
    model_match: str
    """A ModelMatch."""
    model_text: str
    connected: bool
    last_seen_seconds: float
    open_requests: int
    counters: EngineCounters
    clock_ahead_seconds: float = 0.0
    """By how much its clock is ahead of this collector's, at least; see ClockAhead."""


@dataclass(frozen=True)
class ForwarderView:
    """A collector that forwards to this one."""

    collector: str
    connected: bool
    last_seen_seconds: float
    shed_requests: int
    """Rows of requests that it gave up since its boot."""
    shed_exceedances: int
    clock_ahead_seconds: float = 0.0
    """As of ReplicaView."""


@dataclass(frozen=True)
class LagView:
    """Histogram of seconds from the engine's hand-over of a step to its merge here."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True)
class CollectorTotals:
    """The collector's own counts since it started."""

    messages: int
    duplicates: int
    lost_sequences: int
    streams_refused: Mapping[str, int]
    """By reason."""
    exceedances_evicted: int
    requests_evicted: int
    summaries_evicted: int
    accounting_excess_tokens: int
    ingest_lag: LagView
    open_requests: int
    """With statistics of their own here."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that /metrics shows, at one moment."""

    now: float
    engines: tuple[EngineTotals, ...]
    models: tuple[ModelTotals, ...]
    replicas: tuple[ReplicaView, ...]
    forwarders: tuple[ForwarderView, ...]
    forward: ForwardView | None
    """None where this collector forwards to none."""
    drift: tuple[DriftView, ...]
    bounds: Bounds
    collector: CollectorTotals


@dataclass(frozen=True)
class Anomaly:
    """One request and everything that it exceeded: one event, however many features and tokens it was."""

    request_id: str
    response_id: str
    model_name: str
    trace_id: str
    severity: Severity
    """Of the most severe feature."""
    first_seconds: float
    last_seconds: float
    exceedances: tuple[ExceedanceView, ...]
    """The most severe first, then in their order in time. Each feature once: it does not count again in a request."""

    @classmethod
    def of(cls, exceedances: Sequence[ExceedanceView]) -> Anomaly:
        """What one request exceeded, in any order."""
        rank = list(Severity)
        ordered = tuple(sorted(exceedances, key=lambda found: (rank.index(found.severity), found.seconds)))
        worst = ordered[0]
        seconds = [found.seconds for found in ordered]
        return cls(
            worst.request_id,
            worst.response_id,
            worst.model_name,
            worst.trace_id,
            worst.severity,
            min(seconds),
            max(seconds),
            ordered,
        )


@dataclass(frozen=True)
class RequestView(ShownRequest):
    """One request, open or closed."""

    exceeded_features: int
    features: tuple[ShownFeature, ...]
    """Exceeded ones first, then by closeness to the limit, then by activation."""
    features_left_out: int
