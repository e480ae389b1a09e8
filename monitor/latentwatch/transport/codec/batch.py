"""StepBatch <-> its message."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from latentwatch.arrays import Array
from latentwatch.step.batch import (
    FIRE_DTYPE,
    SEGMENT_DTYPE,
    RequestClosed,
    RequestOpened,
    StepBatch,
    owns_rows,
)
from latentwatch.transport._pb import latentwatch_pb2 as pb
from latentwatch.transport.codec.fields import (
    DENSE_DTYPE,
    NORM_DTYPE,
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

MAX_COLUMNS: Final = 1 << 16
"""Dense features or hook points of one batch: a feature is a u2 in FIRE_DTYPE, so no watchlist has more."""


def batch_message(number: int, batch: StepBatch) -> pb.StepBatch:
    what = f"step {batch.step}"
    rows = batch.rows
    try:
        return pb.StepBatch(
            sequence=number,
            step=batch.step,
            time_unix_nano=batch.time_unix_nano,
            segments=packed(what, "segments", batch.segments_S, SEGMENT_DTYPE, (len(batch.segments_S),)),
            fires=packed(what, "fires", batch.fires_N, FIRE_DTYPE, (len(batch.fires_N),)),
            dense=packed(what, "dense", batch.dense_RP, DENSE_DTYPE, (rows, batch.dense_RP.shape[-1])),
            norm=packed(what, "norm", batch.norm_RH, NORM_DTYPE, (rows, batch.norm_RH.shape[-1])),
            dense_features=batch.dense_RP.shape[-1],
            hook_points=batch.norm_RH.shape[-1],
            opened=[
                pb.RequestOpened(
                    handle=opened.handle,
                    request_id=opened.request_id,
                    prompt_tokens=opened.prompt_tokens,
                    adapter=opened.adapter,
                    traceparent=opened.traceparent,
                    response_id=opened.response_id,
                )
                for opened in batch.opened
            ],
            closed=[
                pb.RequestClosed(
                    handle=closed.handle,
                    request_id=closed.request_id,
                    prompt_tokens=closed.prompt_tokens,
                    output_tokens=closed.output_tokens,
                    total_tokens=closed.total_tokens,
                    outcome=closed.outcome,
                    response_id=closed.response_id,
                )
                for closed in batch.closed
            ],
            counters=counters_message(batch.counters),
        )
    except (ValueError, TypeError) as error:
        raise malformed(what, f"a value does not fit its field: {error}") from error


def read_batch(message: pb.StepBatch) -> StepBatch:
    what = f"batch {message.sequence} of step {message.step}"
    few(what, "requests that open", message.opened)
    few(what, "requests that end", message.closed)
    no_unknown_fields(what, message, *message.opened, *message.closed, message.counters)
    sequence(what, message.sequence)
    segments_S = records(what, "segments", message.segments, SEGMENT_DTYPE)
    rows = int(segments_S["count"][owns_rows(segments_S)].sum(dtype=np.int64))
    return StepBatch(
        step=message.step,
        time_unix_nano=message.time_unix_nano,
        segments_S=segments_S,
        fires_N=records(what, "fires", message.fires, FIRE_DTYPE),
        dense_RP=_matrix(what, "dense", message.dense, DENSE_DTYPE, rows, message.dense_features),
        norm_RH=_matrix(what, "norm", message.norm, NORM_DTYPE, rows, message.hook_points),
        opened=tuple(
            RequestOpened(
                opened.handle,
                opened.request_id,
                opened.prompt_tokens,
                opened.adapter,
                opened.traceparent,
                opened.response_id,
            )
            for opened in message.opened
        ),
        closed=tuple(
            RequestClosed(
                closed.handle,
                closed.request_id,
                closed.prompt_tokens,
                closed.output_tokens,
                closed.total_tokens,
                outcome(what, closed.outcome),
                closed.response_id,
            )
            for closed in message.closed
        ),
        counters=read_counters(what, message.counters),
    )


def _matrix(what: str, name: str, data: bytes, dtype: np.dtype[Any], rows: int, columns: int) -> Array:
    if columns > MAX_COLUMNS:
        raise malformed(what, f"{name} claims {columns} columns, more than {MAX_COLUMNS}")
    if rows < 0 or len(data) != rows * columns * dtype.itemsize:
        raise malformed(
            what, f"{name} has {len(data)} bytes, not those of {rows} rows and {columns} columns of {dtype}"
        )
    return np.frombuffer(data, dtype).reshape(rows, columns)
