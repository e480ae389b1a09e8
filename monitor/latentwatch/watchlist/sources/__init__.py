"""Readers of published encoders: one file per format, all giving rows in their authors' terms.

A reader declares every key and tensor that it uses or passes over, and refuses the others by name: what is not one
linear row per feature, and a scale, norm, threshold or place that it would have to guess.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Final, Protocol, cast

from latentwatch.arrays import F64
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.places import hook_point_of, no_place, refuse_other_place

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
    norm: str | None = None
    """What is done to the stream before the encoder, as SAELens names it, where the files are too old to say it."""
    written_by: str | None = None
    """"repeng" or "llama.cpp", which number the layers of a control vector differently."""
    trained_on: str | None = None
    """The place in the model that the source was trained on, where neither its files nor its path says it."""
    ignore: tuple[str, ...] = ()
    """Unknown keys and tensors of its files of which a person says that activations do not depend on them."""

    def refuse_unused(self, location: Location, *used: str) -> None:
        """Refuse an option that this source has no use for, instead of ignoring it."""
        for name, value in vars(self).items():
            if value is not None and name not in (*used, "trained_on", "ignore"):
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
    places: tuple[str, ...] = ()
    """The place in the model that it was trained on, in the words of each file and path that says it."""
    names: Mapping[str, int] = field(default_factory=dict)
    """Row names, where the format has them."""
    notes: Mapping[str, object] = field(default_factory=dict)
    """Further facts for the card: model, dtype, context, licence."""
    k: int | None = None
    """TopK encoders: only the k largest activations of a token are kept, so its rows alone cannot say what fires."""
    layers: int | None = None
    """Layers of the model that it was made for, where its files have one entry for each."""
    normed_last: bool = False
    """Taken from Hugging Face's hidden_states, of which the last is behind the final norm and no hook point."""

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
    """What was read, the weights last; hashed for the card."""
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
    location = replace(location, ignored=frozenset(options.ignore), met=set())
    if options.trained_on is not None:
        _refuse_unknown_place(location, options.trained_on)
        refuse_other_place(location, (options.trained_on,), hook_point)
    source = reader.open_source(location, hook_point, options)
    location.refuse_unmet()
    refuse_other_place(location, source.about.places, hook_point)
    if not source.about.places:
        if options.trained_on is None:
            raise no_place(location, hook_point)
        return replace(source, about=replace(source.about, places=(f"{options.trained_on} (option trained_on)",)))
    return source


def _refuse_unknown_place(location: Location, words: str) -> None:
    if hook_point_of(words) is None:
        raise location.refuse(
            f"option trained_on = {words!r} is no residual stream after a layer",
            "Write it like resid_post.12.",
            RefusalReason.SOURCE_OPTION,
        )


def _module(format_name: str, location: Location) -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.{format_name}")
    except ImportError as error:
        raise location.refuse(
            f"format {format_name!r} needs the package {error.name!r}, which is not installed",
            "In a clone of the repository: pip install '.[convert]'",
            RefusalReason.SOURCE_PACKAGE,
        ) from error


def refuse_architecture(location: Location, architecture: str, why: str) -> WatchlistRefused:
    """The error for an encoder that has no linear row per feature."""
    return location.refuse(
        f"architecture {architecture!r} cannot be watched: {why}",
        "Use an SAE with one linear encoder row per feature (ReLU, JumpReLU, gated, BatchTopK), or a linear probe.",
        RefusalReason.SOURCE_ARCHITECTURE,
    )
