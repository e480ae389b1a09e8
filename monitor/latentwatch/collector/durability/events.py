"""What a journal of the state holds: every event that changes it, and how one is given to a collector again."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from latentwatch import storage
from latentwatch.transport import codec
from latentwatch.transport.hello import Hello
from latentwatch.transport.sink import ReceivedReport

if TYPE_CHECKING:
    from latentwatch.collector.ingest import Ingest

FRAMING: Final = storage.Framing(max_body_bytes=codec.MAX_MESSAGE_BYTES + (64 << 10))
EVENT: Final = struct.Struct("<cdI")
"""Kind, the collector's time, number of the stream's hello in this journal. Of the first event, a HEADER, the last one
says instead whether the checkpoints and journals before lead to this one."""
HEADER, NAME, HELLO, BATCH, GOODBYE, TICK, REFUSED, SHIFT = b"J", b"N", b"H", b"B", b"G", b"T", b"R", b"S"
ACKNOWLEDGED: Final = b"A"


def repeat(ingest: Ingest, kind: bytes, now: float, hello: Hello | None, text: bytes) -> None:
    """Give a collector an event of a journal. Raises ValueError, struct.error, Refusal."""
    if kind == TICK:
        ingest.tick(now)
    elif kind == REFUSED:
        ingest.refused(text.decode())
    elif kind == SHIFT:
        ingest.shift_clock(*struct.unpack("<d", text))
    elif kind == ACKNOWLEDGED:
        ingest.acknowledged(*struct.unpack("<Q", text))
    elif hello is None:
        raise ValueError(f"event {kind!r} of a stream without a hello")
    elif kind == HELLO:
        ingest.hello(hello, now)
    elif kind == GOODBYE:
        ingest.goodbye(hello, now)
    elif kind == BATCH:
        received = codec.decode_request(text)
        if isinstance(received, Hello):
            raise ValueError("a hello where a batch was written")
        if isinstance(received, ReceivedReport):
            ingest.merge(hello, received, now)
            return
        ingest.observe(hello, received, now)
    else:
        raise ValueError(f"event of unknown kind {kind!r}")
