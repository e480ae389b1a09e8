"""The place in the model that a source was trained on, as its files and its path state it.

Every statement must mean the hook point that the source is listed under. Where there is none, a person is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.names import HOOK_KINDS, HookPoint
from latentwatch.watchlist.location import Location

_RESID = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)", re.ASCII)
_LAYER_OUTPUT = re.compile(r"((?:\w+\.)*)(?:layers|h|blocks)\.(\d+)(?:\.output)?", re.ASCII)
_OURS = re.compile(r"resid_post\.(\d+)", re.ASCII)
_OF_THE_DECODER: Final = frozenset(
    ("model", "base_model", "language_model", "text_model", "transformer", "gpt_neox", "decoder", "backbone")
)
"""Modules that a language model's layers lie in; `vision_tower.encoder.layers.3` is another stack."""


def hook_point_of(name: str) -> HookPoint | None:
    """The hook point that another project's name means, or None where the engine cannot tap it.

    Knows TransformerLens (`blocks.3.hook_resid_post`; the `pre` of a layer is the `post` of the one before) and module
    paths of Hugging Face models (`model.layers.3`, whose output is the stream after that layer).
    """
    if match := _RESID.fullmatch(name):
        layer = int(match[1]) - (match[2] == "pre")
        return HookPoint(layer) if layer >= 0 else None
    if match := _LAYER_OUTPUT.fullmatch(name):
        modules = set(match[1].split(".")) - {""}
        return HookPoint(int(match[2])) if modules <= _OF_THE_DECODER else None
    if match := _OURS.fullmatch(name):
        return HookPoint(int(match[1]))
    return None


def hook_point(text: str) -> HookPoint:
    """A hook point as somebody writes it: ours, or another project's name for it.

    Raises: ConfigRefused, "hook_point_unknown": none of them, or one that the engine cannot tap.
    """
    ours = text.partition(".")[0] in HOOK_KINDS
    return (None if ours else hook_point_of(text)) or HookPoint.parse(text)


def refuse_other_place(location: Location, stated: Sequence[str], hook_point: HookPoint) -> None:
    """Refuse a source of which any statement of its place, in its own words, means another one than the hook point."""
    for words in stated:
        tap = hook_point_of(words)
        if tap != hook_point:
            raise location.refuse(
                f"it was trained on {words!r}" + (f", which is {tap}," if tap else "") + f" not on {hook_point}",
                f"List it under hook point {tap}." if tap else "Only the residual stream after a layer can be watched.",
                RefusalReason.SOURCE_HOOK_POINT,
            )


def no_place(location: Location, hook_point: HookPoint) -> WatchlistRefused:
    """The error of a source that says nowhere what it was trained on."""
    return location.refuse(
        "neither its files nor its path says which place of the model it was trained on",
        f"If it was trained on the residual stream after layer {hook_point.layer}, counted from 0, say so: "
        f"option trained_on: {hook_point}.",
        RefusalReason.SOURCE_PLACE_MISSING,
    )


def refuse_other_layer(location: Location, layer: int | None, hook_point: HookPoint) -> None:
    """For sources that name a layer but not the place in it: at least the layer must be the one that is watched."""
    if layer is not None and layer != hook_point.layer:
        raise location.refuse(
            f"it is for layer {layer}, not for {hook_point}",
            "Move it to its own hook point.",
            RefusalReason.SOURCE_HOOK_POINT,
        )


def named(location: Location, pattern: str, within: int) -> re.Match[str] | None:
    """The one of the last `within` names on the way to the source that matches a pattern as a whole, if there is one.

    Raises: WatchlistRefused: two of them match it, and differ in what they say.
    """
    found = [match for part in location.parts[-within:] if (match := re.fullmatch(pattern, part, re.ASCII))]
    if len({match.groups() for match in found}) > 1:
        names = " and ".join(repr(match[0]) for match in found)
        raise location.refuse(
            f"its path names both {names}", "Move it out of the other.", RefusalReason.SOURCE_HOOK_POINT
        )
    return found[-1] if found else None


def number_named(location: Location, pattern: str, within: int) -> int | None:
    """The number in the first group of `named`; None where there is none."""
    match = named(location, pattern, within)
    return int(match[1]) if match else None
