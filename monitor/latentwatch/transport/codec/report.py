"""Report <-> its message."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

import numpy as np

from latentwatch.arrays import Array
from latentwatch.facts import EXCEEDANCE, FEATURE_STAT, RequestInfo, RequestProgress
from latentwatch.names import TokenState
from latentwatch.transport._pb import latentwatch_pb2 as pb
from latentwatch.transport.codec.fields import (
    MAX_COUNT,
    NORM_DTYPE,
    count,
    counters_message,
    few,
    malformed,
    no_unknown_fields,
    outcome,
    packed,
    read_counters,
    records,
    sequence,
)
from latentwatch.transport.codec.hello import hello_message, read_hello
from latentwatch.transport.report import TOKEN_SHAPE, EngineDelta, ModelDelta, ReplicaState, Report, RequestRow

_MODEL_COLUMNS: Final = {
    "fired": "fired_F",
    "requests": "requests_F",
    "exceedances": "exceedances_F",
    "statistic": "statistic_FB",
    "statistic_sum": "statistic_sum_F",
    "norm": "norm_HB",
    "norm_sum": "norm_sum_H",
}
"""Fields of a ModelDelta on the wire and their names here."""
_ROW_INFO: Final = tuple(field.name for field in fields(RequestInfo))
_ROW_PROGRESS: Final = ("closed_seconds", "output_tokens", "total_tokens")
"""Fields of a RequestRow that are the same on the wire and in its `info` and `progress`."""
_ROW_OPTIONAL: Final = ("prompt_tokens", "output_tokens", "total_tokens")


def report_message(number: int, report: Report) -> pb.Report:
    what = f"report {number}"
    try:
        return pb.Report(
            sequence=number,
            time_unix_nano=report.time_unix_nano,
            replicas=[_replica_message(replica) for replica in report.replicas],
            engines=[
                pb.EngineDelta(
                    model_name=engine.model_name,
                    engine=engine.engine,
                    tokens=engine.tokens.ravel().tolist(),
                    requests=engine.requests,
                )
                for engine in report.engines
            ],
            models=[
                pb.ModelDelta(
                    model_name=model.model_name,
                    peak=packed(what, "peak", model.peak_F, NORM_DTYPE, model.fired_F.shape),
                    **{name: getattr(model, column).ravel().tolist() for name, column in _MODEL_COLUMNS.items()},
                )
                for model in report.models
            ],
            requests=[
                pb.RequestRow(
                    number=row.number,
                    outcome=row.progress.outcome or 0,
                    tokens=row.progress.tokens.tolist(),
                    features=packed(what, "features", row.features, FEATURE_STAT, (len(row.features),)),
                    crossings=packed(what, "exceedances", row.exceedances, EXCEEDANCE, (len(row.exceedances),)),
                    **{name: getattr(row.info, name) for name in _ROW_INFO},
                    **{name: getattr(row.progress, name) for name in _ROW_PROGRESS},
                )
                for row in report.requests
            ],
            shed_requests=report.shed_requests,
            shed_crossings=report.shed_exceedances,
        )
    except (ValueError, TypeError) as error:
        raise malformed(what, f"a value does not fit its field: {error}") from error


def _replica_message(replica: ReplicaState) -> pb.ReplicaState:
    return pb.ReplicaState(
        hello=hello_message(replica.hello),
        connected=replica.connected,
        last_seen_seconds=replica.last_seen_seconds,
        open_requests=replica.open_requests,
        counters=counters_message(replica.counters),
    )


def read_report(message: pb.Report) -> Report:
    what = f"report {message.sequence}"
    for name in ("replicas", "engines", "models", "requests"):
        few(what, name, getattr(message, name))
    no_unknown_fields(what, message, *message.replicas, *message.engines, *message.models, *message.requests)
    no_unknown_fields(what, *(replica.counters for replica in message.replicas))
    sequence(what, message.sequence)
    return Report(
        time_unix_nano=message.time_unix_nano,
        replicas=tuple(
            ReplicaState(
                hello=read_hello(replica.hello),
                connected=replica.connected,
                last_seen_seconds=replica.last_seen_seconds,
                open_requests=count(what, "open_requests", replica.open_requests),
                counters=read_counters(what, replica.counters),
            )
            for replica in message.replicas
        ),
        engines=tuple(
            EngineDelta(
                engine.model_name,
                engine.engine,
                _counts(what, "tokens", engine.tokens, TOKEN_SHAPE),
                tuple(count(what, "requests", ended) for ended in engine.requests),
            )
            for engine in message.engines
        ),
        models=tuple(_read_model(what, model) for model in message.models),
        requests=tuple(_read_row(what, row) for row in message.requests),
        shed_requests=count(what, "shed_requests", message.shed_requests),
        shed_exceedances=count(what, "shed_crossings", message.shed_crossings),
    )


def _read_row(what: str, row: pb.RequestRow) -> RequestRow:
    same: dict[str, Any] = {name: getattr(row, name) for name in (*_ROW_INFO, *_ROW_PROGRESS)}
    same |= dict.fromkeys((name for name in _ROW_OPTIONAL if not row.HasField(name)), None)
    return RequestRow(
        number=count(what, "number", row.number),
        info=RequestInfo(**{name: same[name] for name in _ROW_INFO}),
        progress=RequestProgress(
            outcome=outcome(what, row.outcome) if row.outcome else None,
            tokens=_counts(what, "tokens", row.tokens, (len(TokenState) + 1,)),
            **{name: same[name] for name in _ROW_PROGRESS},
        ),
        features=records(what, "features", row.features, FEATURE_STAT),
        exceedances=records(what, "exceedances", row.crossings, EXCEEDANCE),
    )


def _read_model(what: str, model: pb.ModelDelta) -> ModelDelta:
    F, H = len(model.fired), len(model.norm_sum)
    shapes = {"statistic": (F, -1), "norm": (H, -1), "norm_sum": (H,)}
    columns = {
        column: _counts(what, name, getattr(model, name), shapes.get(name, (F,)), float if "sum" in name else np.int64)
        for name, column in _MODEL_COLUMNS.items()
    }
    return ModelDelta(model_name=model.model_name, peak_F=records(what, "peak", model.peak, NORM_DTYPE), **columns)


def _counts(what: str, name: str, values: Any, shape: tuple[int, ...], dtype: Any = np.int64) -> Array:
    try:
        counts: Array = np.fromiter(values, dtype, len(values)).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise malformed(what, f"{name} has {len(values)} values that are no counts of shape {shape}") from error
    if dtype is np.int64 and (counts > MAX_COUNT).any():
        raise malformed(what, f"{name} counts {int(counts.max())}, more than {MAX_COUNT}")
    return counts
