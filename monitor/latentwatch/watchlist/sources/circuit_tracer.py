"""circuit-tracer folders: per-layer transcoders (layer_<l>.safetensors) and cross-layer ones (W_enc_<l>.safetensors).

ReLU, JumpReLU or TopK of W_enc [F, D] @ x + b_enc; the decoder's bias and skip connection leave activations alone.
config.yaml says what the encoder reads; only the residual stream between layers can be watched, which is
`hook_resid_pre` of the layer above. `mlp.hook_in`, `ln2.hook_normalized` and `hook_resid_mid` are other tensors.
Upstream truth: circuit_tracer/transcoder/{single_layer,cross_layer}_transcoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from latentwatch.errors import RefusalReason
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.sources import About, Source, SourceOptions
from latentwatch.watchlist.tensors import SafetensorsFile


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open the layer of a transcoder folder that reads the hook point."""
    options.refuse_unused(location)
    config = _config(location)
    layer = _layer(location, config.text("feature_input_hook") or "", hook_point)
    cross = location.has(f"W_enc_{layer}.safetensors")
    suffix = f"_{layer}" if cross else ""
    tensors = SafetensorsFile(location.file(f"W_enc_{layer}.safetensors" if cross else f"layer_{layer}.safetensors"))
    width = tensors.vector(f"b_enc{suffix}")
    d_in = tensors.vector(f"b_dec{suffix}")
    tensors.expect(f"W_enc{suffix}", (width, d_in))
    threshold = f"threshold{suffix}" if cross else "activation_function.threshold"
    if threshold in tensors.entries:
        tensors.expect(threshold, (width,))

    def rows(index_K: Sequence[int]) -> EncoderRows:
        w_KD, bias_K = tensors.rows(f"W_enc{suffix}", index_K), tensors.rows(f"b_enc{suffix}", index_K)
        if threshold not in tensors.entries:
            return canonical.relu(w_KD, bias_K)
        return canonical.jumprelu(w_KD, bias_K, tensors.rows(threshold, index_K))

    about = About(
        architecture=("cross-layer" if cross else "per-layer") + " transcoder",
        units="activation of the transcoder as published",
        d_in=d_in,
        width=width,
        hook=f"blocks.{hook_point.layer}.hook_resid_post",
        notes=config.noted("model_name", "feature_input_hook"),
        k=int(tensors.scalar("k")) if "k" in tensors.entries else None,
    )
    return Source(about, (location.file("config.yaml"), tensors.path), rows)


def _config(location: Location) -> Config:
    try:
        config = yaml.safe_load(location.file("config.yaml").read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise location.refuse(
            f"config.yaml is not YAML ({' '.join(str(error).split())[:160]})", "Fetch it again."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("feature_input_hook"), str):
        raise location.refuse("config.yaml names no feature_input_hook", "Add it: the tensor that the encoder reads.")
    return Config(location, "config.yaml", config)


def _layer(location: Location, hook: str, hook_point: HookPoint) -> int:
    """The transcoder's layer whose input is the stream at the hook point."""
    if hook.endswith("hook_resid_pre"):
        return hook_point.layer + 1
    if hook.endswith("hook_resid_post"):
        return hook_point.layer
    raise location.refuse(
        f"its encoders read {hook!r}, which is not the residual stream between two layers",
        "Use transcoders that read hook_resid_pre, or an SAE of the residual stream.",
        RefusalReason.SOURCE_HOOK_POINT,
    )
