"""Counts since the collector started, copied out of its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentwatch.aggregate.histogram import Histograms
from latentwatch.arrays import Array
from latentwatch.names import Outcome


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
class ForwardView:
    """How forwarding to a gateway goes. Counts are cumulative since the boot id was drawn."""

    cut: int
    """Highest report number."""
    acknowledged: int
    """Highest one that the gateway acknowledged."""
    waiting_reports: int
    waiting_rows: int
    waiting_bytes: int
    """Of the rows."""
    capacity_bytes: int
    oldest_seconds: float
    """When the oldest report without an ack was cut, seconds since the Unix epoch; 0 for none."""
    shed_requests: int
    shed_exceedances: int
