"""Compile a watchlist.yaml and the sources that it names into one file.

The same input gives the same bytes where the same libraries of sources are installed: they are asked whether the rows
say what they say, and the card tells who was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import agreement, canonical, checkpoint, labels, selection, topk
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.file import LARGEST_HALF, Feature, HookRows, ModelCard, Watchlist
from latentwatch.watchlist.labels import Label
from latentwatch.watchlist.location import sha256_of
from latentwatch.watchlist.selection import FeatureChoice, HookChoice, SourceChoice
from latentwatch.watchlist.sources import Source, open_source

Progress = Callable[[str], None]
CHECKED: Final = "checked_against"
"""On the card: who said that the rows are right, which depends on what is installed."""


def build(yaml_path: Path, out_path: Path, progress: Progress = lambda _: None) -> Watchlist:
    """Build the watchlist file of a YAML.

    Args:    yaml_path: the watchlist.yaml.   out_path: the .safetensors file to write, replaced when it exists.
             progress: called with one line per source.
    Returns: the watchlist as written, with its hash.
    Raises:  WatchlistRefused: the YAML or a source cannot be used; nothing is written then.
    """
    return watchlist_file.write(compile_selection(selection.load(yaml_path), progress), out_path)


def compile_selection(chosen: selection.Selection, progress: Progress = lambda _: None) -> Watchlist:
    """The watchlist of a checked YAML, in memory. Raises as `build`."""
    _refuse_duplicate_ids(chosen)
    hooks = tuple(_hook_rows(hook, chosen.model, progress) for hook in chosen.hooks)
    identity = None if chosen.checkpoint is None else checkpoint.of_checkpoint(chosen.checkpoint)
    if identity is not None and not identity.is_stated:
        raise _refuse(
            f"model.checkpoint {chosen.checkpoint}",
            "it holds no config.json, tokenizer or safetensors",
            "Name the folder of the model that the features belong to.",
        )
    progress(f"model: {identity.summary() if identity else 'not stated beyond its sizes; name its checkpoint'}")
    return Watchlist(name=chosen.name, model=chosen.model, hooks=hooks, notes=chosen.notes, identity=identity)


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
            _check_model(source, choice, model, hook.hook_point)
            hashes = tuple(sha256_of(path) for path in source.files)
        index_K = [row_index(feature, source) for feature in choice.features]
        _refuse_duplicate_rows(choice, index_K, hashes[-1], taken)
        with _at(choice.where):
            rows, gates = _gated_rows(choice, source, index_K, hook.hook_point)
            parts.append(canonical.fold(rows))
            judge = agreement.checked(choice, source, index_K)
        shared = _provenance(choice, source, hashes) | {CHECKED: judge}
        features += _cards(choice, hook.hook_point, source, index_K, gates, shared)
    hi, lo, scale = (list(arrays) for arrays in zip(*parts, strict=True))
    return HookRows(
        hook.hook_point, tuple(features), np.concatenate(hi), np.concatenate(lo), np.concatenate(scale, axis=1)
    )


def _gated_rows(
    choice: SourceChoice, source: Source, index_K: Sequence[int], hook_point: HookPoint
) -> tuple[EncoderRows, Sequence[Mapping[str, object]]]:
    """The rows, and per feature what its gate was matched on."""
    if source.about.k is None:
        if choice.calibration is not None:
            raise choice.location.refuse("it needs no calibration: its gates are exact", "Remove 'calibration'.")
        return source.rows(index_K), [{}] * len(index_K)
    if choice.calibration is None:
        raise choice.location.refuse(
            f"it is a TopK encoder (k = {source.about.k}): which features fire depends on all {source.about.width}",
            "Give 'calibration' with recorded activations; the cards will say 'gate: calibrated' and how well it does.",
            RefusalReason.SOURCE_TOPK,
        )
    recording = choice.calibration.activations
    x_TD = topk.recorded(recording, source.about.d_in, hook_point)
    matched = topk.calibrate(source, index_K, x_TD, recording, choice.calibration.match)
    return matched.rows, [{"gate_calibration": note} for note in matched.notes]


def _check_model(source: Source, choice: SourceChoice, model: ModelCard, hook_point: HookPoint) -> None:
    if source.about.d_in != model.d_model:
        raise choice.location.refuse(
            f"its rows are {source.about.d_in} wide, the model's residual stream {model.d_model}",
            f"Use a source trained on {model.name}, or correct the model's size.",
            RefusalReason.WATCHLIST_WIDTH,
        )
    if source.about.layers not in (None, model.layers):
        raise choice.location.refuse(
            f"it has entries for {source.about.layers} layers, and the model has {model.layers}",
            f"Use a source made for {model.name}, or correct the model's layers.",
            RefusalReason.WATCHLIST_WIDTH,
        )
    if source.about.normed_last and hook_point.layer == model.layers - 1:
        raise choice.location.refuse(
            "its direction of the last layer is taken behind the final norm, which is no hook point",
            f"Use resid_post.0 to resid_post.{model.layers - 2}.",
            RefusalReason.SOURCE_HOOK_POINT,
        )


def row_index(feature: FeatureChoice, source: Source) -> int:
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


def _refuse_duplicate_rows(
    choice: SourceChoice, index_K: Sequence[int], weights_sha256: str, taken: dict[tuple[str, int], str]
) -> None:
    """A source is the content of its weights: another spelling, link, revision or copy is the same source."""
    for feature, index in zip(choice.features, index_K, strict=True):
        row = (weights_sha256, index)
        if row in taken:
            raise _refuse(
                feature.where,
                f"row {index} of {choice.location.text!r} is watched already at {taken[row]}",
                "Keep one of them.",
            )
        taken[row] = feature.where


def _cards(
    choice: SourceChoice,
    hook_point: HookPoint,
    source: Source,
    index_K: Sequence[int],
    gates: Sequence[Mapping[str, object]],
    shared: Mapping[str, object],
) -> Iterator[Feature]:
    with _at(choice.where):
        lists = [labels.for_source(item, source.about, hook_point) for item in choice.labels]
    for feature, index, gate in zip(choice.features, index_K, gates, strict=True):
        label = _label(feature, index, lists)
        with _at(feature.where):
            _refuse_limit_beyond_half(feature, dense=source.about.gate == "none")
            yield Feature(
                id=feature.id,
                label=label.text,
                severity=feature.severity,
                kind=source.about.kind,
                gate=source.about.gate,
                units=source.about.units,
                limit=feature.limit,
                skip_first_positions=feature.skip_first_positions,
                source={**shared, "index": index, **source.row_notes(index), **gate},
                evidence={"label_source": label.source, **feature.evidence},
            )


def _refuse_limit_beyond_half(feature: FeatureChoice, *, dense: bool) -> None:
    """Scores of every token, and rolling means of them, are clipped to half precision: none exceeds such a limit."""
    limit = feature.limit
    if limit is not None and (dense or limit.statistic == "rolling_mean") and abs(limit.value) >= LARGEST_HALF:
        raise _refuse(
            f"limit {limit.value:g}",
            f"such scores travel in half precision and end at {LARGEST_HALF:g}",
            "Divide the direction and its bias by a constant, and the limit too.",
        )


def _provenance(choice: SourceChoice, source: Source, hashes: Sequence[str]) -> dict[str, object]:
    """What the cards of all features of a source say of it."""
    shared: dict[str, object] = {
        "format": choice.format,
        "path": choice.location.text,
        "architecture": source.about.architecture,
        "trained_on": source.about.places[0],
        "sha256": {path.name: digest for path, digest in zip(source.files, hashes, strict=True)},
        "options": {name: value for name, value in vars(choice.options).items() if value not in (None, ())},
        **source.about.notes,
    }
    if choice.licence is not None:
        shared["licence"] = choice.licence
    return shared


def _label(feature: FeatureChoice, index: int, lists: Sequence[Mapping[int, Label]]) -> Label:
    """The feature's own label, or the first that a list has for it."""
    if feature.label is not None:
        return Label(feature.label, "watchlist.yaml")
    found = next((known[index] for known in lists if index in known), None)
    if found is None:
        raise _refuse(feature.where, f"no list under 'labels' knows row {index}", "Give the feature a label.")
    return found


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Add the place in the YAML to refusals of what it asks for."""
    try:
        yield
    except WatchlistRefused as refusal:
        raise _refuse(f"{where}: {refusal.what}", refusal.found, refusal.instead, refusal.reason) from refusal


def _refuse(what: str, found: str, instead: str, reason: str = RefusalReason.WATCHLIST_BUILD) -> WatchlistRefused:
    return WatchlistRefused(what, found=found, instead=instead, reason=reason)
