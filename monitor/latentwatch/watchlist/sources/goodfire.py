"""Goodfire's SAEs for Llama 3: one .pth or .pt state dict, ReLU, nothing subtracted from the input.

Upstream truth: the model cards' `SparseAutoEncoder.encode`. The layer is in the file's name (`...-SAE-l19.pth`).
"""

from __future__ import annotations

from collections.abc import Sequence

from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Unread
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.places import number_named
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions
from latentwatch.watchlist.tensors_torch import TorchFile


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open the state dict."""
    options.refuse_unused(location)
    tensors = TorchFile(location.file())
    width, d_in = tensors.matrix("encoder_linear.weight")
    tensors.declare(
        location,
        {"encoder_linear.weight": (width, d_in), "encoder_linear.bias": (width,)},
        {
            "decoder_linear.weight": Unread("of the decoder", (d_in, width)),
            "decoder_linear.bias": Unread("of the decoder", (d_in,)),
        },
    )
    layer = number_named(location, r".*-SAE-l(\d+)(?:\.pth?)?", within=2)

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return canonical.relu(
            tensors.rows("encoder_linear.weight", index_K), tensors.rows("encoder_linear.bias", index_K)
        )

    about = About(
        architecture="standard",
        d_in=d_in,
        width=width,
        places=() if layer is None else (f"blocks.{layer}.hook_resid_post",),
    )
    decoder = Decoder(
        lambda index_K: tensors.columns("decoder_linear.weight", index_K), lambda: tensors.whole("decoder_linear.bias")
    )
    return Source(about, (tensors.path,), rows, decoder=decoder)
