"""What every message of the stream has in common: columns of records, counters, and what is refused of them."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import fields
from typing import Any, Final

import numpy as np
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from latentwatch.arrays import Array
from latentwatch.errors import RefusalReason, StreamRefused
from latentwatch.names import Outcome
from latentwatch.step.batch import EngineCounters
from latentwatch.transport._pb import latentwatch_pb2 as pb

DENSE_DTYPE: Final = np.dtype("<f2")
NORM_DTYPE: Final = np.dtype("<f4")
MAX_COUNT: Final = 1 << 48
"""Largest number of a message and largest count in one: years of a fleet's tokens, and far below what makes a sum
overflow."""
MAX_EVENTS: Final = 1 << 16
"""Openings and ends, or rows of a report, in one message. An honest one comes to fewer: each is counted as 64 bytes of
MAX_MESSAGE_BYTES or more by who sends it. One of four bytes each would unfold to a hundred times its size."""
_COUNTERS: Final = tuple(field.name for field in fields(EngineCounters))


def counters_message(counters: EngineCounters) -> pb.EngineCounters:
    return pb.EngineCounters(**{name: getattr(counters, name) for name in _COUNTERS})


def read_counters(what: str, message: pb.EngineCounters) -> EngineCounters:
    return EngineCounters(**{name: count(what, name, getattr(message, name)) for name in _COUNTERS})


def sequence(what: str, value: int) -> int:
    if value < 1:
        raise malformed(what, "sequences count from 1")
    return count(what, "sequence", value)


def count(what: str, name: str, value: int) -> int:
    if value > MAX_COUNT:
        raise malformed(what, f"{name} is {value}, more than {MAX_COUNT}")
    return value


def packed(what: str, name: str, column: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    if column.dtype != dtype or column.shape != shape:
        raise malformed(what, f"{name} is {column.dtype} {column.shape}, not {dtype} {shape}")
    return column.tobytes()


def few(what: str, name: str, events: Sized) -> None:
    """Look at how many there are before any of them is unfolded."""
    if len(events) > MAX_EVENTS:
        raise malformed(what, f"it has {len(events)} {name}, more than {MAX_EVENTS}")


def records(what: str, name: str, data: bytes, dtype: np.dtype[Any]) -> Array:
    if len(data) % dtype.itemsize:
        raise malformed(what, f"{name} has {len(data)} bytes, no multiple of a record's {dtype.itemsize}")
    return np.frombuffer(data, dtype)


def outcome(what: str, value: int) -> Outcome:
    try:
        return Outcome(value)
    except ValueError:
        raise malformed(what, f"request outcome {value} is not one this version knows") from None


def no_unknown_fields(what: str, *messages: Message, reason: str = RefusalReason.MALFORMED_BATCH) -> None:
    """A field of a newer version would be lost here without a trace, and the numbers in it with it."""
    for message in messages:
        unknown = UnknownFieldSet(message)
        if len(unknown):
            name = message.DESCRIPTOR.name
            raise malformed(what, f"{name} has field {unknown[0].field_number}, which is unknown here", reason=reason)


def malformed(what: str, found: str, *, reason: str = RefusalReason.MALFORMED_BATCH) -> StreamRefused:
    return StreamRefused(
        what,
        found=found,
        instead="The exporter and the collector must run the same latentwatch version; upgrade the older one.",
        reason=reason,
    )
