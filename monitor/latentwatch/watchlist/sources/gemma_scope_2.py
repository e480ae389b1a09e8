"""Gemma Scope 2 (Gemma 3): a folder with params.safetensors and mostly config.json; JumpReLU, nothing subtracted.

An affine skip connection of a transcoder belongs to its output and leaves activations alone.
Upstream truth: SAELens' gemma_3 loaders; the names are lower case in the files.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Final

from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.sources import (
    About,
    Decoder,
    Source,
    SourceOptions,
    layer_in,
    refuse_architecture,
    refuse_other_layer,
)
from latentwatch.watchlist.tensors import SafetensorsFile

_PLACES: Final = {
    "resid_post": "output",
    "transcoder": "pre_feedforward_layernorm.output",
    "clt": "pre_feedforward_layernorm.output",
    "attn_out": "self_attn.o_proj.input",
    "mlp_out": "post_feedforward_layernorm.output",
}
_NOTED: Final = ("model_name", "width", "l0", "type")


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open a Gemma Scope 2 folder, or one .safetensors file of it."""
    options.refuse_unused(location)
    single = location.text.endswith(".safetensors")
    configured = not single and location.has("config.json")
    config = location.config("config.json") if configured else Config(location, "config.json", {})
    architecture = config.text("architecture") or "jump_relu"
    if architecture != "jump_relu":
        raise refuse_architecture(location, architecture, "this format has JumpReLU encoders only")
    tensors = SafetensorsFile(location.file("" if single else "params.safetensors"))
    d_in, width = _sizes(tensors)
    hook = config.text("hf_hook_point_in") or _hook(location)
    if hook is None:
        refuse_other_layer(location, layer_in(location.text, r"layer_(\d+)"), hook_point)
    about = About(
        architecture="jumprelu",
        d_in=d_in,
        width=width,
        hook=hook,
        notes=config.noted(*_NOTED),
    )
    files = (location.file("config.json"), tensors.path) if configured else (tensors.path,)
    decoder = Decoder(lambda index_K: tensors.rows("w_dec", index_K), lambda: tensors.whole("b_dec"))
    return Source(about, files, functools.partial(_rows, tensors), decoder=decoder)


def _rows(tensors: SafetensorsFile, index_K: Sequence[int]) -> EncoderRows:
    return canonical.jumprelu(
        tensors.columns("w_enc", index_K), tensors.rows("b_enc", index_K), tensors.rows("threshold", index_K)
    )


def _sizes(tensors: SafetensorsFile) -> tuple[int, int]:
    d_in, _ = tensors.matrix("w_enc")
    width = tensors.vector("threshold")
    tensors.expect("w_enc", (d_in, width))
    tensors.expect("b_enc", (width,))
    return d_in, width


def _hook(location: Location) -> str | None:
    layer = layer_in(location.text, r"layer_(\d+)")
    site = re.search("|".join(_PLACES), location.text)
    return None if layer is None or site is None else f"model.layers.{layer}.{_PLACES[site[0]]}"
