"""Who read or deleted what: one SQLite file beside the segments. One thread at a time.

A request is named by the SHA-256 of its id, so that an auditor can ask "was this one read?", while the entry gives
nothing away of a request that was deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from latentwatch.errors import ConfigRefused
from latentwatch.evidence import segment
from latentwatch.evidence.damage import Damaged, set_aside

FILE_NAME: Final = "audit.sqlite"
_RETENTION_SECONDS: Final = 400 * 86_400.0
"""Thirteen months: a yearly audit sees the whole year."""
_INSERT: Final = "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?)"
_SCHEMA: Final = """
CREATE TABLE entry (seconds REAL NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
  subject_sha256 TEXT NOT NULL, found INTEGER NOT NULL);
CREATE INDEX entry_by_subject ON entry (subject_sha256);
"""


@dataclass(frozen=True)
class Entry:
    """One read or deletion."""

    seconds: float
    actor: str
    action: str
    subject: str
    """What was asked for; empty where that names a request."""
    subject_sha256: str
    """SHA-256 of the request id that was asked for; empty where none was."""
    found: int
    """Rows or requests given out or deleted."""


class Audit:
    """The log of a folder."""

    def __init__(self, folder: Path, damaged: Damaged | None = None) -> None:
        """A log that cannot be read is set aside, and a new one begun.

        Raises: sqlite3.Error: the folder cannot be written. Evidence is then not to be read either.
        """
        self._path = folder / FILE_NAME
        self._damaged = damaged or Damaged(folder)
        self._connection = self._open()

    def add(self, now: float, actor: str, action: str, found: int, *, subject: str = "", request: str = "") -> None:
        """Write an entry, before the answer is given. Raises: sqlite3.Error."""
        row = (now, actor, action, subject, _digest(request) if request else "", found)
        try:
            self._connection.execute(_INSERT, row)
        except sqlite3.Error as error:
            # A table that is missing now and was there before is somebody's doing: that one is refused until a start.
            if error.sqlite_errorcode == sqlite3.SQLITE_ERROR or not self._damaged.record(self._path, error):
                raise
            self._connection.close()
            self._connection = self._open()
            self._connection.execute(_INSERT, row)

    def entries(self, *, request: str = "") -> Iterator[Entry]:
        """Latest first; only those about this request id, where one is given."""
        where, values = ("WHERE subject_sha256 = ?", (_digest(request),)) if request else ("", ())
        query = f"SELECT * FROM entry {where} ORDER BY rowid DESC"  # noqa: S608
        for row in self._connection.execute(query, values):
            yield Entry(*row)

    def prune(self, now: float) -> None:
        """Remove entries that are older than thirteen months."""
        self._connection.execute("DELETE FROM entry WHERE seconds < ?", (now - _RETENTION_SECONDS,))

    def close(self) -> None:
        self._connection.close()

    def _open(self) -> sqlite3.Connection:
        if self._path in self._damaged:
            set_aside(self._path)
        try:
            connection = _opened(self._path)
        except (sqlite3.Error, ConfigRefused) as error:
            if not self._damaged.record(self._path, error):
                raise
            set_aside(self._path)
            connection = _opened(self._path)
        return connection


def _opened(path: Path) -> sqlite3.Connection:
    connection = segment.create(path, _SCHEMA)
    try:
        connection.execute("SELECT max(seconds) FROM entry WHERE subject_sha256 = ''").fetchone()
        # See `checkpoint`: an answer does not wait for a sync of the disk.
        connection.execute("PRAGMA wal_autocheckpoint = 0")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def checkpoint(folder: Path) -> None:
    """Put the log into its file, from the thread that writes beside those that read. Raises: sqlite3.Error."""
    if (folder / f"{FILE_NAME}-wal").exists():
        with contextlib.closing(segment.connect(folder / FILE_NAME, "rw")) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


def _digest(request: str) -> str:
    return hashlib.sha256(request.encode("utf-8", "replace")).hexdigest()
