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
import logging
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from filelock import BaseFileLock

from latentwatch import storage
from latentwatch.errors import StreamRefused
from latentwatch.log_limit import LogLimit
from latentwatch.transport.address import positive
from latentwatch.transport.hello import Hello
from latentwatch.transport.spool_segments import AckMark, Reader, Segment, frame_bytes, listed, scan
from latentwatch.transport.spooled import Spooled

log = logging.getLogger(__name__)

FOLDER: Final = "LATENTWATCH_SPOOL"
"""folder on a disk that outlives the engine, for what no collector has yet; nothing is written to a disk if unset"""
MAX_MIB: Final = "LATENTWATCH_SPOOL_MIB"
"""room in it, MiB for each engine; 1024 if unset"""
SYNC_SECONDS: Final = "LATENTWATCH_SPOOL_SYNC_SECONDS"
"""seconds between two syncs of that disk, 1 if unset; 0 leaves them to the system"""

_SEGMENT_BYTES: Final = 16 << 20
"""Small against the bound, so that what is acknowledged gives its room back soon."""
_RENEW_BYTES: Final = 1 << 18
"""A segment of which everything is acknowledged is begun anew above this."""
_RETRY_SECONDS: Final = 5.0
_FOUND: Final = 1024
"""More than one step has batches."""
_LOG_AGAIN_SECONDS: Final = 600.0
_BOOT: Final = re.compile(r"[0-9a-f]{32}")


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
                lock = storage.lock_folder(folder)
                if lock is None:
                    return True
                lock.release()
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
                    # A boot has written its last batch before the next one begins.
                    segments = (segment for segment, number in listed(path) if number >= 0)
                    found.append((next(segments, path).stat().st_mtime_ns, path))
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
        self._mark = AckMark(path)
        self._segments: list[Segment] = []
        self._number = 0
        self._retry_at = self._mark_again_at = 0.0
        self._unsynced: list[storage.FramedLog] = []
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
        self.found: deque[int] = deque(maxlen=_FOUND)
        """The highest numbers that lay there then."""
        self._folder_lock: BaseFileLock | None = None
        # Without the lock: reading what a boot left takes seconds, in which the others go on.
        self._enter()

    @property
    def locked(self) -> bool:
        """Whether this process may read and write here."""
        return self._folder_lock is not None

    @property
    def empty(self) -> bool:
        """Whether collectors hold all that can be read here."""
        return self.last <= self.acked

    def append(self, sequence: int, tokens: int, message: bytes) -> bool:
        """Write one batch down, behind those of lower numbers; False where that cannot be done. Never raises."""
        nbytes = frame_bytes(message)
        with self._lock:
            if self._segments and self._segments[-1].size > _SEGMENT_BYTES:
                self._end_segment()
            if not self._shared.room_for(nbytes) or not (self._written or self._begin_segment()):
                return False
            try:
                self._segments[-1].append(Spooled(sequence, tokens, message))
            except OSError as error:
                self._end_segment()
                self._retry_at = self._shared.fail(self.path, error)
                return False
            self.last = sequence
            self._shared.bytes += nbytes
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
                try:
                    self._mark.write(sequence)
                except OSError as error:
                    self._mark_again_at = self._shared.fail(self.path, error)
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
            for ended in self._unsynced:
                ended.close()
            self._unsynced.clear()
            self._mark.close()
            if self._folder_lock is not None:
                self._folder_lock.release()
                self._folder_lock = None

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

    def segment(self, number: int) -> Segment | None:
        """For the reader: the first segment from this number on."""
        with self._lock:
            return next((segment for segment in self._segments if segment.number >= number), None)

    def cut(self, segment: Segment, at: int, last: int, found: str) -> None:
        """For the reader: what was written behind `at` cannot be read; the last number before it is `last`."""
        with self._lock:
            if segment is self._written:
                self._end_segment()
            segment.size, segment.last = at, last
            self.last = max((segment.last for segment in self._segments), default=0)
        self._shared.refuse(segment.path, f"{found}; what follows byte {at} is given up")

    # -- with the lock held

    @property
    def _written(self) -> Segment | None:
        """The segment that is appended to."""
        return self._segments[-1] if self._segments and self._segments[-1].log is not None else None

    def _enter(self) -> None:
        """Lock the folder and take up what is in it."""
        try:
            self._shared.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._folder_lock = storage.lock_folder(self.path)
            if self._folder_lock is not None:
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
        try:
            segment = Segment.begin(self.path, self._number + 1, self.hello)
        except OSError as error:
            self._retry_at = self._shared.fail(self.path, error)
            return False
        self._number = segment.number
        self._segments.append(segment)
        self._shared.bytes += segment.size
        return True

    def _end_segment(self) -> None:
        if (segment := self._written) is not None and segment.log is not None:
            if self._syncer is not None:
                self._unsynced.append(segment.log)
            else:
                segment.log.close()
            segment.log = None

    def _done_with(self, segment: Segment) -> bool:
        return segment.last <= self.acked and (segment.log is None or segment.size > _RENEW_BYTES)

    def _remove_segment(self, segment: Segment) -> None:
        if segment.log is not None:
            segment.log.close()
            segment.log = None
        self._segments.remove(segment)
        self._shared.bytes -= segment.path.stat().st_size
        segment.path.unlink()

    def _sync(self, seconds: float) -> None:
        synced = 0
        while not self._closed.wait(seconds):
            with self._lock:
                ended, self._unsynced = self._unsynced, []
                written = self._written
                if written is not None and written.log is not None and self.appends > synced and not self.empty:
                    ended.append(written.log.duplicate())
                synced = self.appends
            for log in ended:
                try:
                    log.sync()
                except OSError as error:
                    self._shared.fail(self.path, error)
                finally:
                    log.close()

    def _scan(self) -> None:
        """Take up the files that are there. Raises OSError."""
        try:
            self.acked = self._mark.read()
        except ValueError as error:
            self._shared.refuse(self._mark.path, str(error))
        for path, number in listed(self.path):
            self._number = max(self._number, number)
            if number < 0:
                self._shared.refuse(path, "it is no segment of a spool; move it away")
                continue
            try:
                found = scan(path, number, self._shared.replica, self.path.name)
            except ValueError as error:
                self._shared.refuse(path, str(error))
                continue
            if found.damage:
                self._shared.refuse(path, f"{found.damage}; what follows is given up")
            self.hello = self.hello or found.hello
            self.waiting_tokens += sum(tokens for sequence, tokens in found.batches if sequence > self.acked)
            self.found.extend(sequence for sequence, _ in found.batches)
            self._segments.append(found.segment)
            self.last = max(self.last, found.segment.last)
