"""Values <-> bytes of the stream: the one file that knows the generated protobuf.

Decoding is strict, because a message that is read wrongly is a wrong number nobody notices: bytes that do not parse,
a column that is not a whole number of records, rows that do not fit the segments, an enum value or a field that this
version does not know are all refused. What decodes, encodes to the same values again.

A decoded array is a read-only view of the received bytes. Nothing here loops over rows, segments or activations;
requests that open and close are the only things handled one by one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from latentwatch.errors import Refusal, StreamRefused
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.step.batch import (
    CROSSED_DTYPE,
    FEATURE_DTYPE,
    FIRE_DTYPE,
    SEGMENT_DTYPE,
    EngineCounters,
    RequestClosed,
    RequestOpened,
    StepBatch,
    owns_rows,
)
from latentwatch.transport._pb import latentwatch_pb2 as pb
from latentwatch.transport.hello import PROTOCOL, Hello
from latentwatch.transport.report import TOKEN_SHAPE, EngineDelta, ModelDelta, ReplicaState, Report, RequestRow
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport

MAX_MESSAGE_BYTES: Final = 4 << 20
"""Longest message either side accepts; gRPC's own default for received messages, set explicitly on both ends."""
MAX_REPLICA_BYTES: Final = 253
"""A DNS name's length, and so a pod name's; a replica is a label on every series."""
MAX_COLUMNS: Final = 1 << 16
"""Dense features or hook points of one batch: a feature is a u2 in FIRE_DTYPE, so no watchlist has more."""
MAX_COUNT: Final = 1 << 48
"""Largest count of one report: years of a fleet's tokens, and far below what makes a sum of reports overflow."""
MAX_TEXT_BYTES: Final = 4096
"""Longest free text of a Hello; its longest real one is a refusal's sentence."""

_SERVICE = pb.DESCRIPTOR.services_by_name["Monitor"]
SERVICE: Final[str] = _SERVICE.full_name
METHOD: Final = f"/{SERVICE}/{_SERVICE.methods[0].name}"

_DENSE_DTYPE = np.dtype("<f2")
_NORM_DTYPE = np.dtype("<f4")
_INT32_MAX = 2**31 - 1
_COUNTERS = tuple(field.name for field in fields(EngineCounters))
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
_ROW_OPTIONAL: Final = ("prompt_tokens", "output_tokens", "total_tokens")
_ROW_FIELDS: Final = tuple(
    name
    for name in pb.RequestRow.DESCRIPTOR.fields_by_name
    if name not in ("outcome", "tokens", "features", "crossings")
)
"""Fields of a RequestRow that are the same on the wire and here."""
_HEX_32 = re.compile(r"[0-9a-f]{32}")
_HEX_64 = re.compile(r"[0-9a-f]{64}")
_SLUG = re.compile(r"[a-z][a-z0-9_]{0,63}")

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Welcome:
    resume_after_sequence: int
    collector_id: str


@dataclass(frozen=True)
class Ack:
    sequence: int


Request: TypeAlias = Hello | ReceivedBatch | ReceivedReport
Reply: TypeAlias = Welcome | Ack | StreamRefused


def encode_hello(hello: Hello, *, last_acked_sequence: int, time_unix_nano: int) -> bytes:
    """The first message of a stream. Raises StreamRefused, reason "malformed_hello", for what no receiver accepts."""
    _check_hello(hello)
    message = pb.Hello(protocol=PROTOCOL, last_acked_sequence=last_acked_sequence, time_unix_nano=time_unix_nano)
    _fill_hello(message, hello)
    return pb.StreamRequest(hello=message).SerializeToString()


def column_bytes(batch: StepBatch) -> int:
    """Length of the four columns, bytes, in memory and on the wire."""
    return batch.segments_S.nbytes + batch.fires_N.nbytes + batch.dense_RP.nbytes + batch.norm_RH.nbytes


def pieces(batch: StepBatch, *, max_bytes: int = MAX_MESSAGE_BYTES) -> tuple[StepBatch, ...]:
    """The batch cut so that each piece fits a message; almost always the batch itself.

    A long prompt that inherits its scores from the prefix cache arrives in one step and can outgrow a message. The
    pieces have the step, time and counters of the whole; rows stay in order, segments are cut between two tokens,
    requests open in the earliest piece and close in the last. What cannot be cut further is returned as it is.
    """
    whole, fitting = [batch], []
    while whole:
        piece = whole.pop()
        halves = _halves(piece) if _message_bytes(piece) > max_bytes else (piece,)
        if len(halves) == 1:
            fitting.append(piece)
        else:
            whole.extend(reversed(halves))
    return tuple(fitting)


def encode_batch(sequence: int, batch: StepBatch) -> bytes:
    """One batch as a stream message, at most MAX_MESSAGE_BYTES if the receiver is to take it.

    Raises: StreamRefused, reason "malformed_batch": a column has another dtype or shape than step.py says, or a
            value does not fit its field.
    """
    return pb.StreamRequest(batch=_batch_message(sequence, batch)).SerializeToString()


def encode_report(sequence: int, report: Report) -> bytes:
    """One report as a stream message. Raises StreamRefused, "malformed_batch": a value does not fit its field."""
    return pb.StreamRequest(report=_report_message(sequence, report)).SerializeToString()


def decode_request(data: bytes) -> Request:
    """Read a message of an exporter.

    Raises: StreamRefused, reason "malformed_hello", "protocol_version" or "malformed_batch".
    """
    request = _parse(data, "stream message")
    kind = request.WhichOneof("kind")
    if kind == "hello":
        return _read_hello(request.hello)
    if kind == "batch":
        return ReceivedBatch(request.batch.sequence, _read_batch(request.batch), data)
    if kind == "report":
        return ReceivedReport(request.report.sequence, _read_report(request.report), data)
    raise _malformed("stream message", f"{len(data)} bytes hold neither a hello, a batch nor a report")


def encode_reply(reply: Welcome | Ack | Refusal) -> bytes:
    """One message of a collector; a Refusal is told in the words of the exception."""
    if isinstance(reply, Welcome):
        welcome = pb.Welcome(resume_after_sequence=reply.resume_after_sequence, collector_id=reply.collector_id)
        return pb.StreamReply(welcome=welcome).SerializeToString()
    if isinstance(reply, Ack):
        return pb.StreamReply(ack=pb.Ack(sequence=reply.sequence)).SerializeToString()
    refusal = pb.Refusal(reason=reply.reason, what=reply.what, found=reply.found, instead=reply.instead)
    return pb.StreamReply(refusal=refusal).SerializeToString()


def decode_reply(data: bytes) -> Reply:
    """Read a message of a collector; its Refusal comes back as the StreamRefused that it tells of, not raised.

    Raises: StreamRefused, reason "malformed_reply".
    """
    reply = pb.StreamReply()
    try:
        reply.ParseFromString(data)
    except DecodeError as error:
        raise _malformed("reply of the collector", str(error), reason="malformed_reply") from error
    kind = reply.WhichOneof("kind")
    if kind == "welcome":
        return Welcome(reply.welcome.resume_after_sequence, reply.welcome.collector_id)
    if kind == "ack":
        return Ack(reply.ack.sequence)
    if kind == "refusal":
        told = reply.refusal
        return StreamRefused(told.what, found=told.found, instead=told.instead, reason=told.reason)
    raise _malformed(
        "reply of the collector", "it is neither a welcome, an ack nor a refusal", reason="malformed_reply"
    )


def _message_bytes(batch: StepBatch) -> int:
    """Upper bound on the length of an encoded batch, bytes."""
    # 512: the batch's own fields, fewer than 30, each a tag and at most 10 bytes of varint.
    return column_bytes(batch) + _event_bytes(batch.opened) + _event_bytes(batch.closed) + 512


def _event_bytes(events: Sequence[RequestOpened | RequestClosed]) -> int:
    # A character takes at most 4 bytes of UTF-8; 64 bytes hold the numbers, tags and lengths.
    return sum(64 + 4 * sum(len(value) for value in vars(event).values() if isinstance(value, str)) for event in events)


def _halves(batch: StepBatch) -> tuple[StepBatch, ...]:
    """Two batches that say the same, the larger part cut in half; the batch alone where it cannot be cut."""
    opened, closed = batch.opened, batch.closed
    if batch.rows > 1 and column_bytes(batch) >= _event_bytes(opened) + _event_bytes(closed):
        return _row_halves(batch)
    nothing = np.empty(0, SEGMENT_DTYPE)
    books = replace(batch.without_scores(Reason.NONE), segments_S=nothing, opened=(), closed=())
    if len(opened) > 1:
        half = len(opened) // 2
        return replace(books, opened=opened[:half]), replace(batch, opened=opened[half:])
    if len(closed) > 1:
        half = len(closed) // 2
        return replace(batch, closed=closed[:half]), replace(books, closed=closed[half:])
    return (batch,)


def _row_halves(batch: StepBatch) -> tuple[StepBatch, StepBatch]:
    """The batch cut between two rows; the segment that owns both is cut there as well."""
    cut = batch.rows // 2
    segments_S, fires_N = batch.segments_S, batch.fires_N
    end_row_S = np.cumsum(np.where(owns_rows(segments_S), segments_S["count"], 0))
    # The first segment that reaches the cut owns row cut - 1: those without rows do not move the end.
    across = int(np.searchsorted(end_row_S, cut))
    beyond = int(end_row_S[across]) - cut
    first_S, second_S = segments_S[: across + 1].copy(), segments_S[across:].copy()
    first_S["count"][-1] -= beyond
    second_S["start"][0] += second_S["count"][0] - beyond
    second_S["count"][0] = beyond
    fire = int(np.searchsorted(fires_N["row"], cut))
    second_N = fires_N[fire:].copy()
    second_N["row"] -= cut
    return (
        replace(
            batch,
            segments_S=first_S,
            fires_N=fires_N[:fire],
            dense_RP=batch.dense_RP[:cut],
            norm_RH=batch.norm_RH[:cut],
            closed=(),
        ),
        replace(
            batch,
            segments_S=second_S if beyond else second_S[1:],
            fires_N=second_N,
            dense_RP=batch.dense_RP[cut:],
            norm_RH=batch.norm_RH[cut:],
            opened=(),
        ),
    )


def _batch_message(sequence: int, batch: StepBatch) -> pb.StepBatch:
    what = f"step {batch.step}"
    rows = batch.rows
    try:
        return pb.StepBatch(
            sequence=sequence,
            step=batch.step,
            time_unix_nano=batch.time_unix_nano,
            segments=_packed(what, "segments", batch.segments_S, SEGMENT_DTYPE, (len(batch.segments_S),)),
            fires=_packed(what, "fires", batch.fires_N, FIRE_DTYPE, (len(batch.fires_N),)),
            dense=_packed(what, "dense", batch.dense_RP, _DENSE_DTYPE, (rows, batch.dense_RP.shape[-1])),
            norm=_packed(what, "norm", batch.norm_RH, _NORM_DTYPE, (rows, batch.norm_RH.shape[-1])),
            dense_features=batch.dense_RP.shape[-1],
            hook_points=batch.norm_RH.shape[-1],
            opened=[
                pb.RequestOpened(
                    handle=opened.handle,
                    request_id=opened.request_id,
                    prompt_tokens=opened.prompt_tokens,
                    adapter=opened.adapter,
                    traceparent=opened.traceparent,
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
                )
                for closed in batch.closed
            ],
            counters=pb.EngineCounters(**{name: getattr(batch.counters, name) for name in _COUNTERS}),
        )
    except (ValueError, TypeError) as error:
        raise _malformed(what, f"a value does not fit its field: {error}") from error


def _packed(what: str, name: str, column: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    if column.dtype != dtype or column.shape != shape:
        raise _malformed(what, f"{name} is {column.dtype} {column.shape}, not {dtype} {shape}")
    return column.tobytes()


def _read_batch(message: pb.StepBatch) -> StepBatch:
    what = f"batch {message.sequence} of step {message.step}"
    _no_unknown_fields(what, message, *message.opened, *message.closed, message.counters)
    if message.sequence < 1:
        raise _malformed(what, "sequences count from 1")
    segments_S = _records(what, "segments", message.segments, SEGMENT_DTYPE)
    _check_segments(what, segments_S)
    rows = int(segments_S["count"][owns_rows(segments_S)].sum(dtype=np.int64))
    batch = StepBatch(
        step=message.step,
        time_unix_nano=message.time_unix_nano,
        segments_S=segments_S,
        fires_N=_records(what, "fires", message.fires, FIRE_DTYPE),
        dense_RP=_matrix(what, "dense", message.dense, _DENSE_DTYPE, rows, message.dense_features),
        norm_RH=_matrix(what, "norm", message.norm, _NORM_DTYPE, rows, message.hook_points),
        opened=tuple(
            RequestOpened(opened.handle, opened.request_id, opened.prompt_tokens, opened.adapter, opened.traceparent)
            for opened in message.opened
        ),
        closed=tuple(
            RequestClosed(
                closed.handle,
                closed.request_id,
                closed.prompt_tokens,
                closed.output_tokens,
                closed.total_tokens,
                _outcome(what, closed.outcome),
            )
            for closed in message.closed
        ),
        counters=EngineCounters(**{name: getattr(message.counters, name) for name in _COUNTERS}),
    )
    if len(batch.fires_N) and int(batch.fires_N["row"].max()) >= rows:
        raise _malformed(what, f"an activation names row {int(batch.fires_N['row'].max())} of {rows}")
    return batch


def _report_message(sequence: int, report: Report) -> pb.Report:
    what = f"report {sequence}"
    try:
        return pb.Report(
            sequence=sequence,
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
                    peak=_packed(what, "peak", model.peak_F, _NORM_DTYPE, model.fired_F.shape),
                    **{name: getattr(model, column).ravel().tolist() for name, column in _MODEL_COLUMNS.items()},
                )
                for model in report.models
            ],
            requests=[
                pb.RequestRow(
                    outcome=row.outcome or 0,
                    tokens=row.tokens.tolist(),
                    features=_packed(what, "features", row.features, FEATURE_DTYPE, (len(row.features),)),
                    crossings=_packed(what, "crossings", row.crossings, CROSSED_DTYPE, (len(row.crossings),)),
                    **{name: getattr(row, name) for name in _ROW_FIELDS},
                )
                for row in report.requests
            ],
            shed_requests=report.shed_requests,
            shed_crossings=report.shed_crossings,
        )
    except (ValueError, TypeError) as error:
        raise _malformed(what, f"a value does not fit its field: {error}") from error


def _replica_message(replica: ReplicaState) -> pb.ReplicaState:
    hello = pb.Hello(protocol=PROTOCOL)
    _fill_hello(hello, replica.hello)
    return pb.ReplicaState(
        hello=hello,
        connected=replica.connected,
        last_seen_seconds=replica.last_seen_seconds,
        open_requests=replica.open_requests,
        counters=pb.EngineCounters(**{name: getattr(replica.counters, name) for name in _COUNTERS}),
    )


def _fill_hello(message: pb.Hello, hello: Hello) -> None:
    for field in fields(Hello):
        setattr(message, field.name, getattr(hello, field.name))


def _read_report(message: pb.Report) -> Report:
    what = f"report {message.sequence}"
    _no_unknown_fields(what, message, *message.replicas, *message.engines, *message.models, *message.requests)
    _no_unknown_fields(what, *(replica.counters for replica in message.replicas))
    if message.sequence < 1:
        raise _malformed(what, "sequences count from 1")
    return Report(
        time_unix_nano=message.time_unix_nano,
        replicas=tuple(
            ReplicaState(
                hello=_read_hello(replica.hello),
                connected=replica.connected,
                last_seen_seconds=replica.last_seen_seconds,
                open_requests=replica.open_requests,
                counters=EngineCounters(**{name: getattr(replica.counters, name) for name in _COUNTERS}),
            )
            for replica in message.replicas
        ),
        engines=tuple(
            EngineDelta(
                engine.model_name,
                engine.engine,
                _counts(what, "tokens", engine.tokens, TOKEN_SHAPE),
                tuple(engine.requests),
            )
            for engine in message.engines
        ),
        models=tuple(_read_model(what, model) for model in message.models),
        requests=tuple(_read_row(what, row) for row in message.requests),
        shed_requests=message.shed_requests,
        shed_crossings=message.shed_crossings,
    )


def _read_row(what: str, row: pb.RequestRow) -> RequestRow:
    same: dict[str, Any] = {name: getattr(row, name) for name in _ROW_FIELDS}
    same |= dict.fromkeys((name for name in _ROW_OPTIONAL if not row.HasField(name)), None)
    return RequestRow(
        outcome=_outcome(what, row.outcome) if row.outcome else None,
        tokens=_counts(what, "tokens", row.tokens, (len(TokenState) + 1,)),
        features=_records(what, "features", row.features, FEATURE_DTYPE),
        crossings=_records(what, "crossings", row.crossings, CROSSED_DTYPE),
        **same,
    )


def _read_model(what: str, model: pb.ModelDelta) -> ModelDelta:
    F, H = len(model.fired), len(model.norm_sum)
    shapes = {"statistic": (F, -1), "norm": (H, -1), "norm_sum": (H,)}
    columns = {
        column: _counts(what, name, getattr(model, name), shapes.get(name, (F,)), float if "sum" in name else np.int64)
        for name, column in _MODEL_COLUMNS.items()
    }
    return ModelDelta(model_name=model.model_name, peak_F=_records(what, "peak", model.peak, _NORM_DTYPE), **columns)


def _counts(what: str, name: str, values: Any, shape: tuple[int, ...], dtype: Any = np.int64) -> Array:
    try:
        counts: Array = np.fromiter(values, dtype, len(values)).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise _malformed(what, f"{name} has {len(values)} values that are no counts of shape {shape}") from error
    if dtype is np.int64 and (counts > MAX_COUNT).any():
        raise _malformed(what, f"{name} counts {int(counts.max())}, more than {MAX_COUNT}")
    return counts


def _records(what: str, name: str, data: bytes, dtype: np.dtype[Any]) -> Array:
    if len(data) % dtype.itemsize:
        raise _malformed(what, f"{name} has {len(data)} bytes, no multiple of a record's {dtype.itemsize}")
    return np.frombuffer(data, dtype)


def _matrix(what: str, name: str, data: bytes, dtype: np.dtype[Any], rows: int, columns: int) -> Array:
    if columns > MAX_COLUMNS:
        raise _malformed(what, f"{name} claims {columns} columns, more than {MAX_COLUMNS}")
    if len(data) != rows * columns * dtype.itemsize:
        raise _malformed(
            what, f"{name} has {len(data)} bytes, not those of {rows} rows and {columns} columns of {dtype}"
        )
    return np.frombuffer(data, dtype).reshape(rows, columns)


def _check_segments(what: str, segments_S: Array) -> None:
    for name, members in (("state", TokenState), ("reason", Reason), ("phase", Phase)):
        column = segments_S[name]
        known = _KNOWN[members][column]
        if not known.all():
            raise _malformed(what, f"segment {name} {int(column[~known][0])} is not one this version knows")
    count, start = segments_S["count"], segments_S["start"]
    if (count < 1).any() or (start < 0).any() or (start > _INT32_MAX - count).any():
        raise _malformed(what, "a segment's start and count are no positions of a request")


_KNOWN: dict[type, npt.NDArray[np.bool_]] = {
    members: np.isin(np.arange(256), [int(member) for member in members]) for members in (TokenState, Reason, Phase)
}


def _outcome(what: str, value: int) -> Outcome:
    try:
        return Outcome(value)
    except ValueError:
        raise _malformed(what, f"request outcome {value} is not one this version knows") from None


def _read_hello(message: pb.Hello) -> Hello:
    if message.protocol != PROTOCOL:
        raise StreamRefused(
            f"stream of replica {message.replica[:MAX_REPLICA_BYTES]!r}",
            found=f"it speaks protocol {message.protocol}, this collector speaks {PROTOCOL}",
            instead="Run the same latentwatch version in the engine and in the collector.",
            reason="protocol_version",
        )
    _no_unknown_fields("hello", message, reason="malformed_hello")
    hello = Hello(**{field.name: getattr(message, field.name) for field in fields(Hello)})
    _check_hello(hello)
    return hello


def _check_hello(hello: Hello) -> None:
    for name in (field.name for field in fields(Hello) if field.name not in ("armed", "forwards")):
        limit = MAX_REPLICA_BYTES if name == "replica" else MAX_TEXT_BYTES
        length = len(getattr(hello, name).encode(errors="replace"))
        if length > limit:
            raise _malformed("hello", f"{name} has {length} bytes, more than {limit}", reason="malformed_hello")
    for name, good in (
        ("replica", bool(hello.replica)),
        ("boot_id", bool(_HEX_32.fullmatch(hello.boot_id))),
        ("watchlist_sha256", bool(_HEX_64.fullmatch(hello.watchlist_sha256)) or not hello.armed),
        ("not_armed_reason", bool(_SLUG.fullmatch(hello.not_armed_reason)) != hello.armed),
    ):
        if not good:
            found = f"{name} is {getattr(hello, name)[:80]!r}, and armed is {hello.armed}"
            raise _malformed("hello", found, reason="malformed_hello")


def _parse(data: bytes, what: str) -> pb.StreamRequest:
    message = pb.StreamRequest()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise _malformed(what, f"{len(data)} bytes do not parse: {error}") from error
    _no_unknown_fields(what, message)
    return message


def _no_unknown_fields(what: str, *messages: Message, reason: str = "malformed_batch") -> None:
    """A field of a newer version would be lost here without a trace, and the numbers in it with it."""
    for message in messages:
        unknown = UnknownFieldSet(message)
        if len(unknown):
            name = message.DESCRIPTOR.name
            raise _malformed(what, f"{name} has field {unknown[0].field_number}, which is unknown here", reason=reason)


def _malformed(what: str, found: str, *, reason: str = "malformed_batch") -> StreamRefused:
    return StreamRefused(
        what,
        found=found,
        instead="The exporter and the collector must run the same latentwatch version; upgrade the older one.",
        reason=reason,
    )
