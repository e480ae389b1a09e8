"""SAELens folders: cfg.json beside sae_weights.safetensors, of versions 3 to 6.

    x -> norm -> - b_dec (if apply_b_dec_to_input) -> @ W_enc + b_enc -> activation

Upstream truth: sae_lens/saes/*.py and loading/pretrained_sae_loaders.py of 6.54; for the flat cfg.json before
version 6, the `scaling_factor` tensor belongs to the decoder and leaves activations alone (sae_lens/sae.py of 5.x).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentwatch.arrays import F64
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Unread
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.places import refuse_other_place
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions
from latentwatch.watchlist.sources import saelens_input as stream
from latentwatch.watchlist.sources.saelens_config import SaelensConfig
from latentwatch.watchlist.tensors import SafetensorsFile

_NOTED = ("model_name", "sae_lens_version", "prepend_bos", "context_size", "dataset_path", "neuronpedia_id")


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open a SAELens folder."""
    options.refuse_unused(location, "input_scale", "centre", "norm")
    config = SaelensConfig(location)
    config.check_heads()
    refuse_other_place(location, config.places, hook_point)
    config.check_values()
    norm, scale = stream.preparation(location, config, options)
    scaler = [location.file(stream.SCALER)] if location.has(stream.SCALER) else []
    tensors = SafetensorsFile(location.file("sae_weights.safetensors"))
    names = _declare(location, tensors, config)

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return canonical.input_scaled(_rows(tensors, config, names, norm, index_K), scale)

    noted = config.top.noted(*_NOTED) | config.metadata.noted(*_NOTED)
    if config.top.text("dtype") not in (None, "float32", "torch.float32"):
        noted["dtype"] = f"{config.top.text('dtype')} in SAELens; scored here as the stored values say"
    if "scaling_factor" in tensors.entries:
        noted["scaling_factor"] = "of the decoder; activations are before it, as in SAELens"
    if scaler and scale != 1.0:
        noted["input_scale"] = str(scale)
    about = About(
        architecture=config.architecture,
        d_in=config.d_in,
        width=config.width,
        places=config.places,
        notes=noted,
        k=config.k,
    )
    decoder = None if config.transcoder else _decoder(tensors, config, scale)
    return Source(about, (location.file("cfg.json"), *scaler, tensors.path), rows, decoder=decoder)


def _declare(location: Location, tensors: SafetensorsFile, config: SaelensConfig) -> tuple[str, ...]:
    """The names of the per-feature vectors; every tensor of the file is declared with its shape."""
    if config.architecture == "gated":
        names: tuple[str, ...] = ("b_gate", "b_mag", "r_mag")
    elif config.architecture.startswith("jumprelu"):
        # Older training checkpoints hold its logarithm.
        logarithm = "threshold" not in tensors.entries and "log_threshold" in tensors.entries
        names = ("b_enc", "log_threshold" if logarithm else "threshold")
    else:
        names = ("b_enc",)
    used = {"W_enc": (config.d_in, config.width)} | dict.fromkeys(names, (config.width,))
    decoder = {"W_dec": (config.width, config.d_out), "b_dec": (config.d_out,)}
    if config.subtracts_b_dec:
        used["b_dec"] = (config.d_in,)
    if config.ranks_by_decoder:
        used["W_dec"] = (config.width, config.d_in)
    unread = {name: Unread("of the decoder", shape) for name, shape in decoder.items()}
    if config.skips:
        unread["W_skip"] = Unread("it adds to the output alone", (config.d_out, config.d_in))
    if config.flat:
        unread["scaling_factor"] = Unread("it scales the decoder's input", (config.width,))
    tensors.declare(location, used, unread)
    return names


def _rows(
    tensors: SafetensorsFile, config: SaelensConfig, names: Sequence[str], norm: str, index_K: Sequence[int]
) -> EncoderRows:
    w_KD = tensors.columns("W_enc", index_K)
    vectors = [tensors.rows(name, index_K) for name in names]
    offset_D = tensors.whole("b_dec") if config.subtracts_b_dec else None
    if config.architecture == "gated":
        return canonical.gated(w_KD, vectors[0], vectors[1], vectors[2], offset_D, norm)
    if config.architecture.startswith("jumprelu"):
        threshold_K = np.exp(vectors[1]) if names[1] == "log_threshold" else vectors[1]
        return canonical.jumprelu(w_KD, vectors[0], threshold_K, offset_D, norm)
    rows = canonical.relu(w_KD, vectors[0], offset_D, norm)
    if config.ranks_by_decoder:
        return canonical.scaled(rows, np.asarray(np.linalg.norm(tensors.rows("W_dec", index_K), axis=1)))
    return rows


def _decoder(tensors: SafetensorsFile, config: SaelensConfig, input_scale: float) -> Decoder:
    def rows(index_K: Sequence[int]) -> F64:
        w_KD = tensors.rows("W_dec", index_K)
        return w_KD / np.linalg.norm(w_KD, axis=1, keepdims=True) if config.ranks_by_decoder else w_KD

    return Decoder(rows, lambda: tensors.whole("b_dec"), input_scale)
