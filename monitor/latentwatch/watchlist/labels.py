"""Labels that others wrote: Neuronpedia exports, JSON and CSV lists. Only labels are taken, never magnitudes.

Neuronpedia folds decoder norms into its activations and some of its dashboards were computed on another tensor, so its
thresholds and frequencies mean nothing for our scores. Its `index` is text and its batches are in text order
(0, 1, 10, 100): the index is read from each row and never inferred from its place.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

from latentwatch.errors import WatchlistRefused
from latentwatch.watchlist.location import Location

_INDEX_KEYS: Final = ("index", "feature", "feature_index", "feature_id")
_LABEL_KEYS: Final = ("label", "description", "explanation")
MAX_LINE_BYTES: Final = 1 << 20
"""An explanation with its embedding takes some 30 kB; a longer line is no label list."""


@dataclass(frozen=True)
class Label:
    """What somebody says that a feature means."""

    text: str
    source: str
    """Who said so."""


def load(format_name: str, location: Location) -> Mapping[int, Label]:
    """Feature index to label; where a list has several for a feature, the first is taken.

    Raises: WatchlistRefused: the list is missing or damaged, or a row has no index or no label.
    """
    reader = {"neuronpedia": _neuronpedia, "json": _json, "csv": _csv}[format_name]
    labels: dict[int, Label] = {}
    for index, label in reader(location):
        labels.setdefault(index, label)
    if not labels:
        raise location.refuse("it holds no labels", "Check the path and the format of this list.", "labels")
    return labels


def search(labels: Mapping[int, Label], words: str) -> list[tuple[int, Label]]:
    """The features whose label holds every word, in any order and case; by index."""
    wanted = words.lower().split()
    return [(i, label) for i, label in sorted(labels.items()) if all(word in label.text.lower() for word in wanted)]


def _neuronpedia(location: Location) -> Iterator[tuple[int, Label]]:
    folder = location.folder()
    if (folder / "explanations").is_dir():
        folder = folder / "explanations"
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        for number, row in _json_lines(location, path):
            model = row.get("explanationModelName") or "model not stated"
            yield _row(location, row, f"{path.name} line {number}", f"Neuronpedia, {model}")


def _json_lines(location: Location, path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    number = 0
    try:
        with path.open("rb") as file, _unzipped(file, path) as stream:
            while line := stream.readline(MAX_LINE_BYTES):
                number += 1
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{type(row).__name__}, not an object")
                yield number, row
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise _refuse(location, f"{path.name} line {number} cannot be read ({str(error)[:160]})") from error


def _unzipped(file: IO[bytes], path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file


def _json(location: Location) -> Iterator[tuple[int, Label]]:
    try:
        content = json.loads(location.file().read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refuse(location, f"it is not JSON ({str(error)[:160]})") from error
    source = f"list {location.text}"
    if isinstance(content, dict):
        for index, text in content.items():
            yield _row(location, {"index": index, "label": text}, f"key {index!r}", source)
    elif isinstance(content, list):
        for number, row in enumerate(content):
            yield _row(location, row if isinstance(row, dict) else {}, f"entry {number}", source)


def _csv(location: Location) -> Iterator[tuple[int, Label]]:
    try:
        with location.file().open(newline="", encoding="utf-8-sig") as stream:
            for number, row in enumerate(csv.DictReader(stream), 2):
                yield _row(location, row, f"line {number}", f"list {location.text}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise _refuse(location, f"it is not CSV ({error})") from error


def _row(location: Location, row: Mapping[str, object], place: str, source: str) -> tuple[int, Label]:
    index = next((row[key] for key in _INDEX_KEYS if row.get(key) is not None), None)
    text = next((row[key] for key in _LABEL_KEYS if row.get(key) is not None), None)
    try:
        number = int(str(index))
    except ValueError:
        number = -1
    if number < 0 or not isinstance(text, str) or not text.strip():
        raise _refuse(location, f"{place} has index {index!r} and label {str(text)[:80]!r}")
    return number, Label(" ".join(text.split())[:300], source)


def _refuse(location: Location, found: str) -> WatchlistRefused:
    return location.refuse(found, "Correct or remove that row.", "labels")
