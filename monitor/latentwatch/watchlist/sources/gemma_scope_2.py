"""Gemma Scope 2 (Gemma 3): a folder with params.safetensors and mostly config.json; JumpReLU, nothing subtracted.

An affine skip connection of a transcoder belongs to its output and leaves activations alone.
Upstream truth: SAELens' gemma_3 loaders; the names are lower case in the files.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Known, Unread, passed_over
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.places import named, number_named, refuse_other_layer
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, refuse_architecture
from latentwatch.watchlist.tensors import SafetensorsFile

_PLACES: Final = {
    "resid_post": "output",
    "transcoder": "pre_feedforward_layernorm.output",
    "clt": "pre_feedforward_layernorm.output",
    "attn_out": "self_attn.o_proj.input",
    "mlp_out": "post_feedforward_layernorm.output",
}
_KNOWN: Final = (
    Known(
        used=frozenset(("architecture", "hf_hook_point_in", "width")),
        only={"type": ("sae", "transcoder", "clt", None), "affine_connection": (True, False, None)},
    )
    | passed_over("of the output", "hf_hook_point_out")
    | passed_over("a fact for people", "model_name", "l0")
)
_NOTED: Final = ("model_name", "width", "l0", "type")


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open a Gemma Scope 2 folder, or one .safetensors file of it."""
    options.refuse_unused(location)
    single = location.text.endswith(".safetensors")
    configured = not single and location.has("config.json")
    config = location.config("config.json", _KNOWN) if configured else Config(location, "config.json", {}, _KNOWN)
    architecture = config.text("architecture") or "jump_relu"
    if architecture != "jump_relu":
        raise refuse_architecture(location, architecture, "this format has JumpReLU encoders only")
    tensors = SafetensorsFile(location.file("" if single else "params.safetensors"))
    d_in, width = _sizes(location, tensors, config)
    layer = number_named(location, r"layer_(\d+)(?:_.*|\.safetensors)?", within=2)
    refuse_other_layer(location, layer, hook_point)
    places = [*_places(location, layer), config.text("hf_hook_point_in")]
    about = About(
        architecture="jumprelu",
        d_in=d_in,
        width=width,
        places=tuple(words for words in places if words),
        notes=config.noted(*_NOTED),
    )
    files = (location.file("config.json"), tensors.path) if configured else (tensors.path,)
    decoder = Decoder(lambda index_K: tensors.rows("w_dec", index_K), lambda: tensors.whole("b_dec"))
    return Source(about, files, functools.partial(_rows, tensors), decoder=decoder)


def _rows(tensors: SafetensorsFile, index_K: Sequence[int]) -> EncoderRows:
    return canonical.jumprelu(
        tensors.columns("w_enc", index_K), tensors.rows("b_enc", index_K), tensors.rows("threshold", index_K)
    )


def _sizes(location: Location, tensors: SafetensorsFile, config: Config) -> tuple[int, int]:
    d_in, _ = tensors.matrix("w_enc")
    width = tensors.vector("threshold")
    config.agrees("width", width)
    unread = {"w_dec": Unread("of the decoder"), "b_dec": Unread("of the decoder")}
    unread["affine_skip_connection"] = Unread("it adds to the output alone")
    used = {"w_enc": (d_in, width), "b_enc": (width,), "threshold": (width,)}
    tensors.declare(location, used, unread)
    return d_in, width


def _places(location: Location, layer: int | None) -> tuple[str, ...]:
    site = named(location, rf"({'|'.join(_PLACES)}|crosscoder)(?:_all)?", within=3)
    if layer is None or site is None:
        return ()
    return (f"model.layers.{layer}.{_PLACES.get(site[1], 'several layers')}",)
