"""Qwen-Scope: layer<n>.sae.pt, a dict of W_enc [F, D], W_dec, b_enc, b_dec; TopK, nothing subtracted from the input.

k stands in the repository's name only (`SAE-Res-...-W64K-L0_50`). Upstream truth: the model cards; SAELens' loader.
"""

from __future__ import annotations

from collections.abc import Sequence

from latentwatch.errors import RefusalReason
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, layer_in
from latentwatch.watchlist.tensors_torch import TorchFile


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open one layer's file."""
    options.refuse_unused(location, "k")
    k = options.k or layer_in(location.text, r"-L0_(\d+)")
    if k is None:
        raise location.refuse(
            "neither its path nor an option says how many features fire on a token",
            "Give option k, the number after L0_ in the repository's name.",
            RefusalReason.SOURCE_OPTION,
        )
    tensors = TorchFile(location.file())
    d_in = tensors.vector("b_dec")
    width = tensors.vector("b_enc")
    tensors.expect("W_enc", (width, d_in))
    layer = layer_in(location.text, r"layer(\d+)\.sae\.pt")

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return canonical.relu(tensors.rows("W_enc", index_K), tensors.rows("b_enc", index_K))

    about = About(
        architecture="topk",
        d_in=d_in,
        width=width,
        hook=None if layer is None else f"blocks.{layer}.hook_resid_post",
        k=k,
    )
    decoder = Decoder(lambda index_K: tensors.columns("W_dec", index_K), lambda: tensors.whole("b_dec"))
    return Source(about, (tensors.path,), rows, decoder=decoder)
