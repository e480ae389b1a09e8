"""A folder of evidence as Parquet files, for analysis elsewhere: requests, exceedances and activations, joined by key.

Nothing that was said in a request is exported. What is exported is out of reach of retention and deletion here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from latentwatch import storage
from latentwatch.evidence.archive import StoredRequest

_REQUESTS_AT_ONCE: Final = 500
"""Held in memory: some 100 kB each at most."""
_ID: Final = [("key", pa.int64()), ("request_id", pa.string())]
_FEATURE: Final = [("feature", pa.string()), ("label", pa.string()), ("severity", pa.string())]
SCHEMAS: Final = {
    "requests": pa.schema(
        [
            *_ID,
            *(
                (name, pa.string())
                for name in ("response_id", "trace_id", "replica", "model_name", "engine", "adapter")
            ),
            *((name, pa.string()) for name in ("watchlist", "watchlist_sha256", "outcome")),
            ("opened_seconds", pa.float64()),
            ("closed_seconds", pa.float64()),
            *((name, pa.int64()) for name in ("prompt_tokens", "output_tokens", "total_tokens")),
            ("activations_lost", pa.int64()),
        ]
    ),
    "exceedances": pa.schema(
        [
            *_ID,
            *_FEATURE,
            ("seconds", pa.float64()),
            ("position", pa.int32()),
            ("phase", pa.string()),
            ("value", pa.float64()),
            ("limit", pa.float64()),
        ]
    ),
    "activations": pa.schema([*_ID, ("feature", pa.string()), ("position", pa.int32()), ("value", pa.float32())]),
}
"""By the name of the file, without .parquet. Seconds since the Unix epoch; values in the feature's own units."""


def export(requests: Iterable[StoredRequest], out: Path) -> dict[str, int]:
    """Write the files into a folder that is there. Returns: rows by file."""
    rows = dict.fromkeys(SCHEMAS, 0)
    with contextlib.ExitStack() as open_files:
        writers = {}
        for name, schema in SCHEMAS.items():
            file = open_files.enter_context(storage.new_file(out / f"{name}.parquet"))
            writers[name] = open_files.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
        remaining = iter(requests)
        while part := list(itertools.islice(remaining, _REQUESTS_AT_ONCE)):
            for name, table in _tables(part):
                writers[name].write_table(table)
                rows[name] += len(table)
    return rows


def tables(requests: Iterable[StoredRequest]) -> dict[str, pa.Table]:
    """The same in memory, by name."""
    return dict(_tables(list(requests)))


def _tables(requests: list[StoredRequest]) -> Iterator[tuple[str, pa.Table]]:
    names = {name: schema.names for name, schema in SCHEMAS.items()}
    made: dict[str, list[dict[str, object]]] = {name: [] for name in SCHEMAS}
    for request in requests:
        ids = {"key": request.key, "request_id": request.request_id}
        made["requests"].append({name: getattr(request, name) for name in names["requests"]})
        for exceedance in request.exceedances:
            made["exceedances"].append({**vars(exceedance), **ids})
        for shown in request.activations:
            made["activations"] += [
                {**ids, "feature": shown.feature, "position": position, "value": value}
                for position, value in zip(shown.positions, shown.values, strict=True)
            ]
    for name, rows in made.items():
        yield name, pa.Table.from_pylist(rows, schema=SCHEMAS[name])
