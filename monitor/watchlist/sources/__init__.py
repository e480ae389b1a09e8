"""Readers of published encoders: one file per format, all giving rows in their authors' terms.

A reader refuses by name what is not one linear row per feature, and never guesses a scale, a norm or a threshold.
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, cast

from monitor.errors import WatchlistRefused
from monitor.names import HookPoint
from monitor.watchlist.canonical import EncoderRows
from monitor.watchlist.location import Location

FORMATS: Final = {
    "saelens": "monitor.watchlist.sources.saelens",
    "linear_probe": "monitor.watchlist.sources.linear_probe",
}
"""Format name in the YAML to module. A module is imported only when a watchlist uses it."""


@dataclass(frozen=True)
class Options:
    """What a person must say about a source because its files do not."""

    input_scale: float | None = None
    """The factor that the residual stream is multiplied by before the encoder."""
    centre: bool | None = None
    """Whether the encoder was trained on a stream from which each token's mean is subtracted."""

    def refuse_unused(self, location: Location, *used: str) -> None:
        """Refuse an option that this source has no use for, instead of ignoring it."""
        for name, value in vars(self).items():
            if value is not None and name not in used:
                raise location.refuse(
                    f"option {name} = {value} has no meaning for this source", "Remove it.", "source_option"
                )


@dataclass(frozen=True)
class About:
    """What a source says of itself."""

    architecture: str
    kind: str
    """"sae", "probe" or "direction", as on the card."""
    gate: str
    """"exact", "calibrated" or "none", as on the card."""
    units: str
    d_in: int
    width: int
    """Rows that can be selected."""
    hook: str | None = None
    """The place in the model that it was trained on, in the source's own words; None if it does not say."""
    names: Mapping[str, int] = field(default_factory=dict)
    """Row names, where the format has them."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further facts for the card: model, dtype, context, licence."""


class Source(ABC):
    """An opened source."""

    about: About
    files: tuple[Path, ...]
    """What was read; hashed for the card."""

    @abstractmethod
    def rows(self, index_K: Sequence[int]) -> EncoderRows:
        """The encoder rows of these features, in this order."""

    def row_notes(self, index: int) -> Mapping[str, Any]:  # noqa: ARG002
        """What the source says of one row, for its card."""
        return {}


class Reader(Protocol):
    """What a format's module offers at its top level."""

    def open_source(self, location: Location, hook_point: HookPoint, options: Options) -> Source: ...


def open_source(format_name: str, location: Location, hook_point: HookPoint, options: Options) -> Source:
    """Open a source and check that it was trained where it is about to be used.

    Raises: WatchlistRefused: a missing or damaged file, an architecture that has no linear row per feature, an option
            that the format has no use for, or a source trained on another place of the model.
    """
    reader = cast(Reader, importlib.import_module(FORMATS[format_name]))
    source = reader.open_source(location, hook_point, options)
    trained_on = source.about.hook
    if trained_on is not None and hook_point_of(trained_on) != hook_point:
        tap = hook_point_of(trained_on)
        raise location.refuse(
            f"it was trained on {trained_on!r}" + (f", which is {tap}," if tap else "") + f" not on {hook_point}",
            f"List it under hook point {tap}." if tap else "Only the residual stream after a layer can be watched.",
            "source_hook_point",
        )
    return source


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
        "source_architecture",
    )
