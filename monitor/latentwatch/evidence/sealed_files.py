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

from latentwatch.evidence import segment
from latentwatch.evidence.segment import NOTHING_ERASED, Erased

_NAME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d)\.content")
_HOUR: Final = "%Y-%m-%dT%H"
_SCHEMA: Final = "CREATE TABLE content (request INTEGER PRIMARY KEY, sealed BLOB NOT NULL);"


def files(folder: Path) -> list[Path]:
    """The files of a folder, oldest first."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def put(folder: Path, request: int, sealed: bytes, now: float) -> None:
    """Keep the content of a request; what was kept of it in the same hour is replaced."""
    hour = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime(_HOUR)
    with contextlib.closing(segment.create(folder / f"{hour}.content", _SCHEMA)) as connection:
        connection.execute("INSERT OR REPLACE INTO content VALUES (?, ?)", (request, sealed))


def get(folder: Path, request: int) -> bytes | None:
    """The sealed content of a request, the latest; None where there is none."""
    for path in reversed(files(folder)):
        try:
            connection = segment.connect(path, "ro")
        except sqlite3.OperationalError:
            continue  # it went since it was listed
        with contextlib.closing(connection):
            row = connection.execute("SELECT sealed FROM content WHERE request = ?", (request,)).fetchone()
        if row:
            return bytes(row[0])
    return None


def erase(folder: Path, requests: Sequence[int]) -> Erased:
    """Delete the content of requests, and leave no trace of it."""
    total = NOTHING_ERASED
    for path in files(folder):
        with contextlib.closing(segment.connect(path, "rw")) as connection:
            traces = [sealed for request in requests for sealed in _delete(connection, request)]
            if traces:
                rewritten, clean = segment.wipe(connection, path, {sealed[:64] for sealed in traces})
                total += Erased(0, len(traces), int(rewritten), clean)
    return total


def prune(folder: Path, hours: float, now: float) -> None:
    """Remove what is older than so many hours."""
    for path in files(folder):
        match = _NAME.fullmatch(path.name)
        assert match is not None
        began = datetime.datetime.strptime(match[1], _HOUR).replace(tzinfo=datetime.UTC).timestamp()
        if began + hours * 3600 <= now:
            segment.remove(path)


def _delete(connection: sqlite3.Connection, request: int) -> list[bytes]:
    rows = connection.execute("DELETE FROM content WHERE request = ? RETURNING sealed", (request,)).fetchall()
    return [bytes(sealed) for (sealed,) in rows]
