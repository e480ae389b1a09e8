"""OpenAI's sparse autoencoders: one .pt state dict per layer, ReLU or TopK (the latter behind a layer norm).

    x -> LN(x) if activation is TopK -> - pre_bias -> encoder + latent_bias -> activation

Upstream truth: sparse_autoencoder/model.py. Published paths name the place (`gpt2-small/resid_post_mlp_v5_32k/...`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, layer_in, refuse_architecture
from latentwatch.watchlist.tensors_torch import TorchFile


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open one state dict."""
    options.refuse_unused(location)
    tensors = TorchFile(location.file())
    activation = tensors.other.get("activation", "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise refuse_architecture(location, str(activation), "only ReLU and TopK are read")
    k = _k(location, tensors.other.get("activation_state_dict")) if activation == "TopK" else None
    width, d_in = tensors.matrix("encoder.weight")
    tensors.expect("latent_bias", (width,))
    tensors.expect("pre_bias", (d_in,))
    norm = "none" if k is None else "layer_norm"

    def rows(index_K: Sequence[int]) -> EncoderRows:
        w_KD, bias_K = tensors.rows("encoder.weight", index_K), tensors.rows("latent_bias", index_K)
        return canonical.relu(w_KD, bias_K, tensors.whole("pre_bias"), norm)

    about = About(
        architecture=str(activation),
        d_in=d_in,
        width=width,
        hook=_hook(location),
        k=k,
    )
    decoder = Decoder(lambda index_K: tensors.columns("decoder.weight", index_K), lambda: tensors.whole("pre_bias"))
    return Source(about, (tensors.path,), rows, decoder=decoder)


def _k(location: Location, state: object) -> int:
    fields: Mapping[str, object] = state if isinstance(state, Mapping) else {}
    k, after = fields.get("k"), fields.get("postact_fn", "ReLU")
    if not isinstance(k, int) or k < 1 or after != "ReLU":
        raise refuse_architecture(location, "TopK", f"its k is {k!r} and what follows is {after!r}, not ReLU")
    return k


def _hook(location: Location) -> str | None:
    layer = layer_in(location.text, r"(\d+)\.pt$")
    place = re.search(r"(resid_post_mlp|resid_post_attn|mlp_post_act|resid_delta_\w+?)(?=_v\d|/|$)", location.text)
    if layer is None or place is None:
        return None
    return f"blocks.{layer}.hook_resid_post" if place[1] == "resid_post_mlp" else f"{place[1]} of layer {layer}"
