"""What can be read of a damaged segment goes into a segment of its own, and what cannot is counted.

Rows are read by their number from both ends, and around each place that cannot be read. A request, an exceedance or a
stretch of activations is taken whole or not at all; one without its request is left out, as nothing would find it.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from latentwatch import storage
from latentwatch.evidence import damage, segment
from latentwatch.evidence.damage import DAMAGED, SALVAGED

log = logging.getLogger(__name__)

_TABLES: Final = {"request": "key", "exceedance": "rowid", "activations": "rowid"}
_LAST: Final = (1 << 63) - 1
_READS: Final = 100_000
"""Attempts around places that cannot be read, per table."""


@dataclass(frozen=True)
class Repaired:
    """What became of one damaged file."""

    path: Path
    """The damaged file, under the name that it has now."""
    into: Path | None
    """The segment with what could be read; None where nothing could."""
    saved: dict[str, int]
    """Rows by table."""
    lost: dict[str, int | None]
    """Rows by table that could not be read, by the highest row number that was seen; None where nothing tells."""
    why: str
    """Why nothing could be read; empty where something could."""


def damaged_segments(folder: Path) -> list[Path]:
    """Segments that a collector set aside and nobody has repaired, oldest first."""
    return [path for path in damage.aside(folder) if ".evidence" in path.name and path.suffix == DAMAGED]


def check(path: Path) -> None:
    """Read all of a segment that nobody writes to. Raises: sqlite3.Error, ConfigRefused, ValueError: what is wrong."""
    with contextlib.closing(segment.connect(path, "ro")) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != segment.FORMAT:
            raise segment.wrong_format(path, version) if version else ValueError("it is empty")
        _described(connection)
        (said,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if said != "ok":
            raise ValueError(str(said))


def repair(path: Path) -> Repaired:
    """Save what can be read of a damaged segment as the next one of its day; the file is `.salvaged` then.

    Raises: sqlite3.Error, OSError: the new segment cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    segment.remove(partial)
    saved: dict[str, int] = {}
    lost: dict[str, int | None] = {}
    try:
        with contextlib.closing(segment.connect(path, "ro")) as source:
            about, features = _described(source)
            with contextlib.closing(segment.create(partial, segment.SCHEMA)) as target:
                target.executemany("INSERT INTO about VALUES (?, ?)", about)
                target.executemany("INSERT INTO feature VALUES (?, ?, ?, ?, ?, ?, ?, ?)", features)
                for table, number in _TABLES.items():
                    saved[table], lost[table] = _copy(source, target, table, number)
                target.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except _Unreadable as error:
        segment.remove(partial)
        return Repaired(path, None, {}, {}, str(error))
    except BaseException:
        segment.remove(partial)
        raise
    into = _placed(partial, path.name[: len("2026-11-22")])
    aside = path.with_name(path.name.removesuffix(DAMAGED) + SALVAGED)
    for side in (*damage.SIDE_FILES, ""):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + side).rename(aside.with_name(aside.name + side))
    storage.sync_folder(path.parent)
    return Repaired(aside, into, saved, lost, "")


class _Unreadable(ValueError):
    """Of a file of which not even the tables can be told."""


def _placed(partial: Path, day: str) -> Path:
    """Give a whole segment the next number of a day; a collector may take one meanwhile."""
    number = 0
    while True:
        into = partial.with_name(f"{day}.{number:04d}.evidence")
        taken = any(partial.parent.glob(f"{into.name}*"))
        with contextlib.suppress(FileExistsError):
            if not taken:
                into.hardlink_to(partial)
                partial.unlink()
                return into
        number += 1


def _described(source: sqlite3.Connection) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    try:
        about = [tuple(row) for row in source.execute("SELECT name, value FROM about")]
        features = [tuple(row) for row in source.execute("SELECT * FROM feature ORDER BY number")]
    except sqlite3.Error as error:
        raise _Unreadable(f"what its numbers mean cannot be read: {error}") from error
    if not about or not features:
        raise _Unreadable("it does not say what its numbers mean")
    return about, features


def _copy(source: sqlite3.Connection, target: sqlite3.Connection, table: str, number: str) -> tuple[int, int | None]:
    """Rows that were copied, and about how many were not."""
    columns = len(target.execute(f"SELECT * FROM {table} LIMIT 0").description)  # noqa: S608  # a name of ours
    insert = f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * columns)})"  # noqa: S608  # names of ours
    before = target.total_changes
    highest = 0
    target.execute("BEGIN IMMEDIATE")
    for place, row in _rows(source, table, number):
        highest = max(highest, place)
        known = table == "request" or target.execute("SELECT 1 FROM request WHERE key = ?", (row[0],)).fetchone()
        # What SQLite gives out of a damaged page may be of another type, or none of the constraints'.
        if known and len(row) == columns:
            with contextlib.suppress(sqlite3.IntegrityError):
                target.execute(insert, row)
    target.execute("COMMIT")
    copied = target.total_changes - before
    return copied, _count(source, table, copied) if table == "request" else max(0, highest - copied)


def _count(source: sqlite3.Connection, table: str, copied: int) -> int | None:
    """Rows that an index tells of beyond those that were copied; None where it cannot be read either."""
    try:
        (rows,) = source.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608  # a name of ours
    except sqlite3.Error:
        return None
    return max(0, int(rows) - copied)


def _rows(source: sqlite3.Connection, table: str, number: str) -> Iterator[tuple[int, tuple[object, ...]]]:
    """Every row that can be read, with its number: ascending and descending from each end of what was not read yet."""
    ranges, reads = [(-_LAST - 1, _LAST)], 0
    while ranges and reads < _READS:
        first, last = ranges.pop()
        edges = []
        for order, place in (("ASC", first), ("DESC", last)):
            reads += 1
            query = f"SELECT {number}, * FROM {table} WHERE {number} BETWEEN ? AND ? ORDER BY {number} {order}"  # noqa: S608  # names of ours
            try:
                for row in source.execute(query, (first, last)):
                    place = int(row[0])
                    yield place, tuple(row)[1:]
                    first, last = (place + 1, last) if order == "ASC" else (first, place - 1)
            except (sqlite3.Error, TypeError, ValueError):
                edges.append(place)
            else:
                break
        if len(edges) == 2 and first < last:
            middle = (first + last) // 2
            ranges += [(first, middle), (middle + 1, last)]
