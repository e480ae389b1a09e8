"""Labels that others wrote: Neuronpedia exports, JSON and CSV lists. Only labels are taken, never magnitudes.

Neuronpedia folds decoder norms into its activations and some of its dashboards were computed on another tensor, so its
thresholds and frequencies mean nothing for our scores. Its `index` is text and its batches are in text order
(0, 1, 10, 100): the index is read from each row and never inferred from its place. Its `layer` names the dictionary
(`20-gemmascope-res-16k`), which must be the source that the labels are for.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist.location import Location, strict_json
from latentwatch.watchlist.places import hook_point_of
from latentwatch.watchlist.selection import LabelList
from latentwatch.watchlist.sources import About

_INDEX_KEYS: Final = ("index", "feature", "feature_index", "feature_id")
_LABEL_KEYS: Final = ("label", "description", "explanation")
_HOOK_KEYS: Final = ("hook_point", "hook_name", "hookName", "hook")
_MODEL_KEYS: Final = ("modelId", "model_id")
_DICTIONARY_KEYS: Final = ("layer", "sourceId", "source_id")
MAX_LINE_BYTES: Final = 1 << 20
"""An explanation with its embedding takes some 30 kB; a longer line is no label list."""


@dataclass(frozen=True)
class Label:
    """What somebody says that a feature means."""

    text: str
    source: str
    """Who said so."""


@dataclass(frozen=True)
class _Row:
    """One row of a list."""

    place: str
    """Where it stands, for errors."""
    index: int
    label: Label
    states: Mapping[str, str]
    """What it says of the dictionary that it is for: "model", "dictionary" and "hook", each if it does."""


def load(format_name: str, location: Location) -> Mapping[int, Label]:
    """Feature index to label; where a list has several for a feature, the first is taken.

    Raises: WatchlistRefused: the list is missing or damaged, or a row has no index or no label.
    """
    return _by_index(location, _rows(format_name, location))


def for_source(chosen: LabelList, about: About, hook_point: HookPoint) -> Mapping[int, Label]:
    """The labels of a list, which must be one for this source.

    Raises: WatchlistRefused: as `load`; or a row is of another layer, place, model or dictionary, or of a feature that
            the source has not; or nothing says what dictionary a Neuronpedia export is of.
    """
    location = chosen.location
    rows = list(_rows(chosen.format, location))
    for row in rows:
        if row.index >= about.width:
            raise _refuse(location, f"{row.place} is of feature {row.index}, and the source has {about.width}")
        _check_statements(location, row, about, hook_point)
    numbers = {_layer(row.states["dictionary"]) for row in rows if "dictionary" in row.states} - {None}
    if chosen.format == "neuronpedia" and not numbers:
        folder = re.fullmatch(r"(\d+)-.*", location.parts[-1], re.ASCII)
        numbers = {int(folder[1])} if folder else {chosen.layer}
    if chosen.layer is not None:
        numbers.add(chosen.layer)
    if None in numbers:
        raise location.refuse(
            "neither its rows nor its folder's name says which layer it is of",
            f"If it is of this source, say so: layer: {min(_layers_of(about, hook_point))}.",
            RefusalReason.SOURCE_PLACE_MISSING,
        )
    if wrong := sorted(cast(set[int], numbers) - _layers_of(about, hook_point)):
        raise _of_another(location, f"it is of layer {wrong[0]}", about, hook_point)
    return _by_index(location, rows)


def _rows(format_name: str, location: Location) -> Iterator[_Row]:
    return {"neuronpedia": _neuronpedia, "json": _json, "csv": _csv}[format_name](location)


def _by_index(location: Location, rows: Iterable[_Row]) -> Mapping[int, Label]:
    labels: dict[int, Label] = {}
    for row in rows:
        labels.setdefault(row.index, row.label)
    if not labels:
        raise location.refuse("it holds no labels", "Check the path and the format of this list.", "labels")
    return labels


def _layer(dictionary: str) -> int | None:
    """20 of `20-gemmascope-res-16k` and of `20`."""
    match = re.match(r"(\d+)(?:-|$)", dictionary, re.ASCII)
    return int(match[1]) if match else None


def _layers_of(about: About, hook_point: HookPoint) -> set[int]:
    """In a source's own words: an SAE of `blocks.6.hook_resid_pre` is of layer 6, though it reads resid_post.5."""
    found = {int(number) for words in about.places for number in re.findall(r"(?<=\.)\d+", words)}
    return found or {hook_point.layer}


def _check_statements(location: Location, row: _Row, about: About, hook_point: HookPoint) -> None:
    known = about.notes.get("neuronpedia_id")
    model, _, dictionary = known.partition("/") if isinstance(known, str) else ("", "", "")
    for name, own in (("model", model), ("dictionary", dictionary)):
        stated = row.states.get(name, own)
        # A bare number is a layer, which is compared with the source's own words.
        if own and stated != own and not stated.isdigit():
            raise _of_another(location, f"{row.place} is of {name} {stated!r}, not of {own!r}", about, hook_point)
    hook = row.states.get("hook")
    if hook is not None and hook_point_of(hook) != hook_point:
        raise _of_another(location, f"{row.place} is of {hook!r}", about, hook_point)


def _of_another(location: Location, found: str, about: About, hook_point: HookPoint) -> WatchlistRefused:
    places = ", ".join(about.places)
    return location.refuse(
        f"{found}; its source was trained on {places}, which is {hook_point}",
        "Give the list of this source.",
        RefusalReason.SOURCE_HOOK_POINT,
    )


def search(labels: Mapping[int, Label], words: str) -> list[tuple[int, Label]]:
    """The features whose label holds every word, in any order and case; by index."""
    wanted = words.lower().split()
    return [(i, label) for i, label in sorted(labels.items()) if all(word in label.text.lower() for word in wanted)]


def _neuronpedia(location: Location) -> Iterator[_Row]:
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
                row = strict_json(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{type(row).__name__}, not an object")
                yield number, row
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise _refuse(location, f"{path.name} line {number} cannot be read ({str(error)[:160]})") from error


def _unzipped(file: IO[bytes], path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file


def _json(location: Location) -> Iterator[_Row]:
    try:
        content = strict_json(location.file().read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refuse(location, f"it is not JSON ({str(error)[:160]})") from error
    source = f"list {location.text}"
    if isinstance(content, dict):
        for index, text in content.items():
            yield _row(location, {"index": index, "label": text}, f"key {index!r}", source)
    elif isinstance(content, list):
        for number, row in enumerate(content):
            yield _row(location, row if isinstance(row, dict) else {}, f"entry {number}", source)


def _csv(location: Location) -> Iterator[_Row]:
    try:
        with location.file().open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = list(reader.fieldnames or ())
            if len(set(columns)) != len(columns):
                raise _refuse(location, f"a column stands twice in {', '.join(map(repr, columns))[:160]}")
            for number, row in enumerate(reader, 2):
                yield _row(location, row, f"line {number}", f"list {location.text}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise _refuse(location, f"it is not CSV ({error})") from error


def _row(location: Location, row: Mapping[str, object], place: str, source: str) -> _Row:
    indices = {str(row[key]).strip() for key in _INDEX_KEYS if row.get(key) is not None}
    text = next((row[key] for key in _LABEL_KEYS if row.get(key) is not None), None)
    index = indices.pop() if len(indices) == 1 else None
    if index is None or not re.fullmatch(r"\d+", index, re.ASCII) or not isinstance(text, str) or not text.strip():
        shown = f"index {index!r}" if len(indices) == 0 else f"several indices, {sorted(indices)}"
        raise _refuse(location, f"{place} has {shown} and label {str(text)[:80]!r}")
    stated = (("model", _MODEL_KEYS), ("dictionary", _DICTIONARY_KEYS), ("hook", _HOOK_KEYS))
    states = {name: str(row[key]) for name, keys in stated for key in keys if row.get(key) not in (None, "")}
    return _Row(place, int(index), Label(" ".join(text.split())[:300], source), states)


def _refuse(location: Location, found: str) -> WatchlistRefused:
    return location.refuse(found, "Correct or remove that row.", "labels")
