"""OpenAI's sparse autoencoders: one .pt state dict per layer, ReLU or TopK (the latter behind a layer norm).

    x -> LN(x) if activation is TopK -> - pre_bias -> encoder + latent_bias -> activation

Upstream truth: sparse_autoencoder/model.py. Published paths name the place (`gpt2-small/resid_post_mlp_v5_32k/...`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Known, Unread
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.places import named, number_named, refuse_other_layer
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, refuse_architecture
from latentwatch.watchlist.tensors_torch import TorchFile

_BESIDE: Final = Known(used=frozenset(("activation", "activation_state_dict")))
_TOPK: Final = Known(used=frozenset(("k",)), only={"postact_fn": ("ReLU",)})
_STATISTICS: Final = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open one state dict."""
    options.refuse_unused(location)
    tensors = TorchFile(location.file())
    width, d_in = tensors.matrix("encoder.weight")
    beside = tensors.declare(
        location,
        {"encoder.weight": (width, d_in), "latent_bias": (width,), "pre_bias": (d_in,)},
        {"decoder.weight": Unread("of the decoder", (d_in, width))}
        | dict.fromkeys(_STATISTICS, Unread("statistics of training", (width,))),
        _BESIDE,
    )
    activation = beside.text("activation") or "ReLU"
    if activation not in ("ReLU", "TopK"):
        raise refuse_architecture(location, activation, "only ReLU and TopK are read")
    k = _k(location, beside) if activation == "TopK" else None
    if activation == "ReLU":
        beside.section("activation_state_dict", Known())
    layer = number_named(location, r"(\d+)\.pt", within=1)
    refuse_other_layer(location, layer, hook_point)
    norm = "none" if k is None else "layer_norm"

    def rows(index_K: Sequence[int]) -> EncoderRows:
        w_KD, bias_K = tensors.rows("encoder.weight", index_K), tensors.rows("latent_bias", index_K)
        return canonical.relu(w_KD, bias_K, tensors.whole("pre_bias"), norm)

    about = About(
        architecture=activation,
        d_in=d_in,
        width=width,
        places=_places(location, layer),
        k=k,
    )
    decoder = Decoder(lambda index_K: tensors.columns("decoder.weight", index_K), lambda: tensors.whole("pre_bias"))
    return Source(about, (tensors.path,), rows, decoder=decoder)


def _k(location: Location, beside: Config) -> int:
    state = beside.section("activation_state_dict", _TOPK)
    k = state.count("k")
    if k is None or "postact_fn" not in state.fields:
        raise refuse_architecture(location, "TopK", f"its state is {dict(state.fields)}, without k or postact_fn")
    return k


def _places(location: Location, layer: int | None) -> tuple[str, ...]:
    place = named(location, r"(resid_post_mlp|resid_post_attn|mlp_post_act|resid_delta_[a-z]+)(?:_v\d.*)?", within=4)
    if layer is None or place is None:
        return ()
    return (f"blocks.{layer}.hook_resid_post" if place[1] == "resid_post_mlp" else f"{place[1]} of layer {layer}",)
