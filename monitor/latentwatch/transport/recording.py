"""A stream as a file: what engines sent and when it came, to be replayed and calibrated from.

After the first line each record is a time, the number of a stream, a length, a CRC-32 and a message as it is on the
wire: the stream's Hello, or a batch of it. A record that was being written when the recorder died is left out on
reading; any other damage is refused.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from latentwatch.errors import StreamRefused
from latentwatch.transport import codec
from latentwatch.transport.hello import Hello
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport

_MAGIC: Final = b"latentwatch recording 1\n"
_RECORD: Final = struct.Struct("<dIII")  # seconds, number of the stream, bytes of the message, its CRC-32


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
        self._file = path.open("xb")
        self._file.write(_MAGIC)
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
                reason="recording",
            )
        if hello not in self._streams:
            self._streams[hello] = len(self._streams)
            self._write(now, hello, codec.encode_hello(hello, last_acked_sequence=0, time_unix_nano=int(now * 1e9)))
        return self._held.get((hello.replica, hello.boot_id), 0)

    def observe(self, hello: Hello, received: ReceivedBatch, now: float) -> None:
        """See Sink."""
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
        self._file.flush()

    def goodbye(self, hello: Hello, now: float) -> None:
        """See Sink; a recording does not say when streams ended."""

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def _write(self, now: float, hello: Hello, message: bytes) -> None:
        self._file.write(_RECORD.pack(now, self._streams[hello], len(message), zlib.crc32(message)) + message)
        self.bytes += _RECORD.size + len(message)


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
    while len(head := file.read(_RECORD.size)) == _RECORD.size:
        seconds, stream, length, checksum = _RECORD.unpack(head)
        message = file.read(length)
        if len(message) < length:
            return
        if zlib.crc32(message) != checksum:
            raise _refuse(path, f"the record that ends at byte {file.tell()} is damaged")
        decoded = codec.decode_request(message)
        if isinstance(decoded, Hello):
            hellos[stream] = decoded
        elif isinstance(decoded, ReceivedBatch):
            yield Recorded(seconds, hellos[stream], decoded)


def _refuse(path: Path, found: str) -> StreamRefused:
    return StreamRefused(
        f"recording {path}",
        found=found,
        instead="Give a file that 'latentwatch record' wrote.",
        reason="recording",
    )
