"""What the pipeline shows: plain values, copied out of its state, for metrics, API and page.

Times are seconds since the Unix epoch by the collector's clock, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from latentwatch.aggregate.histogram import Histograms
from latentwatch.collector.config import Bounds
from latentwatch.drift.model import DriftView
from latentwatch.names import Outcome, Phase, Reason, Severity, TokenState
from latentwatch.step.batch import EngineCounters

Array = npt.NDArray[Any]
PhaseName = Literal["prompt", "output"]

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
class EngineTotals:
    """Counts of one (model_name, engine) since the collector started."""

    model_name: str
    engine: str
    tokens: Array
    """int64 [TokenState, Reason, Phase], indexed by their values."""
    requests: Mapping[Outcome, int]
    open_requests: int


@dataclass(frozen=True)
class Exemplar:
    """The latest exceedance of a feature: what leads from a counter to a request."""

    request_id: str
    trace_id: str
    """32 hex digits of the client's traceparent, empty where it sent none."""
    value: float
    seconds: float


@dataclass(frozen=True)
class ModelTotals:
    """Counts of the features under one served model name since the collector started."""

    model_name: str
    fired_F: Array
    """Tokens on which each sparse feature fired."""
    requests_F: Array
    """Closed requests in which each sparse feature fired at least once."""
    exceedances_F: Array
    statistic: Histograms
    """Per-request statistic of each feature, of closed requests with at least one scored token."""
    norm: Histograms
    """Residual norms per hook point, one value a token."""
    latest: Mapping[int, Exemplar]
    """By feature index."""


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
    connected: bool
    last_seen_seconds: float
    open_requests: int
    counters: EngineCounters


@dataclass(frozen=True)
class ForwarderView:
    """A collector that forwards to this one."""

    collector: str
    connected: bool
    last_seen_seconds: float
    shed_requests: int
    """Rows of requests that it gave up since its boot."""
    shed_crossings: int


@dataclass(frozen=True)
class ForwardView:
    """How forwarding to a gateway goes. Counts are cumulative since the boot id was drawn."""

    cut: int
    """Highest report number."""
    held: int
    """Highest one that the gateway acknowledged."""
    waiting_reports: int
    waiting_rows: int
    waiting_bytes: int
    """Of the rows."""
    capacity_bytes: int
    oldest_seconds: float
    """When the oldest report without an ack was cut, seconds since the Unix epoch; 0 for none."""
    shed_requests: int
    shed_crossings: int


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
class Exceedance:
    """The first time that a request's statistic for a feature went above its limit."""

    seconds: float
    request_id: str
    """The engine's id; empty while it is unknown, because the request began before this collector."""
    response_id: str
    model_name: str
    feature: str
    label: str
    severity: Severity
    phase: PhaseName
    position: int
    """Token position of the crossing, 0 is the first prompt token; for a rolling mean the window's last token."""
    value: float
    """The statistic at the crossing."""
    limit: float
    peak: float
    """The largest value of the statistic so far; final once the request is closed."""
    trace_id: str
    tail_probability: float | None = None
    """Share of the baseline's requests with at least `value`; None without a baseline."""


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
    exceedances: tuple[Exceedance, ...]
    """The most severe first, then in their order in time. Each feature once: it does not count again in a request."""

    @classmethod
    def of(cls, exceedances: Sequence[Exceedance]) -> Anomaly:
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
class FeatureOfRequest:
    """One feature of one request."""

    feature: str
    label: str
    severity: Severity
    units: str
    max: float
    position: int
    fired_tokens: int
    """Tokens on which it fired; 0 for a dense feature, which scores every token."""
    statistic: float | None
    """The limit's statistic, None while there is none (no full window, no token of its phase)."""
    statistic_position: int | None
    limit: float | None
    exceeded: bool


@dataclass(frozen=True)
class RequestView:
    """One request, open or closed."""

    request_id: str
    response_id: str
    replica: str
    model_name: str
    engine: str
    adapter: str
    trace_id: str
    outcome: Literal["open", "finished", "aborted", "lost"]
    opened_seconds: float
    closed_seconds: float | None
    opening_seen: bool
    """False when it began before this collector, so that its first tokens are missing here."""
    prompt_tokens: int | None
    output_tokens: int | None
    total_tokens: int | None
    """As the engine reported them at the end."""
    tokens: Mapping[str, int]
    """As accounted here, by state: scored, inherited, unseen, dropped."""
    exceeded_features: int
    features: tuple[FeatureOfRequest, ...]
    """Exceeded ones first, then by closeness to the limit, then by activation."""
    features_left_out: int


def rank(statistic_nF: Array, limit_F: Array, exceeded_nF: Array, seen_nF: Array) -> Array:
    """Order of the features of n requests, most abnormal first, as indices [n, F].

    Exceeded ones, then by nearness to the limit, then those without a limit by size, then those that were seen without
    a value of their statistic, then the others.

    Args: statistic_nF: NaN for none. limit_F: +inf for none. exceeded_nF, seen_nF: bool.
    """
    has_limit = np.isfinite(limit_F)
    limit = np.where(has_limit, limit_F, 0.0)
    # Nearness is squeezed into -1..1 and size into -3..-1, so that one sort key holds both.
    nearness = (statistic_nF - limit) / np.maximum(np.abs(limit), 1e-6)
    key_nF = np.where(has_limit, nearness / (1 + np.abs(nearness)), statistic_nF / (1 + np.abs(statistic_nF)) - 2)
    none_nF = np.where(seen_nF, 4.0, 5.0)
    order: Array = np.argsort(np.where(np.isnan(key_nF), none_nF, -key_nF - 4 * exceeded_nF), axis=1, kind="stable")
    return order
