"""A stream as a file: what engines sent and when it came, to be replayed and calibrated from.

After the first line each frame is a time, the number of a stream, and a message as it is on the wire: the stream's
Hello, or a batch of it. A frame that was being written when the recorder died is left out on reading; any other damage
is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from latentwatch import storage
from latentwatch.errors import RefusalReason, StreamRefused
from latentwatch.step.checks import validate_segments
from latentwatch.transport import codec
from latentwatch.transport.hello import Hello
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport

_MAGIC: Final = b"latentwatch recording 1\n"
_FRAMING: Final = storage.Framing("dI", covered=False, max_body_bytes=codec.MAX_MESSAGE_BYTES)  # seconds, stream

_MAX_SECONDS: Final = 253_402_300_800.0
"""The year 10000."""


@dataclass(frozen=True)
class Recorded:
    """One batch of a recording."""

    seconds: float
    """Unix time at which the recorder had it."""
    hello: Hello
    received: ReceivedBatch


class RecordingSink:
    """A `transport.sink.Sink` that writes every batch down once."""

    def __init__(self, path: Path) -> None:
        """Raises FileExistsError: a recording is never overwritten."""
        self._log = storage.FramedLog(path, _FRAMING, _MAGIC)
        self._streams: dict[Hello, int] = {}
        self._held: dict[tuple[str, str], int] = {}
        self.batches = self.bytes = self.requests = 0

    def hello(self, hello: Hello, now: float) -> int:
        """See Sink. Raises StreamRefused "recording" for a collector that forwards: it has no steps to write down."""
        if hello.forwards:
            raise StreamRefused(
                f"collector {hello.replica}",
                found="it forwards reports, and a recording is of steps",
                instead="Record where the engines stream to.",
                reason=RefusalReason.RECORDING,
            )
        if hello not in self._streams:
            self._streams[hello] = len(self._streams)
            self._write(now, hello, codec.encode_hello(hello, last_acked_sequence=0, time_unix_nano=int(now * 1e9)))
        return self._held.get((hello.replica, hello.boot_id), 0)

    def observe(self, hello: Hello, received: ReceivedBatch, now: float) -> None:
        """See Sink. Raises StreamRefused, "malformed_batch" or "scores_unarmed", for what no collector takes."""
        validate_segments(received.batch, armed=hello.armed)
        key = hello.replica, hello.boot_id
        if received.sequence > self._held.get(key, 0):
            self._held[key] = received.sequence
            self._write(now, hello, received.message)
            self.batches += 1
            self.requests += len(received.batch.closed)

    def merge(self, hello: Hello, received: ReceivedReport, now: float) -> None:
        """See Sink; `hello` let in nobody who sends reports."""

    def commit(self) -> None:
        """Hand what was written to the operating system, before it is acknowledged."""
        self._log.commit()

    def goodbye(self, hello: Hello, now: float) -> None:
        """See Sink; a recording does not say when streams ended."""

    def close(self) -> None:
        """End the file."""
        self._log.commit()
        self._log.close()

    def _write(self, now: float, hello: Hello, message: bytes) -> None:
        self._log.put(message, now, self._streams[hello])
        self.bytes += _FRAMING.head_bytes + len(message)


def read(path: Path) -> Iterator[Recorded]:
    """The batches of a recording, in order. Raises StreamRefused "recording" where it is missing or damaged."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise _refuse(path, "it does not begin as a recording does")
            yield from _records(path, file)
    except OSError as error:
        raise _refuse(path, f"it cannot be read ({error.strerror})") from error


def _records(path: Path, file: BinaryIO) -> Iterator[Recorded]:
    hellos: dict[int, Hello] = {}
    frames = storage.FrameReader(file, _FRAMING, len(_MAGIC))
    for (seconds, stream), message, end in frames:
        if not 0 <= seconds < _MAX_SECONDS:
            raise _refuse(path, f"the record that ends at byte {end} came at {seconds} s, which is no time")
        decoded = codec.decode_request(message)
        if isinstance(decoded, Hello):
            hellos[stream] = decoded
        elif stream not in hellos:
            raise _refuse(path, f"the record that ends at byte {end} is of stream {stream}, which no Hello began")
        elif isinstance(decoded, ReceivedBatch):
            yield Recorded(seconds, hellos[stream], decoded)
    if frames.tail is storage.Tail.DAMAGED:
        raise _refuse(path, f"the record at byte {frames.at} is damaged")


def _refuse(path: Path, found: str) -> StreamRefused:
    return StreamRefused(
        f"recording {path}",
        found=found,
        instead="Give a file that 'latentwatch record' wrote.",
        reason=RefusalReason.RECORDING,
    )
