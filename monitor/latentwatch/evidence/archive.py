"""Reading a folder of evidence, beside a running collector or without one. One thread at a time."""

from __future__ import annotations

import contextlib
import heapq
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np

from latentwatch.client_ids import Asked
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.evidence import segment
from latentwatch.evidence.damage import Damaged
from latentwatch.evidence.records import FIRE_RECORD, Ended, RecordedRequest, row_record
from latentwatch.evidence.segment import Watched, WatchedFeature
from latentwatch.evidence.store import segments
from latentwatch.facts import (
    FEATURE_STAT,
    Exceedance,
    FeatureSummary,
    RequestInfo,
    RequestProgress,
    ShownExceedance,
    ShownFeature,
    ShownRequest,
    shown_exceedance,
    shown_features,
    shown_request,
)
from latentwatch.names import Outcome, Phase, TokenState

_REQUEST: Final = "SELECT * FROM request WHERE key = ?"
_ENDED: Final = "SELECT * FROM request WHERE model_name = ? AND outcome IS NOT NULL ORDER BY closed_seconds"
_INFO: Final = (
    "request_id",
    "response_id",
    "replica",
    "model_name",
    "engine",
    "opened_seconds",
    "adapter",
    "prompt_tokens",
)
_EXCEEDANCE: Final = """
SELECT r.request_id, r.response_id, r.trace_id, r.replica, r.model_name, r.engine, r.adapter, r.opened_seconds,
  r.opening_seen, r.prompt_tokens, e.feature, e.seconds, e.position, e.phase, e.value
FROM exceedance e JOIN request r ON r.key = e.request
"""
_CLOCK_TICK_NS: Final = 100_000_000
"""More than the resolution of a file system's times: two changes this close may bear the same one."""


@dataclass(frozen=True)
class Wanted:
    """Which exceedances; None for any."""

    feature: str | None = None
    severity: str | None = None
    model_name: str | None = None
    since_seconds: float | None = None
    until_seconds: float | None = None


@dataclass(frozen=True)
class StoredActivations:
    """What is kept of one feature over the positions of a request, by position."""

    feature: str
    label: str
    severity: str
    units: str
    limit: float | None
    dense: bool
    """A score for every token; otherwise a position that is not listed had no activation."""
    positions: list[int]
    values: list[float]


@dataclass(frozen=True)
class StoredRequest(ShownRequest):
    """One request, as the evidence knows it. Its tokens are empty until it ended."""

    key: int
    watchlist: str
    watchlist_sha256: str
    exceedances: tuple[ShownExceedance, ...]
    features: tuple[ShownFeature, ...]
    """Of a request that ended: exceeded ones first, then by closeness to the limit."""
    features_left_out: int
    activations: tuple[StoredActivations, ...]
    """Features that showed anything, those that exceeded their limit first."""
    activations_lost: int
    """Activations before the first exceedance that were not kept."""


T = TypeVar("T")
_UNREADABLE: Final = (
    sqlite3.Error,
    ConfigRefused,
    zlib.error,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
)
"""What reading a damaged file may raise, as far as its rows are unfolded here."""
_PAUSES_SECONDS: Final = (0.01, 0.1, 1.0)
"""Between attempts to open a segment whose files are just coming or going."""


class Archive:
    """A folder of evidence, read only."""

    def __init__(self, folder: Path, damaged: Damaged | None = None) -> None:
        """Args: damaged: what is known of the folder's files. Raises: ConfigRefused: there is no such folder."""
        if not folder.is_dir():
            raise ConfigRefused(
                f"evidence folder {folder}",
                found="there is no such folder",
                instead="Give the folder that the collector was started with, --evidence.",
                reason=RefusalReason.EVIDENCE_FOLDER,
            )
        self.folder = folder
        self.damaged = damaged or Damaged(folder)
        self._alone = damaged is None
        """Without a collector beside it that has set aside what it cannot use, and would go on."""
        self._readers: dict[Path, _Reader] = {}
        self._paths: list[Path] = []
        self._listed_at_ns = 0
        """The folder's time of change when `_paths` was read from it; 0 for read it again."""

    def find(self, asked: Asked) -> list[StoredRequest]:
        """Requests that have this id, of whatever kind, or one of these; newest first. See client_ids."""
        return [*self._each(lambda reader: [reader.request(key) for key in reader.find(asked)])]

    def exceedances(self, wanted: Wanted, limit: int) -> list[ShownExceedance]:
        """The latest exceedances of this kind, newest first."""
        found = self._each(lambda reader: reader.exceedances(wanted, limit))
        # A request that runs past midnight stays in its first segment, so segments overlap in time.
        return sorted(found, key=lambda exceedance: -exceedance.seconds)[:limit]

    def requests(self) -> Iterator[StoredRequest]:
        """Every request, oldest first."""
        for reader in reversed(self._newest_first()):
            yield from self._guarded(reader, _requests)

    def ended(self, model_name: str) -> Iterator[Ended]:
        """Every request of this model that ended, in the order of their ends."""
        # A request that runs past midnight stays in its first segment, so segments overlap in time.
        each = (self._guarded(reader, lambda reader: reader.ended(model_name)) for reader in self._newest_first())
        return heapq.merge(*each, key=lambda ended: ended.progress.closed_seconds)

    def watchlists(self) -> set[str]:
        """SHA-256 of every watchlist that something here was seen with."""
        return {reader.watchlist_sha256 for reader in self._newest_first()}

    def feature_ids(self) -> set[str]:
        """Ids of every feature that something here was watched for."""
        return {id for reader in self._newest_first() for id in reader.feature_ids}

    def model_names(self) -> set[str]:
        """Every served model name that a request here has."""
        return set(self._each(lambda reader: reader.model_names()))

    def close(self) -> None:
        """Close every file."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _each(self, work: Callable[[_Reader], Iterable[T]]) -> Iterator[T]:
        """What is found in each segment; one that cannot be read is noted and left out, whole."""
        for reader in self._newest_first():
            yield from list(self._guarded(reader, work))

    def _guarded(self, reader: _Reader, work: Callable[[_Reader], Iterable[T]]) -> Iterator[T]:
        try:
            yield from work(reader)
        except _UNREADABLE as error:
            if not self.damaged.record(reader.path, error):
                raise
            self._readers.pop(reader.path, None)
            reader.close()

    def _newest_first(self) -> list[_Reader]:
        self._list_segments()
        for path in self._paths:
            if path not in self._readers and path not in self.damaged:
                try:
                    reader = _Reader.open(path)
                except _UNREADABLE as error:
                    only = self._alone and len(self._paths) == 1 and isinstance(error, ConfigRefused)
                    if only or not self.damaged.record(path, error):
                        raise
                    continue
                if reader is not None:
                    self._readers[path] = reader
        return [self._readers[path] for path in reversed(self._paths) if path in self._readers]

    def _list_segments(self) -> None:
        """Only where the folder changed: each entry read is a chance for a busy thread to take the interpreter."""
        changed_ns = self.folder.stat().st_mtime_ns
        if changed_ns == self._listed_at_ns:
            return
        self._paths = segments(self.folder)
        self._listed_at_ns = changed_ns if time.time_ns() - changed_ns > _CLOCK_TICK_NS else 0
        for path in set(self._readers) - set(self._paths):
            self._readers.pop(path).close()


@contextlib.contextmanager
def _as_written(path: str) -> Iterator[None]:
    """Raises SegmentDamaged for what is in a row and cannot be what a collector wrote."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, MemoryError, zlib.error) as error:
        found = f"{type(error).__name__}: {str(error)[:160]}"
        raise segment.SegmentDamaged(f"{path} holds a row that no collector wrote ({found})") from error


class _Reader:
    """One segment."""

    def __init__(self, path: Path, connection: sqlite3.Connection, watched: Watched) -> None:
        self.path = path
        self._connection = connection
        self._watched = watched
        self._dense = np.array([f.number for f in watched.features if f.dense], np.int64)
        self._limits = [feature.limit for feature in watched.features]

    @classmethod
    def open(cls, path: Path) -> _Reader | None:
        """None for a segment that is just being made or removed.

        Raises: ConfigRefused "evidence_format", sqlite3.Error.

        While its files come or go one by one, SQLite answers with an I/O error; that passes, a broken disk's stays.
        """
        for pause_seconds in _PAUSES_SECONDS:
            try:
                return cls._open(path)
            except sqlite3.OperationalError:
                if not path.exists():
                    return None
            time.sleep(pause_seconds)
        return cls._open(path)

    @classmethod
    def _open(cls, path: Path) -> _Reader | None:
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(contextlib.closing(segment.connect(path, "ro")))
            with _as_written(path.name):
                watched = cls._about(connection, path)
            if watched is None:
                return None
            undo.pop_all()
            return cls(path, connection, watched)

    @staticmethod
    def _about(connection: sqlite3.Connection, path: Path) -> Watched | None:
        """What the numbers in a segment mean; None where it does not say yet."""
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, segment.FORMAT):
            raise segment.wrong_format(path, version)
        about = dict(connection.execute("SELECT name, value FROM about")) if version else {}
        if not about:
            return None
        rows = connection.execute(
            "SELECT number, id, label, severity, hook_point, units, dense, lim FROM feature ORDER BY number"
        )
        features = tuple(
            WatchedFeature(number, id, label, severity, hook_point, units, bool(dense), limit)
            for number, id, label, severity, hook_point, units, dense, limit in rows
        )
        return Watched(about["watchlist"], about["watchlist_sha256"], features)

    def close(self) -> None:
        self._connection.close()

    @property
    def feature_ids(self) -> list[str]:
        """Of every feature that it was watched for."""
        return [feature.id for feature in self._watched.features]

    def model_names(self) -> list[str]:
        """Served model names of its requests."""
        return [str(name) for (name,) in self._connection.execute("SELECT DISTINCT model_name FROM request")]

    @property
    def watchlist_sha256(self) -> str:
        return self._watched.sha256

    def find(self, asked: Asked) -> list[int]:
        return [match.key for match in segment.find(self._connection, asked)]

    def ended(self, model_name: str) -> Iterator[Ended]:
        for row in self._connection.execute(_ENDED, (model_name,)):
            with _as_written(self.path.name):
                request = RecordedRequest(row["key"], _info(row))
                ended = Ended(request, _progress(row), _features(row), row["activations_lost"])
            yield ended

    def all(self) -> list[int]:
        return [key for (key,) in self._connection.execute("SELECT key FROM request ORDER BY key")]

    def exceedances(self, wanted: Wanted, limit: int) -> list[ShownExceedance]:
        where, values = ["1"], list[Any]()
        if wanted.feature is not None or wanted.severity is not None:
            numbers = [
                str(f.number)
                for f in self._watched.features
                if wanted.feature in (None, f.id) and wanted.severity in (None, f.severity)
            ]
            where.append(f"e.feature IN ({', '.join(numbers)})")
        for condition, value in (
            ("r.model_name = ?", wanted.model_name),
            ("e.seconds >= ?", wanted.since_seconds),
            ("e.seconds < ?", wanted.until_seconds),
        ):
            if value is not None:
                where.append(condition)
                values.append(value)
        rows = self._connection.execute(
            f"{_EXCEEDANCE} WHERE {' AND '.join(where)} ORDER BY e.seconds DESC LIMIT ?", (*values, limit)
        )
        with _as_written(self.path.name):
            return [self._exceedance(row) for row in rows]

    def request(self, key: int) -> StoredRequest:
        """What is kept of it. Raises sqlite3.Error."""
        with _as_written(self.path.name):
            return self._request(key)

    def _request(self, key: int) -> StoredRequest:
        row = self._connection.execute(_REQUEST, (key,)).fetchone()
        ended = row["outcome"] is not None
        shown = shown_request(_info(row), _progress(row), trace=row["trace_id"])
        found = self._connection.execute(f"{_EXCEEDANCE} WHERE e.request = ? ORDER BY e.position", (key,))
        exceedances = tuple(self._exceedance(exceedance) for exceedance in found)
        return StoredRequest(
            **shown if ended else shown | {"tokens": {}},
            key=key,
            watchlist=self._watched.name,
            watchlist_sha256=self._watched.sha256,
            exceedances=exceedances,
            features=shown_features(_features(row), self._watched.features, self._limits) if ended else (),
            features_left_out=row["features_left_out"] or 0,
            activations=tuple(self._activations(key, {exceedance.feature for exceedance in exceedances})),
            activations_lost=row["activations_lost"] or 0,
        )

    def _exceedance(self, row: sqlite3.Row) -> ShownExceedance:
        feature = self._watched.features[row["feature"]]
        found = Exceedance(row["feature"], Phase(row["phase"]), row["position"], row["value"], row["seconds"])
        return ShownExceedance(
            **shown_exceedance(
                found,
                feature,
                # Only a feature with a limit exceeds one.
                cast(float, feature.limit),
                _info(row),
                trace=row["trace_id"],
            )
        )

    def _activations(self, key: int, exceeded: set[str]) -> Iterator[StoredActivations]:
        blobs = self._connection.execute("SELECT fires, rows FROM activations WHERE request = ? ORDER BY rowid", (key,))
        fires, rows = [np.empty(0, FIRE_RECORD)], [np.empty(0, row_record(len(self._dense)))]
        for fires_blob, rows_blob in blobs:
            fires.append(segment.unpack(fires_blob, FIRE_RECORD))
            rows.append(segment.unpack(rows_blob, row_record(len(self._dense))))
        fires_N, rows_R = np.concatenate(fires), np.concatenate(rows)
        shown = {*np.unique(fires_N["feature"]).tolist(), *(self._dense.tolist() if len(rows_R) else ())}
        for feature in sorted(self._watched.features, key=lambda f: (f.id not in exceeded, f.number)):
            if feature.number not in shown:
                continue
            if feature.dense:
                column = int(np.searchsorted(self._dense, feature.number))
                positions, values = rows_R["position"], rows_R["score"][:, column].astype(np.float64)
            else:
                mine = fires_N[fires_N["feature"] == feature.number]
                positions, values = mine["position"], mine["value"].astype(np.float64)
            # Positions may stand twice after a collector went on from its journal.
            positions, order = np.unique(positions, return_index=True)
            yield StoredActivations(
                feature=feature.id,
                label=feature.label,
                severity=feature.severity,
                units=feature.units,
                limit=feature.limit,
                dense=feature.dense,
                positions=positions.tolist(),
                values=values[order].tolist(),
            )


def _requests(reader: _Reader) -> Iterator[StoredRequest]:
    return (reader.request(key) for key in reader.all())


def _info(row: sqlite3.Row) -> RequestInfo:
    """Raises TypeError for a column of bytes, which no JSON could tell."""
    if unread := [name for name in _INFO if isinstance(row[name], bytes)]:
        raise TypeError(f"{', '.join(unread)} is no text")
    return RequestInfo(**{name: row[name] for name in _INFO}, opening_seen=bool(row["opening_seen"]))


def _progress(row: sqlite3.Row) -> RequestProgress:
    return RequestProgress(
        outcome=None if row["outcome"] is None else Outcome(row["outcome"]),
        closed_seconds=row["closed_seconds"] or 0.0,
        tokens=np.array([0, *(row[state.name.lower()] or 0 for state in TokenState)]),
        output_tokens=row["output_tokens"],
        total_tokens=row["total_tokens"],
    )


def _features(row: sqlite3.Row) -> FeatureSummary:
    rows = segment.unpack(row["features"], FEATURE_STAT)
    return FeatureSummary(rows, row["exceeded_features"], row["features_left_out"])
