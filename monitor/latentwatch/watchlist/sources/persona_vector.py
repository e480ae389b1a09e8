"""Persona and steering vectors: a .pt file with one tensor [L + 1, D], entry i for Hugging Face's hidden_states[i].

hidden_states[i] is the stream after layer i - 1, except the last entry, which is behind the final norm and therefore no
hook point. The score is the projection x . v / |v|, as in the authors' eval/cal_projection.py (arXiv 2507.21509).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentwatch.arrays import F64
from latentwatch.errors import RefusalReason
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import About, Source, SourceOptions
from latentwatch.watchlist.tensors import Tensors
from latentwatch.watchlist.tensors_torch import ROOT, TorchFile


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open one trait's file; its only row, index 0, is the direction at the hook point."""
    options.refuse_unused(location)
    tensors = TorchFile(location.file())
    shape = tensors.shape(ROOT) if ROOT in tensors.entries else ()
    if len(shape) != 2 or 0 in shape:
        raise location.refuse("it does not hold one tensor [layers + 1, d_model]", "Give a vector per layer.")
    tensors.declare(location, {ROOT: shape})
    entry = hook_point.layer + 1
    if entry >= shape[0] - 1:
        raise location.refuse(
            f"it has entries for {shape[0] - 1} layers, and the last is taken behind the final norm",
            f"Use resid_post.0 to resid_post.{shape[0] - 3}.",
            RefusalReason.SOURCE_HOOK_POINT,
        )

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return projection(tensors, tensors.rows(ROOT, [entry] * len(index_K)))

    about = About(
        architecture="direction",
        kind="direction",
        units="projection onto the unit direction",
        d_in=shape[1],
        width=1,
        places=(str(hook_point),),
        notes={"entry": entry},
        layers=shape[0] - 1,
    )
    return Source(about, (tensors.path,), rows)


def projection(tensors: Tensors, direction_KD: F64) -> EncoderRows:
    """Rows that score x . v / |v|."""
    length_K = np.linalg.norm(direction_KD, axis=1, keepdims=True)
    if not (length_K > 0).all():
        raise tensors.refuse("the direction is zero", "Fetch the file again.")
    return canonical.linear(direction_KD / length_K, np.zeros(len(direction_KD)))
