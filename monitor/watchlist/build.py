"""Compile a watchlist.yaml and the sources that it names into one file. The same input gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from monitor.errors import WatchlistRefused
from monitor.names import HookPoint
from monitor.watchlist import canonical, card, selection
from monitor.watchlist.card import Feature, HookRows, ModelCard, Watchlist
from monitor.watchlist.location import sha256_of
from monitor.watchlist.selection import FeatureChoice, HookChoice, SourceChoice
from monitor.watchlist.sources import Source, open_source

Progress = Callable[[str], None]


def build(yaml_path: Path, out_path: Path, progress: Progress = lambda _: None) -> Watchlist:
    """Build the watchlist file of a YAML.

    Args:    yaml_path: the watchlist.yaml.   out_path: the .safetensors file to write, replaced when it exists.
             progress: called with one line per source.
    Returns: the watchlist as written, with its hash.
    Raises:  WatchlistRefused: the YAML or a source cannot be used; nothing is written then.
    """
    return card.write(compile_selection(selection.load(yaml_path), progress), out_path)


def compile_selection(chosen: selection.Selection, progress: Progress = lambda _: None) -> Watchlist:
    """The watchlist of a checked YAML, in memory. Raises as `build`."""
    _refuse_duplicate_ids(chosen)
    hooks = tuple(_hook_rows(hook, chosen.model, progress) for hook in chosen.hooks)
    return Watchlist(name=chosen.name, model=chosen.model, hooks=hooks, notes=chosen.notes)


def _refuse_duplicate_ids(chosen: selection.Selection) -> None:
    places: dict[str, str] = {}
    for hook in chosen.hooks:
        for source in hook.sources:
            for feature in source.features:
                if feature.id in places:
                    raise _refuse(
                        feature.where,
                        f"id {feature.id!r} stands already at {places[feature.id]}",
                        "Give each its own id.",
                    )
                places[feature.id] = feature.where


def _hook_rows(hook: HookChoice, model: ModelCard, progress: Progress) -> HookRows:
    features: list[Feature] = []
    parts = []
    taken: dict[tuple[str, int], str] = {}
    for choice in hook.sources:
        progress(f"{hook.hook_point}: {len(choice.features)} features of {choice.location.text} ({choice.format})")
        with _at(choice.where):
            source = open_source(choice.format, choice.location, hook.hook_point, choice.options)
            _check_width(source, choice, model)
        index_K = [_index(feature, source) for feature in choice.features]
        _refuse_duplicate_rows(choice, index_K, taken)
        with _at(choice.where):
            parts.append(canonical.fold(source.rows(index_K)))
        features += _cards(choice, hook.hook_point, source, index_K)
    hi, lo, scale = (list(arrays) for arrays in zip(*parts, strict=True))
    return HookRows(
        hook.hook_point, tuple(features), np.concatenate(hi), np.concatenate(lo), np.concatenate(scale, axis=1)
    )


def _check_width(source: Source, choice: SourceChoice, model: ModelCard) -> None:
    if source.about.d_in != model.d_model:
        raise choice.location.refuse(
            f"its rows are {source.about.d_in} wide, the model's residual stream {model.d_model}",
            f"Use a source trained on {model.name}, or correct the model's size.",
            "watchlist_width",
        )


def _index(feature: FeatureChoice, source: Source) -> int:
    """The row that a feature names, checked."""
    if feature.name is not None:
        if feature.name not in source.about.names:
            named = ", ".join(list(source.about.names)[:12]) or "no row names"
            raise _refuse(feature.where, f"the source has no row named {feature.name!r}", f"It has {named}.")
        return source.about.names[feature.name]
    if feature.index is None or feature.index >= source.about.width:
        raise _refuse(
            feature.where,
            f"index {feature.index} of a source with {source.about.width} rows",
            f"Use 0 to {source.about.width - 1}.",
        )
    return feature.index


def _refuse_duplicate_rows(choice: SourceChoice, index_K: Sequence[int], taken: dict[tuple[str, int], str]) -> None:
    for feature, index in zip(choice.features, index_K, strict=True):
        row = (choice.location.text, index)
        if row in taken:
            raise _refuse(
                feature.where, f"row {index} of {row[0]!r} is watched already at {taken[row]}", "Keep one of them."
            )
        taken[row] = feature.where


def _cards(choice: SourceChoice, hook_point: HookPoint, source: Source, index_K: Sequence[int]) -> Iterator[Feature]:
    about = source.about
    shared: dict[str, Any] = {
        "format": choice.format,
        "path": choice.location.text,
        "architecture": about.architecture,
        "trained_on": about.hook or f"not stated; taken to be {hook_point}",
        "sha256": {path.name: sha256_of(path) for path in source.files},
        "options": {name: value for name, value in vars(choice.options).items() if value is not None},
        **about.notes,
    }
    if choice.licence is not None:
        shared["licence"] = choice.licence
    for feature, index in zip(choice.features, index_K, strict=True):
        with _at(feature.where):
            yield Feature(
                id=feature.id,
                label=feature.label,
                severity=feature.severity,
                kind=about.kind,
                gate=about.gate,
                units=about.units,
                limit=feature.limit,
                skip_first_positions=feature.skip_first_positions,
                source={**shared, "index": index, **source.row_notes(index)},
                evidence=feature.evidence,
            )


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Add the place in the YAML to refusals of what it asks for."""
    try:
        yield
    except WatchlistRefused as refusal:
        raise _refuse(f"{where}: {refusal.what}", refusal.found, refusal.instead, refusal.reason) from refusal


def _refuse(what: str, found: str, instead: str, reason: str = "watchlist_build") -> WatchlistRefused:
    return WatchlistRefused(what, found=found, instead=instead, reason=reason)
