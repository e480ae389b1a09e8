"""Values <-> bytes of the stream: the one package that knows the generated protobuf.

It proves bytes, and not what they mean: that is for step.checks and transport.report. Decoding is strict, because a
message that is read wrongly is a wrong number nobody notices: bytes that do not parse, a column that is not a whole
number of records, rows that do not fit the segments, or a field that this version does not know are all refused. What
decodes, encodes to the same values again.

A decoded array is a read-only view of the received bytes. Nothing here loops over rows, segments or activations;
requests that open and close are the only things handled one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from google.protobuf.message import DecodeError

from latentwatch.errors import Refusal, RefusalReason, StreamRefused
from latentwatch.step.batch import StepBatch
from latentwatch.step.reshape import column_bytes, event_bytes
from latentwatch.transport._pb import latentwatch_pb2 as pb
from latentwatch.transport.codec.batch import batch_message, read_batch
from latentwatch.transport.codec.fields import MAX_COUNT, malformed, no_unknown_fields
from latentwatch.transport.codec.hello import check_hello, hello_message, read_hello
from latentwatch.transport.codec.report import read_report, report_message
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import Report
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport

MAX_MESSAGE_BYTES: Final = 4 << 20
"""Longest message either side accepts; gRPC's own default for received messages, set explicitly on both ends."""

_SERVICE = pb.DESCRIPTOR.services_by_name["Monitor"]
SERVICE: Final[str] = _SERVICE.full_name
METHOD: Final = f"/{SERVICE}/{_SERVICE.methods[0].name}"


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
    check_hello(hello)
    message = hello_message(hello)
    message.last_acked_sequence, message.time_unix_nano = last_acked_sequence, time_unix_nano
    return pb.StreamRequest(hello=message).SerializeToString()


def fits_a_message(batch: StepBatch) -> bool:
    """Whether the batch surely takes no more than MAX_MESSAGE_BYTES."""
    # 512: the batch's own fields, fewer than 30, each a tag and at most 10 bytes of varint.
    return column_bytes(batch) + event_bytes(batch) + 512 <= MAX_MESSAGE_BYTES


def encode_batch(sequence: int, batch: StepBatch) -> bytes:
    """One batch as a stream message, at most MAX_MESSAGE_BYTES if the receiver is to take it.

    Raises: StreamRefused, reason "malformed_batch": a column has another dtype or shape than step.batch says, or a
            value does not fit its field.
    """
    return pb.StreamRequest(batch=batch_message(sequence, batch)).SerializeToString()


def encode_report(sequence: int, report: Report) -> bytes:
    """One report as a stream message. Raises StreamRefused, "malformed_batch": a value does not fit its field."""
    return pb.StreamRequest(report=report_message(sequence, report)).SerializeToString()


def decode_request(data: bytes) -> Request:
    """Read a message of an exporter.

    Raises: StreamRefused, reason "malformed_hello", "protocol_version" or "malformed_batch".
    """
    request = _parse(data, "stream message")
    kind = request.WhichOneof("kind")
    if kind == "hello":
        return read_hello(request.hello)
    if kind == "batch":
        return ReceivedBatch(request.batch.sequence, read_batch(request.batch), data)
    if kind == "report":
        return ReceivedReport(request.report.sequence, read_report(request.report), data)
    raise malformed("stream message", f"{len(data)} bytes hold neither a hello, a batch nor a report")


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
        raise malformed("reply of the collector", str(error), reason=RefusalReason.MALFORMED_REPLY) from error
    kind = reply.WhichOneof("kind")
    if kind == "welcome":
        return Welcome(_acknowledged(reply.welcome.resume_after_sequence), reply.welcome.collector_id)
    if kind == "ack":
        return Ack(_acknowledged(reply.ack.sequence))
    if kind == "refusal":
        told = reply.refusal
        return StreamRefused(told.what, found=told.found, instead=told.instead, reason=told.reason)
    raise malformed(
        "reply of the collector", "it is neither a welcome, an ack nor a refusal", reason=RefusalReason.MALFORMED_REPLY
    )


def _acknowledged(sequence: int) -> int:
    if sequence > MAX_COUNT:
        found = f"it acknowledges {sequence}, more than {MAX_COUNT}"
        raise malformed("reply of the collector", found, reason=RefusalReason.MALFORMED_REPLY)
    return sequence


def _parse(data: bytes, what: str) -> pb.StreamRequest:
    message = pb.StreamRequest()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise malformed(what, f"{len(data)} bytes do not parse: {error}") from error
    no_unknown_fields(what, message)
    return message
