"""One SQLite file of evidence: its tables, and how rows get in and out without leaving a trace.

A segment holds requests of one watchlist that were first written on one day (UTC). Deleted content is overwritten with
zeros (secure_delete), the write-ahead log is truncated, and free pages are given back. SQLite may leave a copy of a row
behind when it moves cells between pages; so `erase` reads the file for what it deleted and rewrites it if anything is
still there. The file system's own copies (snapshots, a drive's spare blocks) are beyond its reach.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np

from latentwatch.arrays import Array, Dtype
from latentwatch.client_ids import Asked, IdKind, kinds_of, meanings_of
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.evidence.records import Activations, Ended, Exceeded, Record, RecordedRequest
from latentwatch.names import TokenState, trace_id

FORMAT: Final = 1
BUSY_SECONDS = 10.0
"""How long to wait for other connections: a writer's transaction, or a reader of an older state at a deletion."""
_WAL_LIMIT_BYTES: Final = 16 << 20
_CACHE_KIB: Final = 32 << 10
"""Of a segment that is written: ids are random, so that every page of their indexes is written again and again."""
_TRACE_BYTES: Final = 64
"""Of a blob, what is looked for after its deletion; its first bytes lie in one page."""
_SHORTEST_TRACE_BYTES: Final = 8
"""A shorter request id may well stand in the file by chance, and would have it rewritten at every deletion."""

SCHEMA: Final = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE feature (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL, label TEXT NOT NULL, severity TEXT NOT NULL, hook_point TEXT NOT NULL,
  units TEXT NOT NULL, dense INTEGER NOT NULL, lim REAL
);
CREATE TABLE request (
  key INTEGER PRIMARY KEY, request_id TEXT NOT NULL, response_id TEXT NOT NULL, trace_id TEXT NOT NULL,
  replica TEXT NOT NULL, model_name TEXT NOT NULL, engine TEXT NOT NULL, adapter TEXT NOT NULL,
  opened_seconds REAL NOT NULL, opening_seen INTEGER NOT NULL, closed_seconds REAL, outcome INTEGER,
  prompt_tokens INTEGER, output_tokens INTEGER, total_tokens INTEGER,
  scored INTEGER, inherited INTEGER, unseen INTEGER, dropped INTEGER,
  exceeded_features INTEGER, features BLOB, features_left_out INTEGER, activations_lost INTEGER
);
CREATE INDEX request_by_request_id ON request (request_id);
CREATE INDEX request_by_response_id ON request (response_id);
CREATE INDEX request_by_trace_id ON request (trace_id) WHERE trace_id != '';
CREATE TABLE exceedance (
  request INTEGER NOT NULL, feature INTEGER NOT NULL, seconds REAL NOT NULL,
  position INTEGER NOT NULL, phase INTEGER NOT NULL, value REAL NOT NULL
);
CREATE UNIQUE INDEX exceedance_by_request ON exceedance (request, feature);
CREATE INDEX exceedance_by_feature ON exceedance (feature, seconds);
CREATE INDEX exceedance_by_time ON exceedance (seconds);
CREATE TABLE activations (request INTEGER NOT NULL, fires BLOB NOT NULL, rows BLOB NOT NULL);
CREATE INDEX activations_by_request ON activations (request);
"""
_TOLD: Final = "response_ids_told"
"""What stands in `about` where response ids are those that servers told; before, they were guessed from request ids."""
_REQUEST_COLUMNS: Final = (
    "key, request_id, response_id, trace_id, replica, model_name, engine, adapter, opened_seconds, opening_seen"
)
_END_COLUMNS: Final = (
    "closed_seconds, outcome, prompt_tokens, output_tokens, total_tokens, scored, inherited, unseen, dropped, "
    "exceeded_features, features, features_left_out, activations_lost"
)
_INSERT_REQUEST: Final = f"INSERT OR IGNORE INTO request ({_REQUEST_COLUMNS}) VALUES ({', '.join('?' * 10)})"  # noqa: S608
_INSERT_END: Final = (
    f"INSERT OR REPLACE INTO request ({_REQUEST_COLUMNS}, {_END_COLUMNS}) VALUES ({', '.join('?' * 23)})"  # noqa: S608
)
_INSERT_EXCEEDANCE: Final = "INSERT OR IGNORE INTO exceedance VALUES (?, ?, ?, ?, ?, ?)"
_INSERT_ACTIVATIONS: Final = "INSERT INTO activations VALUES (?, ?, ?)"


@dataclass(frozen=True)
class WatchedFeature:
    """What a segment says of a feature, so that it can be read without the watchlist."""

    number: int
    id: str
    label: str
    severity: str
    hook_point: str
    units: str
    dense: bool
    limit: float | None


@dataclass(frozen=True)
class Watched:
    """The watchlist that a segment's numbers refer to."""

    name: str
    sha256: str
    features: tuple[WatchedFeature, ...]


@dataclass(frozen=True)
class Erased:
    """What a deletion did."""

    requests: int
    rows: int
    """Over all tables, the requests' own rows included."""
    rewritten_files: int
    """Files that were rewritten whole, because a copy of a deleted row was left in a free part of a page."""
    clean: bool
    """False when a reader kept an older state alive for so long that the write-ahead log could not be truncated, or
    where files cannot be used."""
    damaged: tuple[str, ...] = ()
    """Names of files that cannot be used, and may hold rows of anybody."""

    def __add__(self, other: Erased) -> Erased:
        return Erased(
            self.requests + other.requests,
            self.rows + other.rows,
            self.rewritten_files + other.rewritten_files,
            self.clean and other.clean,
        )


class SegmentDamaged(sqlite3.DatabaseError):
    """A file that SQLite can read holds a row that nobody here wrote: as good as a corrupt file."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


NOTHING_ERASED: Final = Erased(0, 0, 0, True)


def connect(path: Path, mode: Literal["ro", "rw", "rwc"]) -> sqlite3.Connection:
    """A connection for use in one thread at a time. Raises: sqlite3.Error."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(
        uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
    )
    connection.execute("PRAGMA secure_delete = ON")
    connection.row_factory = sqlite3.Row
    return connection


def create(path: Path, schema: str) -> sqlite3.Connection:
    """A new file with these tables, or the one that is there. Raises: ConfigRefused, sqlite3.Error."""
    connection = connect(path, "rwc")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        path.chmod(0o600)
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(f"BEGIN; {schema} PRAGMA user_version = {FORMAT}; COMMIT;")
    elif version != FORMAT:
        connection.close()
        raise wrong_format(path, version)
    # The log is synced at checkpoints: a power cut may cost the last second, a killed process costs nothing.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
    return connection


def watchlist_sha256(path: Path) -> str:
    """Which watchlist a segment's numbers refer to; empty for a file that is not to be continued, since it has no say
    or its response ids are guesses. Raises: sqlite3.Error."""
    with contextlib.closing(connect(path, "rw")) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'about'").fetchone():
            return ""
        about = dict(connection.execute("SELECT name, value FROM about"))
        return str(about.get("watchlist_sha256", "")) if _TOLD in about else ""


def side_files(path: Path) -> tuple[Path, ...]:
    """A file with its log and the index of that log."""
    return tuple(path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm"))


def remove(path: Path) -> None:
    """Remove a file with what belongs to it: first its log, which without it nothing would find again."""
    for part in reversed(side_files(path)):
        part.unlink(missing_ok=True)


def wrong_format(path: Path, version: int) -> ConfigRefused:
    """The refusal of a file that another version wrote."""
    return ConfigRefused(
        f"evidence file {path}",
        found=f"it has format {version}, this version reads {FORMAT}",
        instead="Read it with the latentwatch version that wrote it, or move it away.",
        reason=RefusalReason.EVIDENCE_FORMAT,
    )


class Segment:
    """A segment that is written. One thread at a time."""

    def __init__(self, path: Path, watched: Watched) -> None:
        self.path = path
        self._connection = create(path, SCHEMA)
        self._connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        if not self._connection.execute("SELECT 1 FROM about").fetchone():
            self._describe(watched)

    def _describe(self, watched: Watched) -> None:
        with _transaction(self._connection) as connection:
            connection.executemany(
                "INSERT INTO about VALUES (?, ?)",
                (("watchlist", watched.name), ("watchlist_sha256", watched.sha256), (_TOLD, "1")),
            )
            connection.executemany(
                "INSERT INTO feature VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (f.number, f.id, f.label, f.severity, f.hook_point, f.units, f.dense, f.limit)
                    for f in watched.features
                ],
            )

    def write(self, records: Sequence[Record]) -> None:
        """All records or none; one that is here already changes nothing. Raises: sqlite3.Error."""
        ended = {record.request.key for record in records if isinstance(record, Ended)}
        requests = {record.request.key: record.request for record in records if record.request.key not in ended}
        exceedances, activations, ends = [], [], []
        for record in records:
            match record:
                case Exceeded(request, found):
                    exceedances.append(
                        (request.key, found.feature, found.seconds, found.position, found.phase, found.value)
                    )
                case Activations(request, fires_N, rows_R):
                    activations.append((request.key, pack(fires_N), pack(rows_R)))
                case Ended():
                    ends.append(_end_row(record))
        with _transaction(self._connection) as connection:
            connection.executemany(_INSERT_REQUEST, map(_request_row, requests.values()))
            connection.executemany(_INSERT_EXCEEDANCE, exceedances)
            connection.executemany(_INSERT_ACTIVATIONS, activations)
            connection.executemany(_INSERT_END, ends)

    def close(self) -> None:
        """Put everything into the main file, so that the segment is one file at rest."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()


def erase(connection: sqlite3.Connection, path: Path, keys: Sequence[int]) -> Erased:
    """Delete requests with everything that belongs to them, and leave no trace in the files of this segment."""
    traces: set[bytes] = set()
    rows = 0
    with _transaction(connection):
        for key in keys:
            traces |= _traces(connection, key)
            for table, column in (("exceedance", "request"), ("activations", "request"), ("request", "key")):
                rows += connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (key,)).rowcount  # noqa: S608
    rewritten, clean = wipe(connection, path, traces)
    return Erased(len(keys), rows, int(rewritten), clean)


class Match(NamedTuple):
    """A request that was found by an id."""

    key: int
    request_id: str
    response_id: str
    kinds: frozenset[IdKind]
    """As what the id is its own."""


def find(connection: sqlite3.Connection, asked: Asked) -> list[Match]:
    """The requests that have this id, of whatever kind, or one of these; newest first. See client_ids."""
    meant = meanings_of(asked)
    ids = list(dict.fromkeys(id for each in meant.values() for id in each if id))
    if not ids:
        return []
    marks = ", ".join(f"?{place}" for place in range(1, len(ids) + 1))
    columns = "SELECT key, request_id, response_id, trace_id FROM request WHERE"
    rows = connection.execute(
        f"{columns} request_id IN ({marks}) UNION {columns} response_id IN ({marks}) "
        f"UNION {columns} trace_id IN ({marks}) AND trace_id != '' ORDER BY key DESC",
        ids,
    )
    told = connection.execute("SELECT 1 FROM about WHERE name = ?", (_TOLD,)).fetchone() is not None
    matches = []
    for key, request_id, response_id, trace in rows.fetchall():
        known = response_id if told or _is_sure(request_id, response_id) else ""
        if kinds := kinds_of(meant, response=known, request=request_id, trace=trace):
            matches.append(Match(key, request_id, response_id, frozenset(kinds)))
    return matches


_ENGINE_SUFFIX: Final = re.compile(r"(-\d+)?-[0-9a-f]{8}")


def _is_sure(request_id: str, response_id: str) -> bool:
    """Whether a response id that an earlier version guessed leaves nothing of the engine's id unexplained.

    It also left out what looked like the number of a part, `_42`, and that may have been the client's.
    """
    _, found, rest = request_id.partition(response_id)
    return bool(found) and (not rest or _ENGINE_SUFFIX.fullmatch(rest) is not None)


def pack(records: Array) -> bytes:
    """Records as compressed bytes; column after column, since a column's bytes are alike."""
    columns = [np.ascontiguousarray(records[name]).tobytes() for name in records.dtype.names or ()]
    return zlib.compress(json.dumps(len(records)).encode() + b"\n" + b"".join(columns), 1)


def unpack(data: bytes, dtype: Dtype) -> Array:
    """What `pack` packed. Raises ValueError, zlib.error."""
    head, _, body = zlib.decompress(data).partition(b"\n")
    if int(head) * dtype.itemsize != len(body):
        raise ValueError(f"{len(body)} bytes are not {int(head)} records of {dtype.itemsize}")
    records = np.empty(int(head), dtype)
    at = 0
    for name in dtype.names or ():
        column = records[name]
        if column.size:
            records[name] = np.frombuffer(body, column.dtype, column.size, at).reshape(column.shape)
        at += column.nbytes
    return records


def wipe(connection: sqlite3.Connection, path: Path, traces: Iterable[bytes]) -> tuple[bool, bool]:
    """After a deletion: give pages back, empty the log, and rewrite the file if a trace is still in it.

    Returns: whether the file was rewritten, and whether log and file are clean.
    """
    connection.execute("PRAGMA incremental_vacuum").fetchall()
    clean = _truncate_log(connection)
    if not clean or not _holds_any(path, traces):
        return False, clean
    connection.execute("VACUUM")
    return True, _truncate_log(connection)


def _truncate_log(connection: sqlite3.Connection) -> bool:
    """Empty the write-ahead log; waits up to BUSY_SECONDS for readers of an older state."""
    (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


def _holds_any(path: Path, traces: Iterable[bytes]) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(trace) >= 0 for trace in traces)


def _traces(connection: sqlite3.Connection, key: int) -> set[bytes]:
    """Bytes that belong to this request alone."""
    ids = connection.execute("SELECT request_id FROM request WHERE key = ?", (key,))
    blobs = connection.execute("SELECT fires, rows FROM activations WHERE request = ?", (key,))
    found = {request_id.encode() for (request_id,) in ids if len(request_id) >= _SHORTEST_TRACE_BYTES}
    # A blob shorter than that says little, and other requests may have the same one.
    return found | {blob[:_TRACE_BYTES] for row in blobs for blob in row if len(blob) >= _TRACE_BYTES}


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """BEGIN IMMEDIATE to COMMIT, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _request_row(request: RecordedRequest) -> tuple[object, ...]:
    info = request.info
    return (
        request.key,
        info.request_id,
        info.response_id or info.request_id,
        trace_id(info.traceparent),
        info.replica,
        info.model_name,
        info.engine,
        info.adapter,
        info.opened_seconds,
        info.opening_seen,
    )


def _end_row(end: Ended) -> tuple[object, ...]:
    progress = end.progress
    return (
        *_request_row(end.request),
        progress.closed_seconds,
        progress.outcome,
        end.request.info.prompt_tokens,
        progress.output_tokens,
        progress.total_tokens,
        *progress.tokens[list(TokenState)].tolist(),
        end.features.exceeded,
        pack(end.features.rows),
        end.features.left_out,
        end.activations_lost,
    )
