"""Qwen-Scope: layer<n>.sae.pt, a dict of W_enc [F, D], W_dec, b_enc, b_dec; TopK, nothing subtracted from the input.

k stands in the repository's name only (`SAE-Res-...-W64K-L0_50`). Upstream truth: the model cards; SAELens' loader.
"""

from __future__ import annotations

from collections.abc import Sequence

from latentwatch.errors import RefusalReason
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Unread
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.places import named, number_named, refuse_other_layer
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions
from latentwatch.watchlist.tensors_torch import TorchFile


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open one layer's file."""
    options.refuse_unused(location, "k")
    k = _k(location, options)
    tensors = TorchFile(location.file())
    d_in = tensors.vector("b_dec")
    width = tensors.vector("b_enc")
    decoder_tensors = {"W_dec": Unread("of the decoder", (d_in, width)), "b_dec": Unread("of the decoder", (d_in,))}
    tensors.declare(location, {"W_enc": (width, d_in), "b_enc": (width,)}, decoder_tensors)
    layer = number_named(location, r"layer(\d+)\.sae\.pt", within=1)
    refuse_other_layer(location, layer, hook_point)
    of_stream = layer is not None and named(location, r"(?:.*--)?SAE-Res-.*", within=3) is not None

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return canonical.relu(tensors.rows("W_enc", index_K), tensors.rows("b_enc", index_K))

    about = About(
        architecture="topk",
        d_in=d_in,
        width=width,
        places=(f"blocks.{layer}.hook_resid_post",) if of_stream else (),
        k=k,
    )
    decoder = Decoder(lambda index_K: tensors.columns("W_dec", index_K), lambda: tensors.whole("b_dec"))
    return Source(about, (tensors.path,), rows, decoder=decoder)


def _k(location: Location, options: SourceOptions) -> int:
    """The number in the repository's name, or the option where the file was renamed."""
    stated = number_named(location, r".*-L0_(\d+)", within=3)
    k = options.k or stated
    if k is None:
        raise location.refuse(
            "neither its path nor an option says how many features fire on a token",
            "Give option k, the number after L0_ in the repository's name.",
            RefusalReason.SOURCE_OPTION,
        )
    if stated is not None and stated != k:
        raise location.refuse(f"option k = {k} where its path says {stated}", "Remove it.", RefusalReason.SOURCE_OPTION)
    return k
