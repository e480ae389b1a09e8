"""Readers of published encoders: one file per format, all giving rows in their authors' terms.

A reader refuses by name what is not one linear row per feature, and never guesses a scale, a norm or a threshold.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Final, Protocol, cast

from latentwatch.arrays import F64
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Location

FORMATS: Final = (
    "circuit_tracer",
    "control_vector",
    "dictionary_learning",
    "gemma_scope",
    "gemma_scope_2",
    "goodfire",
    "linear_probe",
    "llama_scope",
    "openai",
    "openmoss",
    "persona_vector",
    "qwen_scope",
    "saelens",
    "sklearn_probe",
    "sparsify",
)
"""The formats, each read by the module of its name here, which is imported only when a watchlist uses it."""


@dataclass(frozen=True)
class SourceOptions:
    """What a person must say about a source because its files do not."""

    input_scale: float | None = None
    """The factor that the residual stream is multiplied by before the encoder."""
    centre: bool | None = None
    """Whether the encoder was trained on a stream from which each token's mean is subtracted."""
    k: int | None = None
    """How many features a TopK encoder lets fire on a token, where only a repository's name says it."""

    def refuse_unused(self, location: Location, *used: str) -> None:
        """Refuse an option that this source has no use for, instead of ignoring it."""
        for name, value in vars(self).items():
            if value is not None and name not in used:
                raise location.refuse(
                    f"option {name} = {value} has no meaning for this source", "Remove it.", RefusalReason.SOURCE_OPTION
                )


@dataclass(frozen=True)
class About:
    """What a source says of itself."""

    architecture: str
    d_in: int
    width: int
    """Rows that can be selected."""
    kind: str = "sae"
    """"sae", "probe" or "direction", as on the card."""
    units: str = "activation of the SAE as published"
    hook: str | None = None
    """The place in the model that it was trained on, in the source's own words; None if it does not say."""
    names: Mapping[str, int] = field(default_factory=dict)
    """Row names, where the format has them."""
    notes: Mapping[str, object] = field(default_factory=dict)
    """Further facts for the card: model, dtype, context, licence."""
    k: int | None = None
    """TopK encoders: only the k largest activations of a token are kept, so its rows alone cannot say what fires."""

    @property
    def gate(self) -> str:
        """How well the canonical gate stands for the authors' own, as on the card."""
        if self.kind != "sae":
            return "none"
        return "exact" if self.k is None else "calibrated"


def _no_notes(_: int) -> Mapping[str, object]:
    return {}


@dataclass(frozen=True)
class Decoder:
    """The other half of an SAE, read only to measure how well it explains a recorded stream."""

    rows: Callable[[Sequence[int]], F64]
    """What an activation of 1 adds to the reconstruction, per feature, [K, D]."""
    bias: Callable[[], F64]
    """[D]"""
    input_scale: float = 1.0
    """The reconstruction is of n(x) * input_scale."""


@dataclass(frozen=True)
class Source:
    """An opened source."""

    about: About
    files: tuple[Path, ...]
    """What was read; hashed for the card."""
    rows: Callable[[Sequence[int]], EncoderRows]
    """The encoder rows of the given features, in the given order."""
    row_notes: Callable[[int], Mapping[str, object]] = _no_notes
    """What the source says of one row, for its card."""
    decoder: Decoder | None = None
    """None where the source has none, or where it writes to another place than it reads."""


class Reader(Protocol):
    """What a format's module offers at its top level."""

    def open_source(self, location: Location, hook_point: HookPoint, options: SourceOptions) -> Source: ...


def open_source(format_name: str, location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open a source and check that it was trained where it is about to be used.

    Raises: WatchlistRefused: a missing or damaged file, an architecture that has no linear row per feature, an option
            that the format has no use for, or a source trained on another place of the model.
    """
    reader = cast(Reader, _module(format_name, location))
    source = reader.open_source(location, hook_point, options)
    trained_on = source.about.hook
    if trained_on is not None and hook_point_of(trained_on) != hook_point:
        tap = hook_point_of(trained_on)
        raise location.refuse(
            f"it was trained on {trained_on!r}" + (f", which is {tap}," if tap else "") + f" not on {hook_point}",
            f"List it under hook point {tap}." if tap else "Only the residual stream after a layer can be watched.",
            RefusalReason.SOURCE_HOOK_POINT,
        )
    return source


def _module(format_name: str, location: Location) -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.{format_name}")
    except ImportError as error:
        raise location.refuse(
            f"format {format_name!r} needs the package {error.name!r}, which is not installed",
            "Install latentwatch[convert].",
            RefusalReason.SOURCE_PACKAGE,
        ) from error


_RESID = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_LAYER_OUTPUT = re.compile(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)(?:\.output)?")
_OURS = re.compile(r"resid_post\.(\d+)")


def hook_point_of(name: str) -> HookPoint | None:
    """The hook point that another project's name means, or None where the engine cannot tap it.

    Knows TransformerLens (`blocks.3.hook_resid_post`; the `pre` of a layer is the `post` of the one before) and module
    paths of Hugging Face models (`model.layers.3`, whose output is the stream after that layer).
    """
    if match := _RESID.fullmatch(name):
        layer = int(match[1]) - (match[2] == "pre")
        return HookPoint(layer) if layer >= 0 else None
    if match := _LAYER_OUTPUT.fullmatch(name) or _OURS.fullmatch(name):
        return HookPoint(int(match[1]))
    return None


def refuse_architecture(location: Location, architecture: str, why: str) -> WatchlistRefused:
    """The error for an encoder that has no linear row per feature."""
    return location.refuse(
        f"architecture {architecture!r} cannot be watched: {why}",
        "Use an SAE with one linear encoder row per feature (ReLU, JumpReLU, gated, BatchTopK), or a linear probe.",
        RefusalReason.SOURCE_ARCHITECTURE,
    )


def refuse_other_layer(location: Location, layer: int | None, hook_point: HookPoint) -> None:
    """For sources that name a layer but not the place in it: at least the layer must be the one that is watched."""
    if layer is not None and layer != hook_point.layer:
        raise location.refuse(
            f"it is for layer {layer}, not for {hook_point}",
            "Move it to its own hook point.",
            RefusalReason.SOURCE_HOOK_POINT,
        )


def layer_in(text: str, pattern: str) -> int | None:
    """The layer that a file or folder name gives, by a pattern with one group; None if it gives none."""
    match = re.search(pattern, text)
    return int(match[1]) if match else None
