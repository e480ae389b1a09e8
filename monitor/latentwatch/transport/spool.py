"""The spool: encoded batches on a disk, from before they are sent until a collector holds them.

Without one, an exporter that dies takes what no collector acknowledged with it. With one, the next exporter sends it,
as the replica and the boot that it came from, so that a collector which holds some of it already counts it once.

Files. `FOLDER/REPLICA/BOOT/` belongs to one boot of one engine: `N.spool` are its batches in their order, cut into
segments; `acked` says how far collectors hold them; `lock` is held by the process that writes or delivers them. A
segment begins with a line that names the format and the Hello that the batches were numbered under; each record has its
length and checksum. A segment goes once all of it is acknowledged, the folder with the last of them.

What survives. A batch is handed to the operating system before it is sent, so the death of a process costs nothing.
It is synced once in `sync_seconds`, so the death of the host costs about that; 0 never syncs. A record that was being
written is left out on reading, as if it had never been offered. A segment that is damaged otherwise is refused from
that place to its end, a file that is no spool's is refused and left where it is; both are counted and named in the log.

What does not fit. All boots of a replica share `max_bytes`. Beyond it, and while the disk cannot be written, `append`
says no, counts failures, and its caller keeps the batch in memory; the disk is tried again every few seconds. A disk
that is slower than the scores come makes `append` wait: that is the exporter's time, and the ring counts what it costs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from latentwatch.errors import StreamRefused
from latentwatch.log_limit import LogLimit
from latentwatch.transport import codec
from latentwatch.transport.address import positive
from latentwatch.transport.hello import Hello

log = logging.getLogger(__name__)

FOLDER: Final = "LATENTWATCH_SPOOL"
MAX_MIB: Final = "LATENTWATCH_SPOOL_MIB"
SYNC_SECONDS: Final = "LATENTWATCH_SPOOL_SYNC_SECONDS"

_MAGIC: Final = b"latentwatch spool 1\n"
_RECORD: Final = struct.Struct("<IIIQ")  # bytes of the message, CRC-32 of all behind it, tokens, sequence
_BEHIND_CRC: Final = struct.Struct("<IQ")  # tokens, sequence
_MARK: Final = struct.Struct("<QI")  # highest sequence that a collector holds, its CRC-32
_SEGMENT_BYTES: Final = 16 << 20
"""Small against the bound, so that what is acknowledged gives its room back soon."""
_RENEW_BYTES: Final = 1 << 18
"""A segment of which everything is acknowledged is begun anew above this."""
_RETRY_SECONDS: Final = 5.0
_LOG_AGAIN_SECONDS: Final = 600.0
_BOOT: Final = re.compile(r"[0-9a-f]{32}")
_SEGMENT: Final = re.compile(r"(\d{12})\.spool")


@dataclass(frozen=True)
class SpoolSettings:
    """Where and how much to spool."""

    folder: Path
    max_bytes: int = 1 << 30
    """Of one replica, over all of its boots."""
    sync_seconds: float = 1.0
    """Between two syncs of what was written; 0 for none."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> SpoolSettings | None:
        """From LATENTWATCH_SPOOL, _SPOOL_MIB and _SPOOL_SYNC_SECONDS; None where no folder is named.

        Raises: ConfigRefused, "config_value".
        """
        if not env.get(FOLDER):
            return None
        chosen = cls(Path(env[FOLDER]))
        mib = positive(env, MAX_MIB, chosen.max_bytes / (1 << 20))
        sync_seconds = positive(env, SYNC_SECONDS, chosen.sync_seconds, or_zero=True)
        return cls(chosen.folder, int(mib * (1 << 20)), sync_seconds)


class Spooled(NamedTuple):
    """One batch as it was written."""

    sequence: int
    tokens: int
    message: bytes
    """codec.encode_batch of it."""


@dataclass
class _Segment:
    number: int
    path: Path
    size: int
    """Bytes that hold whole records; what follows, if anything, is not read."""
    first: int
    """Where the records begin."""
    last: int = 0
    """Highest sequence in it, 0 for none."""


class SpoolFolder:
    """All that is spooled of one replica, under one bound. `open` the boot that is, deliver the `earlier` ones."""

    def __init__(self, settings: SpoolSettings, replica: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Never raises for what the disk holds or cannot do. `clock`: seconds, rising."""
        self._settings = settings
        self.replica = replica
        self._clock = clock
        self.path = settings.folder / re.sub(r"^\.", "%2E", quote(replica, safe=""))
        self.lock = threading.RLock()
        """Guards this folder and every spool in it."""
        self.bytes = 0
        self.failures = 0
        """Times that the disk could not be written or read."""
        self.refused = 0
        """Files that are no spool's, or damaged; and boots that no collector takes."""
        self.discarded_tokens = 0
        """Tokens of earlier boots that collectors refused, one by one or with their boot when its room was needed."""
        self._aside: list[Spool] = []
        self._may_log = LogLimit(_LOG_AGAIN_SECONDS, clock)
        with contextlib.suppress(OSError):
            self.bytes = sum(path.stat().st_size for path in self.path.glob("*/*.spool"))

    def open(self, hello: Hello) -> Spool:
        """The spool of the boot that begins now, or goes on in a new exporter."""
        spool = Spool(self, self.path / hello.boot_id, hello)
        spool.begin_syncing(self._settings.sync_seconds)
        return spool

    def earlier(self, boot_id: str) -> Iterator[Spool]:
        """What other boots left, the oldest first. One that another process has in use is left to it.

        Close each one before the next is asked for.
        """
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                if not _BOOT.fullmatch(path.name):
                    self.refuse(path, "it is no boot's folder; move it away")
        for folder in self._boots(boot_id):
            spool = Spool(self, folder, None)
            if spool.locked:
                yield spool

    def in_use(self, boot_id: str) -> bool:
        """Whether another process writes or delivers some boot but this one."""
        for folder in self._boots(boot_id):
            with contextlib.suppress(OSError):
                lock = _take(folder)
                if lock is None:
                    return True
                os.close(lock)
        return False

    def set_aside(self, spool: Spool, refusal: StreamRefused) -> None:
        """No collector takes this boot: it stays where it is until its room is needed, oldest first."""
        with self.lock:
            self._aside.append(spool)
        self.refuse(spool.path, f"no collector takes it ({refusal}); it stays until its room is needed")

    # For the spools. The lock is held, or taken.

    def room_for(self, count: int) -> bool:
        """Whether so many bytes more are within the bound; boots that were set aside make room."""
        while self.bytes + count > self._settings.max_bytes and self._aside:
            spool = self._aside.pop(0)
            self.discarded_tokens += spool.waiting_tokens
            log.error("%s: %d tokens that no collector took make room", spool.path, spool.waiting_tokens)
            spool.remove()
        return self.bytes + count <= self._settings.max_bytes

    def fail(self, path: Path, error: OSError) -> float:
        """Count that the disk failed; when to try again, by the clock."""
        self.failures += 1
        if self._may_log("disk"):
            log.error(
                "spool %s: %s. Scores wait in memory until the disk can be written; free space there or correct %s.",
                path,
                error.strerror or error,
                FOLDER,
            )
        return self._clock() + _RETRY_SECONDS

    def refuse(self, path: Path, found: str) -> None:
        """Count something that is not guessed at, and name it."""
        with self.lock:
            self.refused += 1
        log.error("spool %s: %s.", path, found)

    def now(self) -> float:
        """The clock's time."""
        return self._clock()

    def _boots(self, but: str) -> list[Path]:
        """Folders of boots that left something, in the order in which they began."""
        found = []
        try:
            for path in self.path.iterdir() if self.path.is_dir() else ():
                if _BOOT.fullmatch(path.name) and path.name != but:
                    # Written once, when the boot began.
                    lock = path / "lock"
                    found.append(((lock if lock.exists() else path).stat().st_mtime_ns, path))
        except OSError as error:
            self.fail(self.path, error)
        return [path for _, path in sorted(found)]


class Spool:
    """The batches of one boot. One thread appends; others may read and release."""

    def __init__(self, shared: SpoolFolder, path: Path, hello: Hello | None) -> None:
        """Args: hello: who numbers the batches; None for an earlier boot, which is only read."""
        self._shared = shared
        self._lock = shared.lock
        self.path = path
        self.hello = hello
        self._descriptor = -1
        self._mark = -1
        self._segments: list[_Segment] = []
        self._number = 0
        self._retry_at = self._mark_again_at = 0.0
        self._unsynced: list[int] = []
        self._closed = threading.Event()
        self._syncer: threading.Thread | None = None
        self.appends = 0
        """Batches appended by this process."""
        self.acked = 0
        """Highest sequence that a collector is known to hold."""
        self.last = 0
        """Highest sequence on the disk, 0 for none."""
        self.waiting_tokens = 0
        """Tokens of the batches that lay on the disk unacknowledged when this was opened."""
        self._lock_file = -1
        # Without the lock: reading what a boot left takes seconds, in which the others go on.
        self._enter()

    @property
    def locked(self) -> bool:
        """Whether this process may read and write here."""
        return self._lock_file >= 0

    @property
    def empty(self) -> bool:
        """Whether collectors hold all that can be read here."""
        return self.last <= self.acked

    def append(self, sequence: int, tokens: int, message: bytes) -> bool:
        """Write one batch down, behind those of lower numbers; False where that cannot be done. Never raises."""
        behind = _BEHIND_CRC.pack(tokens, sequence)
        record = _RECORD.pack(len(message), zlib.crc32(message, zlib.crc32(behind)), tokens, sequence) + message
        with self._lock:
            if self._segments and self._segments[-1].size > _SEGMENT_BYTES:
                self._end_segment()
            if not self._shared.room_for(len(record)) or not (self._descriptor >= 0 or self._begin_segment()):
                return False
            segment = self._segments[-1]
            try:
                _write(self._descriptor, record)
            except OSError as error:
                self._fail(error)
                # Part of a record may be there: what is read ends before it, and its room is given back.
                with contextlib.suppress(OSError):
                    os.truncate(segment.path, segment.size)
                return False
            segment.size += len(record)
            segment.last = self.last = sequence
            self._shared.bytes += len(record)
            self.appends += 1
            return True

    def reader(self, after: int) -> Reader:
        """Read what has a number above `after`, from the oldest on, and what is appended meanwhile."""
        return Reader(self, after)

    def release(self, sequence: int) -> None:
        """Collectors hold everything up to and including `sequence`. Never raises."""
        with self._lock:
            if sequence <= self.acked:
                return
            self.acked = sequence
            if not self.locked:
                return
            if self._shared.now() >= self._mark_again_at:
                self._write_mark()
            try:
                while self._segments and self._done_with(self._segments[0]):
                    self._remove_segment(self._segments[0])
            except OSError as error:
                self._shared.fail(self.path, error)

    def begin_syncing(self, seconds: float) -> None:
        """Sync what was written once in so many seconds, in a thread: a disk can take long over it."""
        if seconds > 0:
            self._syncer = threading.Thread(target=self._sync, args=(seconds,), name="latentwatch-spool", daemon=True)
            self._syncer.start()

    def close(self) -> None:
        """Let go of the files; those of which a collector holds everything are removed. Call it once."""
        self._closed.set()
        if self._syncer is not None:
            self._syncer.join()
        with self._lock:
            self._end_segment()
            if self.locked and self.empty:
                self.remove()
            for descriptor in (self._mark, self._lock_file, *self._unsynced):
                if descriptor >= 0:
                    os.close(descriptor)
            self._mark = self._lock_file = -1
            self._unsynced.clear()

    def remove(self) -> None:
        """Remove the segments, and the folder unless something else is in it. Never raises."""
        with self._lock:
            try:
                while self._segments:
                    self._remove_segment(self._segments[0])
                if {path.name for path in self.path.iterdir()} <= {"acked", "lock"}:
                    shutil.rmtree(self.path)
            except OSError as error:
                self._shared.fail(self.path, error)

    def segment(self, number: int) -> _Segment | None:
        """For the reader: the first segment from this number on."""
        with self._lock:
            return next((segment for segment in self._segments if segment.number >= number), None)

    def cut(self, segment: _Segment, at: int, last: int, found: str) -> None:
        """For the reader: what was written behind `at` cannot be read; the last number before it is `last`."""
        with self._lock:
            if self._descriptor >= 0 and segment is self._segments[-1]:
                self._end_segment()
            segment.size, segment.last = at, last
            self.last = max((segment.last for segment in self._segments), default=0)
        self._shared.refuse(segment.path, f"{found}; what follows byte {at} is given up")

    # -- with the lock held

    def _enter(self) -> None:
        """Lock the folder and take up what is in it."""
        try:
            self._shared.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            lock = _take(self.path)
            if lock is not None:
                self._lock_file = lock
                self._scan()
            elif self.hello is not None:
                raise OSError(errno.EBUSY, "another process has it in use")
        except OSError as error:
            self._retry_at = self._shared.fail(self.path, error)

    def _begin_segment(self) -> bool:
        if self.hello is None or self._shared.now() < self._retry_at:
            return False
        if not self.locked:
            self._enter()
        if not self.locked:
            return False
        number = self._number + 1
        path = self.path / f"{number:012d}.spool"
        head = _head(self.hello)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._retry_at = self._shared.fail(path, error)
            return False
        try:
            _write(descriptor, head)
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            self._retry_at = self._shared.fail(path, error)
            return False
        self._descriptor, self._number = descriptor, number
        self._segments.append(_Segment(number, path, len(head), len(head)))
        self._shared.bytes += len(head)
        return True

    def _end_segment(self) -> None:
        if self._descriptor >= 0:
            self._unsynced.append(self._descriptor)
            self._descriptor = -1
            if self._syncer is None:
                os.close(self._unsynced.pop())

    def _done_with(self, segment: _Segment) -> bool:
        active = self._descriptor >= 0 and segment is self._segments[-1]
        return segment.last <= self.acked and (not active or segment.size > _RENEW_BYTES)

    def _remove_segment(self, segment: _Segment) -> None:
        if segment is self._segments[-1] and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._segments.remove(segment)
        self._shared.bytes -= segment.path.stat().st_size
        segment.path.unlink()

    def _fail(self, error: OSError) -> None:
        self._end_segment()
        self._retry_at = self._shared.fail(self.path, error)

    def _sync(self, seconds: float) -> None:
        synced = 0
        while not self._closed.wait(seconds):
            with self._lock:
                ended, self._unsynced = self._unsynced, []
                if self._descriptor >= 0 and self.appends > synced and not self.empty:
                    ended.append(os.dup(self._descriptor))
                synced = self.appends
            for descriptor in ended:
                try:
                    os.fdatasync(descriptor)
                except OSError as error:
                    self._shared.fail(self.path, error)
                finally:
                    os.close(descriptor)

    def _scan(self) -> None:
        """Take up the files that are there. Raises OSError."""
        self._read_mark()
        for path in sorted(self.path.iterdir()):
            name = _SEGMENT.fullmatch(path.name)
            if name is not None:
                self._number = max(self._number, int(name[1]))
                self._scan_segment(path, int(name[1]))
            elif path.name not in ("acked", "lock"):
                self._shared.refuse(path, "it is no segment of a spool; move it away")

    def _scan_segment(self, path: Path, number: int) -> None:
        with path.open("rb") as file:
            descriptor, size = file.fileno(), path.stat().st_size
            segment = _Segment(number, path, len(_MAGIC), len(_MAGIC))
            begins = file.read(len(_MAGIC))
            if not _MAGIC.startswith(begins):
                self._shared.refuse(path, "it does not begin as a spool does; move it away")
                return
            hello = _read_record(descriptor, len(_MAGIC))
            if hello is not None:
                if not self._belongs(path, hello.message):
                    return
                segment.first = segment.size = len(_MAGIC) + _RECORD.size + len(hello.message)
                while (spooled := _read_record(descriptor, segment.size)) is not None:
                    segment.size += _RECORD.size + len(spooled.message)
                    segment.last = spooled.sequence
                    self.waiting_tokens += spooled.tokens if spooled.sequence > self.acked else 0
            if not _torn(descriptor, segment.size, size):
                self._shared.refuse(path, f"it is damaged behind byte {segment.size}; what follows is given up")
        self._segments.append(segment)
        self.last = max(self.last, segment.last)

    def _belongs(self, path: Path, message: bytes) -> bool:
        """Whether a segment's Hello is that of this boot; the first one read says whose boot it is."""
        try:
            hello = codec.decode_request(message)
        except StreamRefused as refused:
            self._shared.refuse(path, f"its Hello cannot be read ({refused}); move it away")
            return False
        if not isinstance(hello, Hello) or (hello.replica, hello.boot_id) != (self._shared.replica, self.path.name):
            self._shared.refuse(path, "it is of another replica or boot; move it away")
            return False
        self.hello = self.hello or hello
        return True

    def _write_mark(self) -> None:
        number = self.acked.to_bytes(8, "little")
        try:
            if self._mark < 0:
                self._mark = os.open(self.path / "acked", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._mark, number + zlib.crc32(number).to_bytes(4, "little"), 0)
        except OSError as error:
            self._mark_again_at = self._shared.fail(self.path, error)

    def _read_mark(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            data = (self.path / "acked").read_bytes()
            if len(data) == _MARK.size and zlib.crc32(data[:8]) == _MARK.unpack(data)[1]:
                self.acked = _MARK.unpack(data)[0]
            else:
                self._shared.refuse(self.path / "acked", "it is damaged; all that is here is sent again")


class Reader:
    """Goes once through a spool, in one thread."""

    def __init__(self, spool: Spool, after: int) -> None:
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
            spooled = _read_record(self._descriptor, self._offset)
            if spooled is None:
                self._spool.cut(segment, self._offset, self._last, "it is damaged")
                continue
            self._offset += _RECORD.size + len(spooled.message)
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


def _head(hello: Hello) -> bytes:
    message = codec.encode_hello(hello, last_acked_sequence=0, time_unix_nano=0)
    return _MAGIC + _RECORD.pack(len(message), zlib.crc32(message, zlib.crc32(_BEHIND_CRC.pack(0, 0))), 0, 0) + message


def _read_record(descriptor: int, at: int) -> Spooled | None:
    """The record at this place, None where none can be read whole."""
    try:
        head = os.pread(descriptor, _RECORD.size, at)
        if len(head) < _RECORD.size:
            return None
        length, crc, tokens, sequence = _RECORD.unpack(head)
        if length > codec.MAX_MESSAGE_BYTES:
            return None
        message = os.pread(descriptor, length, at + _RECORD.size)
    except OSError:
        return None
    if len(message) < length or zlib.crc32(message, zlib.crc32(_BEHIND_CRC.pack(tokens, sequence))) != crc:
        return None
    return Spooled(sequence, tokens, message)


def _torn(descriptor: int, at: int, size: int) -> bool:
    """Whether what stands behind the last whole record is the beginning of one, or nothing."""
    head = os.pread(descriptor, _RECORD.size, at)
    if len(head) < _RECORD.size:
        return True
    length = _RECORD.unpack(head)[0]
    return bool(at + _RECORD.size + length > size and length <= codec.MAX_MESSAGE_BYTES)


def _take(folder: Path) -> int | None:
    """A folder's lock, as a descriptor; it goes with the process. None where another holds it. Raises OSError."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _write(descriptor: int, data: bytes) -> None:
    """All of it. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
