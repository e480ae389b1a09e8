"""Sealed content of requests, in one SQLite file an hour (UTC), so that it can go sooner than the rest.

    2026-11-22T05.content

A file goes as a whole when its hour began longer ago than the bound: nothing is older than that.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from latentwatch.errors import ConfigRefused
from latentwatch.evidence import segment
from latentwatch.evidence.damage import Damaged
from latentwatch.evidence.segment import NOTHING_ERASED, Erased

_NAME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d)\.content")
_AGED: Final = re.compile(rf"{_NAME.pattern}((\.\d+)?\.damaged)?")
_HOUR: Final = "%Y-%m-%dT%H"
_SCHEMA: Final = "CREATE TABLE content (request INTEGER PRIMARY KEY, sealed BLOB NOT NULL);"


def files(folder: Path) -> list[Path]:
    """The files of a folder, oldest first."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def put(folder: Path, request: int, sealed: bytes, now: float, damaged: Damaged | None = None) -> None:
    """Keep the content of a request; what was kept of it in the same hour is replaced. For the one writer."""
    hour = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime(_HOUR)
    path, damaged = folder / f"{hour}.content", damaged or Damaged(folder)
    try:
        _put(path, request, sealed)
    except (sqlite3.Error, ConfigRefused) as error:
        if not damaged.record(path, error):
            raise
        damaged.settle()
        _put(path, request, sealed)


def get(folder: Path, request: int, damaged: Damaged | None = None) -> bytes | None:
    """The sealed content of a request, the latest; None where there is none in a file that can be used."""
    damaged = damaged or Damaged(folder)
    for path in reversed(files(folder)):
        try:
            with contextlib.closing(segment.connect(path, "ro")) as connection:
                row = connection.execute("SELECT sealed FROM content WHERE request = ?", (request,)).fetchone()
        except sqlite3.Error as error:
            if path.exists() and not damaged.record(path, error):
                raise
            continue
        if row:
            return bytes(row[0])
    return None


def erase(folder: Path, requests: Sequence[int], damaged: Damaged | None = None) -> Erased:
    """Delete the content of requests, and leave no trace of it in files that can be used."""
    total, damaged = NOTHING_ERASED, damaged or Damaged(folder)
    for path in files(folder):
        try:
            with contextlib.closing(segment.connect(path, "rw")) as connection:
                traces = [sealed for request in requests for sealed in _delete(connection, request)]
                if traces:
                    rewritten, clean = segment.wipe(connection, path, {sealed[:64] for sealed in traces})
                    total += Erased(0, len(traces), int(rewritten), clean)
        except sqlite3.Error as error:
            if path.exists() and not damaged.record(path, error):
                raise
    return total


def prune(folder: Path, hours: float, now: float) -> None:
    """Remove what is older than so many hours."""
    for path in folder.iterdir():
        match = _AGED.fullmatch(path.name)
        if match is None or path.is_dir():
            continue
        began = datetime.datetime.strptime(match[1], _HOUR).replace(tzinfo=datetime.UTC).timestamp()
        if began + hours * 3600 <= now:
            segment.remove(path)


def _put(path: Path, request: int, sealed: bytes) -> None:
    with contextlib.closing(segment.create(path, _SCHEMA)) as connection:
        connection.execute("INSERT OR REPLACE INTO content VALUES (?, ?)", (request, sealed))


def _delete(connection: sqlite3.Connection, request: int) -> list[bytes]:
    rows = connection.execute("DELETE FROM content WHERE request = ? RETURNING sealed", (request,)).fetchall()
    return [bytes(sealed) for (sealed,) in rows]
