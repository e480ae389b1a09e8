"""The files of one boot in the spool: segments of batches, and the mark of how far collectors hold them.

A segment begins with a line that names the format and the Hello that its batches were numbered under; each batch is a
frame behind the other. The mark is written in place: a torn one is noticed, and costs batches that are sent twice.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Protocol

from latentwatch import storage
from latentwatch.errors import StreamRefused
from latentwatch.transport import codec
from latentwatch.transport.hello import Hello
from latentwatch.transport.spooled import Spooled

_MAGIC: Final = b"latentwatch spool 1\n"
_FRAMING: Final = storage.Framing("IQ", max_body_bytes=codec.MAX_MESSAGE_BYTES)  # tokens, sequence
_MARK: Final = struct.Struct("<QI")  # highest sequence that a collector holds, its CRC-32
_NAME: Final = re.compile(r"(\d{12})\.spool")


def frame_bytes(message: bytes) -> int:
    """What a batch takes in a segment."""
    return _FRAMING.head_bytes + len(message)


class Segment:
    """One file, and what is known of it. The one that is written, if any, is the last of its boot."""

    def __init__(self, number: int, path: Path, first: int) -> None:
        self.number = number
        self.path = path
        self.first = self.size = first
        """Where the batches begin; bytes that hold whole ones; what follows, if anything, is not read."""
        self.last = 0
        """Highest sequence in it, 0 for none."""
        self.log: storage.FramedLog | None = None
        """While it is written."""

    @classmethod
    def begin(cls, folder: Path, number: int, hello: Hello) -> Segment:
        """A new one. Raises OSError."""
        message = codec.encode_hello(hello, last_acked_sequence=0, time_unix_nano=0)
        path = folder / f"{number:012d}.spool"
        log = storage.FramedLog(path, _FRAMING, _MAGIC + _FRAMING.pack(message, 0, 0))
        made = cls(number, path, log.size)
        made.log = log
        return made

    def append(self, spooled: Spooled) -> None:
        """Write one batch down. Raises OSError: then none of it counts."""
        assert self.log is not None
        self.log.put(spooled.message, spooled.tokens, spooled.sequence)
        self.log.commit()
        self.size, self.last = self.log.size, spooled.sequence

    def read(self, descriptor: int, at: int) -> tuple[Spooled, int] | None:
        """The batch at this place of the open file, and where the next one begins; None where none is whole."""
        try:
            frame = _FRAMING.read(descriptor, at)
        except OSError:
            return None
        return (_spooled(frame), frame.end) if isinstance(frame, storage.Frame) else None


class Found(NamedTuple):
    """What a segment holds that some process left."""

    segment: Segment
    hello: Hello | None
    """Who numbered its batches; None where the file was torn before that."""
    batches: list[tuple[int, int]]
    """Sequence and tokens of each."""
    damage: str
    """What is wrong with its end; empty for nothing, or for a batch that was being written."""


def listed(folder: Path) -> Iterator[tuple[Path, int]]:
    """The segments of a boot's folder in order, with their numbers; -1 for any other file. Raises OSError."""
    for path in sorted(folder.iterdir()):
        name = _NAME.fullmatch(path.name)
        if name is not None or path.name not in ("acked", "lock"):
            yield path, int(name[1]) if name is not None else -1


def scan(path: Path, number: int, replica: str, boot_id: str) -> Found:
    """Read a segment that is there.

    Raises: OSError; ValueError, saying what it is instead, for a file that is no segment of this boot.
    """
    with path.open("rb") as file:
        if not _MAGIC.startswith(file.read(len(_MAGIC))):
            raise ValueError("it does not begin as a spool does; move it away")
        return _found(file, Segment(number, path, len(_MAGIC)), replica, boot_id)


def _found(file: BinaryIO, segment: Segment, replica: str, boot_id: str) -> Found:
    frames = storage.FrameReader(file, _FRAMING, segment.first)
    hello: Hello | None = None
    batches = []
    for frame in frames:
        if hello is None:
            hello = _hello(frame.body, replica, boot_id)
            segment.first = frame.end
        else:
            spooled = _spooled(frame)
            segment.last = spooled.sequence
            batches.append((spooled.sequence, spooled.tokens))
    segment.size = frames.at
    damaged = frames.tail is storage.Tail.DAMAGED
    return Found(segment, hello, batches, f"it is damaged behind byte {frames.at}" if damaged else "")


def _hello(message: bytes, replica: str, boot_id: str) -> Hello:
    try:
        hello = codec.decode_request(message)
    except StreamRefused as refused:
        raise ValueError(f"its Hello cannot be read ({refused}); move it away") from refused
    if not isinstance(hello, Hello) or (hello.replica, hello.boot_id) != (replica, boot_id):
        raise ValueError("it is of another replica or boot; move it away")
    return hello


def _spooled(frame: storage.Frame) -> Spooled:
    tokens, sequence = frame.fields
    return Spooled(sequence, tokens, frame.body)


class AckMark:
    """The file that says up to which sequence collectors hold the batches of a boot."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "acked"
        self._descriptor = -1

    def read(self) -> int:
        """The sequence, 0 where there is no mark. Raises OSError, ValueError for a damaged one."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        if len(data) != _MARK.size or zlib.crc32(data[:8]) != _MARK.unpack(data)[1]:
            raise ValueError("it is damaged; all that is here is sent again")
        return int(_MARK.unpack(data)[0])

    def write(self, sequence: int) -> None:
        """Raises OSError."""
        if self._descriptor < 0:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.pwrite(self._descriptor, _MARK.pack(sequence, zlib.crc32(sequence.to_bytes(8, "little"))), 0)

    def close(self) -> None:
        """Let go of the file. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Segments(Protocol):
    """What a reader reads: the segments of one boot, which come and go meanwhile."""

    appends: int
    """Batches that were appended."""

    def segment(self, number: int) -> Segment | None:
        """The first one from this number on."""

    def cut(self, segment: Segment, at: int, last: int, found: str) -> None:
        """What was written behind `at` cannot be read; the last sequence before it is `last`."""


class Reader:
    """Goes once through a spool, in one thread."""

    def __init__(self, spool: Segments, after: int) -> None:
        self._spool = spool
        self._after = after
        self._number = self._offset = self._last = 0
        self._descriptor = -1
        self._seen = -1

    @property
    def behind(self) -> bool:
        """Whether `read` may find more than it last did."""
        return self._seen != self._spool.appends

    def read(self) -> Spooled | None:
        """The next batch; None where there is none yet. Never raises: what cannot be read is refused."""
        appends = self._spool.appends
        while (segment := self._spool.segment(self._number)) is not None:
            if segment.number != self._number or self._descriptor < 0:
                self.close()
                self._number, self._offset, self._last = segment.number, segment.first, 0
                try:
                    self._descriptor = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    self._number += 1
                    # Where all of it was acknowledged meanwhile, it went, and that is no failure.
                    if self._spool.segment(segment.number) is segment:
                        self._spool.cut(segment, segment.first, 0, error.strerror or str(error))
                    continue
            if self._offset >= segment.size:
                if self._spool.segment(self._number + 1) is None:
                    break
                self.close()
                self._number += 1
                continue
            found = segment.read(self._descriptor, self._offset)
            if found is None:
                self._spool.cut(segment, self._offset, self._last, "it is damaged")
                continue
            spooled, self._offset = found
            self._last = spooled.sequence
            if spooled.sequence > self._after:
                return spooled
        self._seen = appends
        return None

    def close(self) -> None:
        """Let go of the file. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
