"""EleutherAI sparsify folders: cfg.json beside sae.safetensors; ReLU, then the k largest of a token.

    x -> - b_dec (unless cfg.transcode) -> encoder -> relu -> top k

The folder is named after the hookpoint: `layers.7` is the output of layer 7, `layers.7.mlp` that of its MLP.
Upstream truth: sparsify/{sparse_coder,fused_encoder}.py of 1.3.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, refuse_architecture
from latentwatch.watchlist.tensors import SafetensorsFile


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open the folder of one hookpoint."""
    options.refuse_unused(location)
    config = location.config("cfg.json")
    k = _k(location, config)
    tensors = SafetensorsFile(location.file("sae.safetensors"))
    width, d_in = tensors.matrix("encoder.weight")
    tensors.expect("encoder.bias", (width,))
    transcode = config.flag("transcode", False)
    if not transcode:
        tensors.expect("b_dec", (d_in,))

    def rows(index_K: Sequence[int]) -> EncoderRows:
        w_KD, bias_K = tensors.rows("encoder.weight", index_K), tensors.rows("encoder.bias", index_K)
        return canonical.relu(w_KD, bias_K, None if transcode else tensors.whole("b_dec"))

    about = About(
        architecture="topk",
        d_in=d_in,
        width=width,
        hook=_hook(location, transcode),
        k=k,
    )
    decoder = Decoder(lambda index_K: tensors.rows("W_dec", index_K), lambda: tensors.whole("b_dec"))
    return Source(about, (location.file("cfg.json"), tensors.path), rows, decoder=None if transcode else decoder)


def _k(location: Location, config: Config) -> int:
    activation = config.text("activation") or "topk"
    if activation != "topk":
        raise refuse_architecture(location, activation, "whether a feature fires depends on its group")
    if config.flag("signed", False):
        raise refuse_architecture(location, "signed topk", "it keeps the sign of the k largest magnitudes")
    k = config.count("k")
    if k is None:
        raise config.refuse("k", "a whole number above zero")
    return k


def _hook(location: Location, transcode: bool) -> str | None:
    """The hookpoint in the folder's name; None where the folder was renamed."""
    match = re.search(r"layers[._](\d+(?:\.\w+)*)/?$", location.text)
    if match is None:
        return None
    # A transcoder predicts the module's output from its input, so it reads before the named place.
    return f"the input of layers.{match[1]}" if transcode else f"layers.{match[1]}"
