"""Gemma Scope (Gemma 2): a folder with params.npz, JumpReLU, nothing subtracted from the input.

The place in the model is in the path only (`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`).
Upstream truth: the tutorial published with arXiv 2408.05147; SAELens' gemma_2 loaders.
"""

from __future__ import annotations

from collections.abc import Sequence

from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Unread
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.places import named, number_named, refuse_other_layer
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions
from latentwatch.watchlist.tensors_npz import NpzFile


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open a Gemma Scope folder, or its params.npz itself."""
    options.refuse_unused(location)
    tensors = NpzFile(location.file("" if location.text.endswith(".npz") else "params.npz"))
    d_in, width = _sizes(location, tensors)
    layer = number_named(location, r"layer_(\d+)", within=4)
    refuse_other_layer(location, layer, hook_point)

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return canonical.jumprelu(
            tensors.columns("W_enc", index_K), tensors.rows("b_enc", index_K), tensors.rows("threshold", index_K)
        )

    l0 = number_named(location, r"average_l0_(\d+)", within=2)
    about = About(
        architecture="jumprelu",
        d_in=d_in,
        width=width,
        places=_places(location, layer),
        notes={} if l0 is None else {"declared_l0": l0},
    )
    decoder = Decoder(lambda index_K: tensors.rows("W_dec", index_K), lambda: tensors.whole("b_dec"))
    return Source(about, (tensors.path,), rows, decoder=decoder)


def _sizes(location: Location, tensors: NpzFile) -> tuple[int, int]:
    d_in, _ = tensors.matrix("W_enc")
    width = tensors.vector("threshold")
    tensors.declare(
        location,
        {"W_enc": (d_in, width), "b_enc": (width,), "threshold": (width,)},
        {"W_dec": Unread("of the decoder", (width, d_in)), "b_dec": Unread("of the decoder", (d_in,))},
    )
    return d_in, width


def _places(location: Location, layer: int | None) -> tuple[str, ...]:
    """The hook point by its name in TransformerLens, from the repository's and the folder's names."""
    if named(location, "embedding", within=4):
        return ("hook_embed",)
    # A hub's cache puts a snapshot's folder between the repository's name and its content.
    site = named(location, r"(?:.*--)?gemma-scope-[\w.]+-(?:pt|it)-(res|mlp|att|transcoders)(?:-.*)?", within=7)
    if layer is None or site is None:
        return ()
    place = {
        "res": "hook_resid_post",
        "mlp": "hook_mlp_out",
        "att": "attn.hook_z",
        "transcoders": "ln2.hook_normalized",
    }
    return (f"blocks.{layer}.{place[site[1]]}",)
