"""Report: what a collector counted since its last one. The contract between a sidecar and its gateway.

Shape legend: F features of the watchlist, H hook points, B+1 buckets of a histogram (those of aggregate.histogram).

Counts are differences, so that reports add: the sum of a collector's reports is what the collector shows. Requests
travel as rows, one each: maxima, counts and exceedances per feature, and no token of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from latentwatch.arrays import Array
from latentwatch.errors import RefusalReason, StreamRefused
from latentwatch.facts import EXCEEDANCE, FEATURE_STAT, RequestInfo, RequestProgress
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.step.batch import EngineCounters
from latentwatch.transport.hello import Hello

_LAST_SECONDS: Final = float(1 << 31)
"""In 2038; a key of evidence has 41 bits for milliseconds."""
TOKEN_SHAPE: Final = (len(TokenState) + 1, len(Reason), len(Phase) + 1)
"""Token counts by TokenState, Reason and Phase value; index 0 of the first and the last is unused."""


@dataclass(frozen=True)
class ReplicaState:
    """An engine process as the forwarding collector sees it."""

    hello: Hello
    connected: bool
    last_seen_seconds: float
    open_requests: int
    counters: EngineCounters


@dataclass(frozen=True)
class EngineDelta:
    """Counts of one (model_name, engine)."""

    model_name: str
    engine: str
    tokens: Array
    """int64, TOKEN_SHAPE."""
    requests: tuple[int, ...]
    """Requests that ended, by Outcome in the order of its values."""


@dataclass(frozen=True)
class ModelDelta:
    """Counts of the features under one served model name; int64 except for sums and peaks."""

    model_name: str
    fired_F: Array
    requests_F: Array
    exceedances_F: Array
    statistic_FB: Array
    statistic_sum_F: Array
    norm_HB: Array
    norm_sum_H: Array
    peak_F: Array
    """Largest value of each feature's statistic since the last report, float32; -inf for none."""


@dataclass(frozen=True)
class RequestRow:
    """One request as it ended, or as it is while it goes on, where it exceeded a limit since the last report."""

    number: int
    """Unique per boot of the forwarding collector."""
    info: RequestInfo
    progress: RequestProgress
    features: Array
    """FEATURE_STAT, every feature that was seen, by index."""
    exceedances: Array = field(default_factory=lambda: np.empty(0, EXCEEDANCE))
    """EXCEEDANCE, those since the row before."""


@dataclass(frozen=True)
class Report:
    """What a collector counted since its last report, and requests that ended or exceeded a limit since."""

    time_unix_nano: int
    replicas: tuple[ReplicaState, ...] = ()
    engines: tuple[EngineDelta, ...] = ()
    models: tuple[ModelDelta, ...] = ()
    requests: tuple[RequestRow, ...] = ()
    shed_requests: int = 0
    """Rows given up since the collector's boot, because the gateway was away or slow."""
    shed_exceedances: int = 0

    @property
    def replica_names(self) -> set[str]:
        """Every engine process that it speaks for."""
        return {state.hello.replica for state in self.replicas} | {row.info.replica for row in self.requests}


def validate(report: Report, *, features: int, hook_points: int, statistic_buckets: int, norm_buckets: int) -> None:
    """Refuse a report that does not fit the watchlist, so that nothing behind it has to look again.

    Raises: StreamRefused, reason "malformed_batch", naming the offending value.
    """
    F, H = features, hook_points
    for engine in report.engines:
        if engine.tokens.shape != TOKEN_SHAPE or len(engine.requests) != len(Outcome):
            _malformed(f"counts of engine {engine.engine[:64]!r} have another shape")
    for model in report.models:
        for name, expected in (
            ("fired_F", (F,)),
            ("requests_F", (F,)),
            ("exceedances_F", (F,)),
            ("statistic_FB", (F, statistic_buckets)),
            ("statistic_sum_F", (F,)),
            ("norm_HB", (H, norm_buckets)),
            ("norm_sum_H", (H,)),
            ("peak_F", (F,)),
        ):
            if (found := getattr(model, name).shape) != expected:
                _malformed(f"{name} of model {model.model_name[:64]!r} has shape {found}, expected {expected}")
        if not (np.isfinite(model.statistic_sum_F).all() and np.isfinite(model.norm_sum_H).all()):
            _malformed(f"a sum of model {model.model_name[:64]!r} is no finite number")
        if not (model.peak_F < np.inf).all():
            _malformed(f"a peak of model {model.model_name[:64]!r} is NaN or infinite")
    for state in report.replicas:
        if not _are_times([state.last_seen_seconds]):
            _malformed(f"replica {state.hello.replica[:64]!r} was last seen at {state.last_seen_seconds}")
    if not _fit(report.requests, F):
        for found in _wrong_rows(report.requests, F):
            _malformed(found)


def joined(arrays: Iterable[Array], dtype: np.dtype[Any]) -> Array:
    """Records one after the other. Of many short arrays of records, np.concatenate takes ten times as long."""
    return np.frombuffer(b"".join(array.tobytes() for array in arrays), dtype)


def _fit(rows: tuple[RequestRow, ...], features: int) -> bool:
    """Whether `_wrong_rows` has nothing to say, looked at in all rows at once."""
    seen = joined((row.features for row in rows), FEATURE_STAT)
    exceedances = joined((row.exceedances for row in rows), EXCEEDANCE)
    last = np.cumsum([len(row.features) for row in rows], dtype=np.int64) - 1
    ascending = np.diff(seen["index"]) > 0
    ascending[last[(last >= 0) & (last < len(ascending))]] = True
    return bool(
        all(len(row.progress.tokens) == len(TokenState) + 1 for row in rows)
        and ascending.all()
        and ((seen["index"] >= 0) & (seen["index"] < features)).all()
        and np.isfinite(seen["max"]).all()
        and not np.isinf(seen["statistic"]).any()
        and ((seen["position"] >= 0) & (seen["fired"] >= 0)).all()
        and ((exceedances["feature"] < features) & np.isin(exceedances["phase"], list(Phase))).all()
        and np.isfinite(exceedances["value"]).all()
        and (exceedances["position"] >= 0).all()
        and _are_times(exceedances["seconds"])
        and _are_times([seconds for row in rows for seconds in (row.info.opened_seconds, row.progress.closed_seconds)])
    )


def _wrong_rows(rows: tuple[RequestRow, ...], features: int) -> Iterator[str]:
    for row in rows:
        index, exceedances = row.features["index"], row.exceedances
        if len(row.progress.tokens) != len(TokenState) + 1:
            yield f"request {row.number} has {len(row.progress.tokens)} token counts"
        if len(index) and (index[0] < 0 or index[-1] >= features or (np.diff(index) <= 0).any()):
            yield f"features of request {row.number} are not ascending or beyond the watchlist"
        if not np.isfinite(row.features["max"]).all() or (row.features["position"] < 0).any():
            yield f"request {row.number} has a feature without its maximum"
        if np.isinf(row.features["statistic"]).any():
            yield f"request {row.number} has an infinite statistic"
        if (row.features["fired"] < 0).any():
            yield f"request {row.number} has a feature that fired less than never"
        if (exceedances["feature"] >= features).any() or not np.isin(exceedances["phase"], list(Phase)).all():
            yield f"an exceedance of request {row.number} names no feature or no phase"
        if not np.isfinite(exceedances["value"]).all() or (exceedances["position"] < 0).any():
            yield f"an exceedance of request {row.number} is no finite number, or at no position"
        if not _are_times([*exceedances["seconds"], row.info.opened_seconds, row.progress.closed_seconds]):
            yield f"a time of request {row.number} is before 1970 or after 2037"


def _are_times(seconds: Sequence[float] | Array) -> bool:
    """Seconds since the epoch that a file of evidence has room for; 0 for what did not happen yet."""
    given = np.asarray(seconds, np.float64)
    return bool(((given >= 0) & (given < _LAST_SECONDS)).all())


def _malformed(found: str) -> None:
    raise StreamRefused(
        "report",
        found=found,
        instead="Run the same latentwatch version in the collector and in its gateway; upgrade the older one.",
        reason=RefusalReason.MALFORMED_BATCH,
    )
