"""The folder of segments as the collector writes it: where a record goes, and how long it stays.

    2026-11-22.0000.evidence       one segment: a day (UTC), a watchlist, at most a sixteenth of the folder's bound
    2026-11-22T05.content          sealed content of requests; see sealed_files
    evidence.lock                  held by the one collector that writes

A request stays in one segment, whole. Retention removes segments as files: by age, so that none is older than the
bound, and by size, oldest first. Removing a file costs the same however much it holds, so retention keeps up with any
load, and leaves nothing behind that could be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import re
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from filelock import BaseFileLock

from latentwatch import storage
from latentwatch.client_ids import MAX_ID_CHARACTERS, Asked, IdKind, meanings, meant_kind
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.evidence import audit, damage, sealed_files, segment
from latentwatch.evidence.damage import Damaged
from latentwatch.evidence.records import Ended, NotWritten, Record
from latentwatch.evidence.segment import NOTHING_ERASED, Erased, Match, Segment, Watched

log = logging.getLogger(__name__)

SEGMENTS: Final = 16
"""Segments that fill the bound on size: one that goes takes a sixteenth of the evidence with it."""
SMALLEST_BYTES: Final = 32 << 20
_LISTED: Final = 10
"""Requests that a refusal names."""
_REQUESTS_AT_HOME: Final = 65_536
"""Requests that run, and those whose end was never told; an older one would go on in the newest segment."""
_NAME: Final = re.compile(r"(\d{4}-\d\d-\d\d)\.(\d{4,})\.evidence")
_AGED: Final = re.compile(rf"{_NAME.pattern}((\.\d+)?\.(damaged|salvaged))?")
_DAY_SECONDS: Final = 86_400.0


@dataclass(frozen=True)
class Retention:
    """How much stays."""

    days: float = 30.0
    """A segment goes before its day began so long ago: everything in the folder is younger."""
    max_bytes: int = 10 << 30
    """Of all segments together."""
    content_hours: float = 24.0
    """Nothing that was said in a request stays longer than this."""

    def __post_init__(self) -> None:
        if not self.days > 0:
            raise _refuse("days", f"it is {self.days:g}", "Give a number above 0.")
        if not self.content_hours > 0:
            raise _refuse("content hours", f"it is {self.content_hours:g}", "Give a number above 0.")
        if self.max_bytes < SMALLEST_BYTES:
            raise _refuse("size", f"it is {self.max_bytes} bytes", f"Give at least {SMALLEST_BYTES >> 20} MiB.")


class Store:
    """The one writer of a folder. One thread at a time; nothing here is shared with readers but the files."""

    def __init__(self, folder: Path, watched: Watched, retention: Retention) -> None:
        """On a disk that is full or away nothing is written; each of the methods tries again, and raises OSError.

        Raises: ConfigRefused: the path can be no folder, or another collector writes to it.
        """
        self.folder = folder
        self.damaged = Damaged(folder)
        self._watched = watched
        self._retention = retention
        self._lock: BaseFileLock | None = None
        self._open: dict[Path, Segment] = {}
        self._home: dict[int, Path] = {}
        """Where each request lies that was written and has not ended."""
        self._newest: Path | None = None
        try:
            self._own()
        except OSError as error:
            if storage.is_mistake(error):
                raise _refused(folder, error.strerror or str(error), "Give a folder.") from error
            log.error(
                "evidence folder %s cannot be written: %s. Until it can, what would be written there is only counted.",
                folder,
                error.strerror or error,
            )

    def _own(self) -> None:
        """Have the folder. Raises OSError; ConfigRefused: another collector has it."""
        if self._lock is None:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = storage.lock_folder(self.folder, "evidence.lock")
        if self._lock is None:
            raise ConfigRefused(
                f"evidence folder {self.folder}",
                found="another collector writes to it",
                instead="Give each collector a folder of its own.",
                reason=RefusalReason.EVIDENCE_LOCKED,
            )

    def write(self, records: Sequence[Record], now: float) -> None:
        """Take records into their segments; one that fails does not hold up the others.

        Raises: NotWritten, with the records of those that failed. OSError, ConfigRefused: nothing is written.
        """
        self._own()
        newest = self._segment_for(now)
        parts: dict[Path, list[Record]] = defaultdict(list)
        for record in records:
            home = self._home.setdefault(record.request.key, newest)
            parts[home].append(record)
        failed: list[Record] = []
        reason: Exception | None = None
        for path, part in parts.items():
            try:
                self._write(path, part, now)
            except (sqlite3.Error, OSError, ConfigRefused) as error:
                failed += part
                reason = reason or error
        for record in records:
            if isinstance(record, Ended):
                self._home.pop(record.request.key, None)
        if reason is not None:
            raise NotWritten(failed) from reason

    def _write(self, path: Path, records: Sequence[Record], now: float) -> None:
        """Where a segment turns out to be damaged, the newest one takes them."""
        while True:
            try:
                self._writable(path).write(records)
                return
            except (sqlite3.Error, ConfigRefused) as error:
                if not self.damaged.record(path, error):
                    raise
            self._leave(path)
            path = self._segment_for(now)
            self._home |= {record.request.key: path for record in records}

    def prune(self, now: float) -> None:
        """Set aside what cannot be used, remove what is too old or too much, close what rests. What fails of it does
        not hold up the rest; the first failure is raised then.
        """
        self._own()
        failures: list[Exception] = []
        for work in (
            self._settle,
            functools.partial(self._prune_segments, now),
            functools.partial(self._prune_content, now),
            functools.partial(audit.checkpoint, self.folder),
        ):
            try:
                work()
            except (sqlite3.Error, OSError) as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _settle(self) -> None:
        for path in segments(self.folder):
            # One that is empty and not being made was cut to nothing.
            if path not in self._open and path != self._newest and path.is_file() and not path.stat().st_size:
                self.damaged.record(path, ValueError("it is empty"))
        for path in [path for path in self._open if path in self.damaged]:
            self._leave(path)
        self.damaged.settle()

    def _leave(self, path: Path) -> None:
        """Have nothing more to do with a segment that cannot be used."""
        if part := self._open.pop(path, None):
            with contextlib.suppress(sqlite3.Error):
                part.close()
        self._home = {key: home for key, home in self._home.items() if home != path}
        if path == self._newest:
            self._newest = None

    def _prune_content(self, now: float) -> None:
        sealed_files.prune(self.folder, self._retention.content_hours, now)

    def _prune_segments(self, now: float) -> None:
        paths = [path for path in aged(self.folder) if not path.is_dir()]
        # The newest grows by a sixteenth, and so may its log.
        room = self._retention.max_bytes * (SEGMENTS - 2) // SEGMENTS
        sizes = {path: size_bytes(path) for path in paths}
        total = sum(sizes.values()) - (sizes.get(self._newest, 0) if self._newest else 0)
        for path in paths:
            if path == self._newest:
                continue
            if _day_start(path) + self._retention.days * _DAY_SECONDS > now and total <= room:
                continue
            total -= sizes[path]
            self._remove(path)
        for key in list(self._home)[:-_REQUESTS_AT_HOME]:
            del self._home[key]
        resting = set(self._open) - set(self._home.values()) - {self._newest}
        for path in resting:
            part = self._open.pop(path)
            try:
                part.close()
            except sqlite3.Error as error:
                if not self.damaged.record(path, error):
                    raise

    def attach(self, asked: Asked, seal: Callable[[int], bytes], now: float) -> int:
        """Keep the content of the one request with one of these ids. Returns how many have it; unless 1, nothing is."""
        self._own()
        found = find(self.folder, asked, self.damaged)
        if len(found) == 1:
            sealed_files.put(self.folder, found[0].key, seal(found[0].key), now, self.damaged)
        return len(found)

    def sync(self) -> None:
        """Have the disk hold what was written: the death of the host costs nothing of it. Raises OSError."""
        self._own()
        for path in self._open:
            for part in segment.side_files(path):
                with contextlib.suppress(FileNotFoundError):
                    storage.sync_file(part)
        storage.sync_folder(self.folder)

    def close(self) -> None:
        """Leave each segment as one file."""
        for path, part in self._open.items():
            try:
                part.close()
            except sqlite3.Error as error:
                self.damaged.record(path, error)
        self._open.clear()
        with contextlib.suppress(OSError):
            self.damaged.settle()
        if self._lock is not None:
            self._lock.release()

    def _segment_for(self, now: float) -> Path:
        """The segment that new requests go to: of this day and watchlist, and not full."""
        day = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m-%d")
        if self._newest is None or self._newest in self.damaged or not self._newest.exists():
            self._newest = self._latest()
        if (
            self._newest is None
            or not self._newest.name.startswith(day)
            or size_bytes(self._newest) >= self._retention.max_bytes // SEGMENTS
        ):
            numbers = [int(match[2]) for match in map(_match, aged(self.folder)) if match[1] == day]
            self._newest = self.folder / f"{day}.{max(numbers, default=-1) + 1:04d}.evidence"
        return self._newest

    def _latest(self) -> Path | None:
        """The newest segment that can be used, where it is of this watchlist."""
        for path in reversed(segments(self.folder)):
            if path in self.damaged:
                continue
            try:
                return path if segment.watchlist_sha256(path) == self._watched.sha256 else None
            except (sqlite3.Error, ConfigRefused) as error:
                if not self.damaged.record(path, error):
                    raise
        return None

    def _writable(self, path: Path) -> Segment:
        if path in self._open and not path.exists():
            # Somebody removed it: what is written to it from here on would be found by nobody.
            with contextlib.suppress(sqlite3.Error):
                self._open.pop(path).close()
        if path not in self._open:
            self._open[path] = Segment(path, self._watched)
        return self._open[path]

    def _remove(self, path: Path) -> None:
        if part := self._open.pop(path, None):
            part.close()
        self._home = {key: home for key, home in self._home.items() if home != path}
        segment.remove(path)


def check_folder(folder: Path) -> None:
    """Raises ConfigRefused, "evidence_folder", for a folder that no collector wrote evidence to: whoever reads evidence
    notes it there, and nobody means to write into another folder."""
    found = "there is no such folder"
    if folder.is_dir():
        if (folder / audit.FILE_NAME).exists() or segments(folder) or damage.aside(folder):
            return
        found = "it holds no evidence and no audit log of it"
    raise ConfigRefused(
        f"evidence folder {folder}",
        found=found,
        instead="Give the folder that the collector was started with, --evidence.",
        reason=RefusalReason.EVIDENCE_FOLDER,
    )


def segments(folder: Path) -> list[Path]:
    """The segments of a folder, oldest first."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def aged(folder: Path) -> list[Path]:
    """The segments of a folder with those that were set aside, oldest first: retention is for all of them."""
    return sorted(path for path in folder.iterdir() if _AGED.fullmatch(path.name))


def size_bytes(path: Path) -> int:
    """Of a segment with its log; 0 for one that is not there."""
    total = 0
    for part in segment.side_files(path):
        with contextlib.suppress(FileNotFoundError):
            total += part.stat().st_size
    return total


def folder_bytes(folder: Path) -> int:
    """Of all segments."""
    return sum(map(size_bytes, aged(folder)))


def find(folder: Path, asked: Asked, damaged: Damaged | None = None) -> list[Match]:
    """The requests that have this id, of whatever kind, or one of these, but for those in damaged files; oldest first.
    See client_ids."""
    found: dict[int, Match] = {}
    damaged = damaged or Damaged(folder)
    for path in segments(folder):
        with _usable(path, damaged) as connection:
            if connection is not None:
                found |= {match.key: match for match in segment.find(connection, asked)}
    return [found[key] for key in sorted(found)]


def one_kind(found: Sequence[Match], name: str, kind: IdKind | None = None) -> IdKind:
    """As what `name` is the id of these requests, so that nothing is done to any that is not meant.

    Args:   kind: what the name is, where somebody said it.
    Raises: ConfigRefused "evidence_id_ambiguous": see client_ids.meant_kind.
    """
    chosen = kind or meant_kind((match.kinds, match.response_id) for match in found)
    if chosen is None:
        listed = ", ".join(f"{match.request_id} by {'/'.join(sorted(match.kinds))}" for match in found[:_LISTED])
        raise ConfigRefused(
            f"id {name[:MAX_ID_CHARACTERS]!r}",
            found=f"it is the id of {len(found)} different requests, and more than one may be meant: {listed}",
            instead="Say with --by, or by=, which kind of id it is, or give the response id or the engine's own.",
            reason=RefusalReason.EVIDENCE_ID_AMBIGUOUS,
        )
    return chosen


def erase(folder: Path, asked: Asked, damaged: Damaged | None = None) -> Erased:
    """Delete the requests that have this id or one of these, and leave no trace of them. No other is touched.

    Works beside a collector that writes to the folder. A request that still runs would be written again as it ends.
    Files that cannot be used are named: they may hold rows of the request, which only removing the file would delete.
    Raises: ConfigRefused as `one_kind`, where only a name is given.
    """
    if isinstance(asked, str):
        kind = one_kind(find(folder, asked, damaged), asked)
        asked = {kind: meanings(asked).get(kind, ())}
    total = NOTHING_ERASED
    damaged = damaged or Damaged(folder)
    for path in segments(folder):
        with _usable(path, damaged) as connection:
            if connection is not None and (keys := [match.key for match in segment.find(connection, asked)]):
                total += segment.erase(connection, path, keys)
                total += sealed_files.erase(folder, keys, damaged)
    # Named last: a file may have turned out to be damaged just now.
    return dataclasses.replace(total, clean=total.clean and not damaged.names, damaged=damaged.names)


@contextlib.contextmanager
def _usable(path: Path, damaged: Damaged) -> Iterator[sqlite3.Connection | None]:
    """A connection to a segment; None where it cannot be used, or went meanwhile."""
    if path in damaged:
        yield None
        return
    try:
        with contextlib.closing(segment.connect(path, "rw")) as connection:
            yield connection
    except (sqlite3.Error, ConfigRefused) as error:
        if path.exists() and not damaged.record(path, error):
            raise


def _match(path: Path) -> re.Match[str]:
    match = _AGED.fullmatch(path.name)
    assert match is not None
    return match


def _day_start(path: Path) -> float:
    day = datetime.datetime.strptime(_match(path)[1], "%Y-%m-%d").replace(tzinfo=datetime.UTC)
    return day.timestamp()


def _refused(folder: Path, found: str, instead: str) -> ConfigRefused:
    what = f"evidence folder {folder}"
    return ConfigRefused(what, found=found, instead=instead, reason=RefusalReason.EVIDENCE_FOLDER)


def _refuse(what: str, found: str, instead: str) -> ConfigRefused:
    return ConfigRefused(
        f"evidence retention by {what}", found=found, instead=instead, reason=RefusalReason.EVIDENCE_RETENTION
    )
