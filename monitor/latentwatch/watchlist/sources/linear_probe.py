"""Linear probes in a .safetensors file: no format is standard, so this is the plainest one.

    direction [K, D]   one row per probe             bias [K]       intercepts; zeros if missing
    mean [D]           subtracted from x first       scale [D]      x is divided by it (a scikit-learn StandardScaler)
    threshold [K]      the authors' decision threshold in logits; noted on the card, never used as a limit

    logit = ((x - mean) / scale) . direction + bias

Metadata: `names` a JSON list of row names, `hook_point` like resid_post.3 (without it, a person must give the option
trained_on), `model`, `licence`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Known, Unread
from latentwatch.watchlist.location import Config, Location, strict_json
from latentwatch.watchlist.sources import About, Source, SourceOptions
from latentwatch.watchlist.tensors import SafetensorsFile

_BESIDE: Final = Known(
    used=frozenset(("names", "hook_point")),
    unread=dict.fromkeys(("model", "licence", "format"), "a fact for people")
    | {"window": "the mean that its threshold is for; limits stand in the YAML"},
)


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open a probe file. The hook point is checked by the caller, against the file's metadata."""
    options.refuse_unused(location)
    tensors = SafetensorsFile(location.file())
    width, d_in = tensors.matrix("direction")
    metadata = _declare(location, tensors, width, d_in)
    hook = metadata.text("hook_point")

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return _rows(location, tensors, index_K)

    def row_notes(index: int) -> Mapping[str, object]:
        if "threshold" not in tensors.entries:
            return {}
        return {"published_threshold": float(tensors.rows("threshold", [index])[0])}

    about = About(
        architecture="linear",
        kind="probe",
        units="logit",
        d_in=d_in,
        width=width,
        places=(hook,) if hook else (),
        names=_names(location, metadata.text("names"), width),
        notes=metadata.noted("model", "licence"),
    )
    return Source(about, (tensors.path,), rows, row_notes)


def _declare(location: Location, tensors: SafetensorsFile, width: int, d_in: int) -> Config:
    """The file's metadata, with every tensor declared."""
    optional = {"bias": (width,), "mean": (d_in,), "scale": (d_in,)}
    used = {"direction": (width, d_in)} | {name: shape for name, shape in optional.items() if name in tensors.entries}
    return tensors.declare(location, used, {"threshold": Unread("noted on the card", (width,))}, _BESIDE)


def _rows(location: Location, tensors: SafetensorsFile, index_K: Sequence[int]) -> EncoderRows:
    w_KD = tensors.rows("direction", index_K)
    bias_K = tensors.rows("bias", index_K) if "bias" in tensors.entries else np.zeros(len(index_K))
    if "scale" in tensors.entries:
        scale_D = tensors.whole("scale")
        if not (scale_D > 0).all():
            raise location.refuse("'scale' is not above zero everywhere", "Give standard deviations.")
        w_KD = w_KD / scale_D
    return canonical.linear(w_KD, bias_K, tensors.whole("mean") if "mean" in tensors.entries else None)


def _names(location: Location, text: str | None, count: int) -> Mapping[str, int]:
    if text is None:
        return {}
    try:
        names = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise location.refuse(f"metadata 'names' is not JSON ({error})", "Write a JSON list of row names.") from error
    if not isinstance(names, list) or len(names) != count or len(set(map(str, names))) != count:
        raise location.refuse(f"metadata 'names' does not name {count} rows once each", "Write one name per row.")
    return {str(name): row for row, name in enumerate(names)}
