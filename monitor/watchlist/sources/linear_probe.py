"""Linear probes in a .safetensors file: no format is standard, so this is the plainest one.

    direction [K, D]   one row per probe             bias [K]       intercepts; zeros if missing
    mean [D]           subtracted from x first       scale [D]      x is divided by it (a scikit-learn StandardScaler)
    threshold [K]      the authors' decision threshold in logits; noted on the card, never used as a limit

    logit = ((x - mean) / scale) . direction + bias

Metadata (all optional): `names` a JSON list of row names, `hook_point` like resid_post.3, `model`, `licence`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from monitor.names import HookPoint
from monitor.watchlist import canonical
from monitor.watchlist.canonical import EncoderRows
from monitor.watchlist.location import Location
from monitor.watchlist.sources import About, Options, Source
from monitor.watchlist.tensors import F64, SafetensorsFile

_KNOWN: Final = ("direction", "bias", "mean", "scale", "threshold")


class LinearProbeSource(Source):
    """An opened probe file."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._tensors = SafetensorsFile(location.file())
        self.files = (self._tensors.path,)
        if unknown := sorted(set(self._tensors.entries) - set(_KNOWN)):
            raise location.refuse(f"unknown tensors {', '.join(unknown)}", f"A probe file holds {', '.join(_KNOWN)}.")
        shape = self._tensors.shape("direction")
        if len(shape) != 2 or 0 in shape:
            raise location.refuse(f"'direction' has shape {list(shape)}", "Give one row per probe, [K, d_model].")
        for name, size in (("bias", shape[0]), ("threshold", shape[0]), ("mean", shape[1]), ("scale", shape[1])):
            if name in self._tensors.entries:
                self._tensors.expect(name, (size,))
        metadata = self._tensors.metadata
        self.about = About(
            architecture="linear",
            kind="probe",
            gate="none",
            units="logit",
            d_in=shape[1],
            width=shape[0],
            hook=metadata.get("hook_point"),
            names=_names(location, metadata, shape[0]),
            notes={key: metadata[key] for key in ("model", "licence") if key in metadata},
        )

    def rows(self, index_K: Sequence[int]) -> EncoderRows:
        w_KD = self._tensors.rows("direction", index_K)
        bias_K = self._tensors.rows("bias", index_K) if "bias" in self._tensors.entries else np.zeros(len(index_K))
        scale_D = self._optional("scale")
        if scale_D is not None:
            if not (scale_D > 0).all():
                raise self._location.refuse("'scale' is not above zero everywhere", "Give standard deviations.")
            w_KD = w_KD / scale_D
        return canonical.linear(w_KD, bias_K, self._optional("mean"))

    def row_notes(self, index: int) -> Mapping[str, Any]:
        if "threshold" not in self._tensors.entries:
            return {}
        return {"published_threshold": float(self._tensors.rows("threshold", [index])[0])}

    def _optional(self, name: str) -> F64 | None:
        return self._tensors.whole(name) if name in self._tensors.entries else None


def open_source(location: Location, hook_point: HookPoint, options: Options) -> Source:  # noqa: ARG001
    """Open a probe file. The hook point is checked by the caller, against the file's metadata."""
    options.refuse_unused(location)
    return LinearProbeSource(location)


def _names(location: Location, metadata: Mapping[str, Any], count: int) -> Mapping[str, int]:
    if "names" not in metadata:
        return {}
    try:
        names = json.loads(metadata["names"])
    except ValueError as error:
        raise location.refuse(f"metadata 'names' is not JSON ({error})", "Write a JSON list of row names.") from error
    if not isinstance(names, list) or len(names) != count or len(set(map(str, names))) != count:
        raise location.refuse(f"metadata 'names' does not name {count} rows once each", "Write one name per row.")
    return {str(name): row for row, name in enumerate(names)}
