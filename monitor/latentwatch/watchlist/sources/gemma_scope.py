"""Gemma Scope (Gemma 2): a folder with params.npz, JumpReLU, nothing subtracted from the input.

The place in the model is in the path only (`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`).
Upstream truth: the tutorial published with arXiv 2408.05147; SAELens' gemma_2 loaders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, layer_in, refuse_other_layer
from latentwatch.watchlist.tensors_npz import NpzFile


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open a Gemma Scope folder, or its params.npz itself."""
    options.refuse_unused(location)
    tensors = NpzFile(location.file("" if location.text.endswith(".npz") else "params.npz"))
    d_in, width = _sizes(tensors)
    hook = _hook(location)
    if hook is None:
        refuse_other_layer(location, layer_in(location.text, r"layer_(\d+)"), hook_point)

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return canonical.jumprelu(
            tensors.columns("W_enc", index_K), tensors.rows("b_enc", index_K), tensors.rows("threshold", index_K)
        )

    l0 = layer_in(location.text, r"average_l0_(\d+)")
    about = About(
        architecture="jumprelu",
        d_in=d_in,
        width=width,
        hook=hook,
        notes={} if l0 is None else {"declared_l0": l0},
    )
    decoder = Decoder(lambda index_K: tensors.rows("W_dec", index_K), lambda: tensors.whole("b_dec"))
    return Source(about, (tensors.path,), rows, decoder=decoder)


def _sizes(tensors: NpzFile) -> tuple[int, int]:
    d_in, _ = tensors.matrix("W_enc")
    width = tensors.vector("threshold")
    tensors.expect("W_enc", (d_in, width))
    tensors.expect("b_enc", (width,))
    return d_in, width


def _hook(location: Location) -> str | None:
    """The hook point by its name in TransformerLens, from the repository's and the folder's names."""
    layer = layer_in(location.text, r"layer_(\d+)")
    site = re.search(r"gemma-scope-[\w.]+-(?:pt|it)-(res|mlp|att|transcoders)", location.text)
    if "embedding" in location.text:
        return "hook_embed"
    if layer is None or site is None:
        return None
    place = {
        "res": "hook_resid_post",
        "mlp": "hook_mlp_out",
        "att": "attn.hook_z",
        "transcoders": "ln2.hook_normalized",
    }
    return f"blocks.{layer}.{place[site[1]]}"
