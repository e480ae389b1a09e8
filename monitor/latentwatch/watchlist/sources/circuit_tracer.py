"""circuit-tracer folders: per-layer transcoders (layer_<l>.safetensors) and cross-layer ones (W_enc_<l>.safetensors).

ReLU or JumpReLU of W_enc [F, D] @ x + b_enc; the decoder's bias and skip connection leave activations alone.
config.yaml says what the encoder reads; only the residual stream between layers can be watched, which is
`hook_resid_pre` of the layer above. `mlp.hook_in`, `ln2.hook_normalized` and `hook_resid_mid` are other tensors.
Upstream truth: circuit_tracer/transcoder/{single_layer,cross_layer}_transcoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Known, Unread, passed_over
from latentwatch.watchlist.document import Document
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.sources import About, Source, SourceOptions
from latentwatch.watchlist.tensors import SafetensorsFile

_KNOWN: Final = (
    Known(
        used=frozenset(("feature_input_hook", "model_kind", "transcoders")),
    )
    | passed_over("of the output", "feature_output_hook")
    | passed_over("a fact for people", "model_name", "repo_id", "revision", "subfolder", "scan")
)


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open the layer of a transcoder folder that reads the hook point."""
    options.refuse_unused(location)
    config = _config(location)
    layer = _layer(location, config.text("feature_input_hook") or "", hook_point)
    cross = location.has(f"W_enc_{layer}.safetensors")
    if config.text("model_kind") not in (None, "cross_layer_transcoder" if cross else "transcoder_set"):
        raise location.refuse(
            f"config.yaml says {config.text('model_kind')!r}, and its files are of another kind", "Fetch it again."
        )
    _refuse_files_elsewhere(location, config, layer)
    suffix = f"_{layer}" if cross else ""
    tensors = SafetensorsFile(location.file(f"W_enc_{layer}.safetensors" if cross else f"layer_{layer}.safetensors"))
    width = tensors.vector(f"b_enc{suffix}")
    d_in = tensors.vector(f"b_dec{suffix}")
    threshold = f"threshold{suffix}" if cross else "activation_function.threshold"
    used = {f"W_enc{suffix}": (width, d_in), f"b_enc{suffix}": (width,)}
    used |= {threshold: (width,)} if threshold in tensors.entries else {}
    unread = {f"b_dec{suffix}": Unread("of the decoder", (d_in,))}
    if not cross:
        unread["W_dec"] = Unread("of the decoder", (width, d_in))
        unread["W_skip"] = Unread("it adds to the output alone", (d_in, d_in))
    tensors.declare(location, used, unread)

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
        places=(f"blocks.{layer}.{config.text('feature_input_hook')}",),
        notes=config.noted("model_name", "feature_input_hook"),
    )
    return Source(about, (location.file("config.yaml"), tensors.path), rows)


def _config(location: Location) -> Config:
    try:
        config = Document("config.yaml", location.file("config.yaml").read_bytes()).value
    except WatchlistRefused as refusal:
        raise location.refuse(f"{refusal.what}: {refusal.found}", "Fetch it again.") from refusal
    if not isinstance(config, dict) or not isinstance(config.get("feature_input_hook"), str):
        raise location.refuse("config.yaml names no feature_input_hook", "Add it: the tensor that the encoder reads.")
    return Config(location, "config.yaml", config, _KNOWN)


def _layer(location: Location, hook: str, hook_point: HookPoint) -> int:
    """The transcoder's layer whose input is the stream at the hook point."""
    if hook == "hook_resid_pre":
        return hook_point.layer + 1
    if hook == "hook_resid_post":
        return hook_point.layer
    raise location.refuse(
        f"its encoders read {hook!r}, which is not the residual stream between two layers",
        "Use transcoders that read hook_resid_pre, or an SAE of the residual stream.",
        RefusalReason.SOURCE_HOOK_POINT,
    )


def _refuse_files_elsewhere(location: Location, config: Config, layer: int) -> None:
    """circuit-tracer reads the files that `transcoders` lists, layer by layer, and not those beside it."""
    listed = config.fields.get("transcoders")
    if listed is None:
        return
    own = listed[layer] if isinstance(listed, list) and layer < len(listed) else None
    if not isinstance(own, str) or own.rsplit("/", 1)[-1].split("?")[0] != f"layer_{layer}.safetensors":
        raise location.refuse(
            f"config.yaml lists {own!r} for layer {layer}, not the file layer_{layer}.safetensors",
            "Give the folder that holds that file, with a config.yaml of its own.",
        )
