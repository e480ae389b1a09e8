"""Llama Scope as first published (fnlp, arXiv 2410.20526): hyperparams.json beside checkpoints/final.safetensors.

Trained as TopK, published as JumpReLU with one threshold for all features. Its authors' loader folds the scale of the
training activations into the biases and the decoder norm into the encoder, and applies the threshold after that:

    f = sqrt(d) / mean norm;   n = |decoder column| * f_in / f_out
    pre = n * ((x - b_dec / f_out) @ W_enc + b_enc / f_in);   act = pre if pre > threshold

Upstream truth: src/lm_saes/sae.py of OpenMOSS/Language-Model-SAEs at f7315179 (`from_config`, `encode`). SAELens' units
are f times these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from latentwatch.arrays import F64
from latentwatch.errors import RefusalReason
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, refuse_architecture
from latentwatch.watchlist.tensors import SafetensorsFile


class _Scales(NamedTuple):
    """f of what is read and of what is written."""

    read: float
    written: float


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open one SAE's folder."""
    options.refuse_unused(location)
    config = location.config("hyperparams.json")
    threshold = _threshold(location, config)
    if config.flag("use_glu_encoder", False):
        raise refuse_architecture(location, "GLU encoder", "its pre-activation is a product of two linear ones")
    tensors = SafetensorsFile(location.file("checkpoints/final.safetensors"))
    width, d_in = tensors.matrix("encoder.weight")
    tensors.expect("encoder.bias", (width,))
    tensors.expect("decoder.weight", (d_in, width))
    scales = _scales(location, config, d_in)
    about = About(
        architecture="jumprelu",
        units="activation as its authors' loader gives it, in units of the residual stream",
        d_in=d_in,
        width=width,
        hook=config.text("hook_point_in"),
        notes=config.noted("act_fn", "top_k"),
    )
    files = (location.file("hyperparams.json"), tensors.path)
    return Source(about, files, _encoder(tensors, config, threshold, scales), decoder=_decoder(tensors, config, scales))


def _encoder(
    tensors: SafetensorsFile, config: Config, threshold: float, scales: _Scales
) -> Callable[[Sequence[int]], EncoderRows]:
    include_norm = _includes_norm(config)
    subtracts = config.flag("use_decoder_bias", True) and config.flag("apply_decoder_bias_to_pre_encoder", True)

    def rows(index_K: Sequence[int]) -> EncoderRows:
        factor_K = np.ones(len(index_K))
        if include_norm:
            norms_K = np.linalg.norm(tensors.columns("decoder.weight", index_K), axis=1)
            factor_K = norms_K * scales.read / scales.written
        bias_K = tensors.rows("encoder.bias", index_K) / scales.read
        offset_D = tensors.whole("decoder.bias") / scales.written if subtracts else None
        w_KD = tensors.rows("encoder.weight", index_K)
        with np.errstate(divide="ignore"):  # a dead decoder column; fold() refuses its gain of zero
            threshold_K = threshold / factor_K
        return canonical.scaled(canonical.jumprelu(w_KD, bias_K, threshold_K, offset_D), factor_K)

    return rows


def _decoder(tensors: SafetensorsFile, config: Config, scales: _Scales) -> Decoder:
    include_norm = _includes_norm(config)

    def rows(index_K: Sequence[int]) -> F64:
        w_KD = tensors.columns("decoder.weight", index_K)
        if include_norm:
            return np.asarray(w_KD / np.linalg.norm(w_KD, axis=1, keepdims=True))
        return w_KD * scales.read / scales.written

    return Decoder(rows, lambda: tensors.whole("decoder.bias") / scales.written)


def _includes_norm(config: Config) -> bool:
    return config.flag("sparsity_include_decoder_norm", True)


def _threshold(location: Location, config: Config) -> float:
    activation, threshold = config.text("act_fn"), config.number("jump_relu_threshold") or 0.0
    if activation == "relu":
        return 0.0
    if activation not in ("jumprelu", "topk") or threshold <= 0:
        raise location.refuse(
            f"act_fn is {activation!r} with jump_relu_threshold {threshold!r}: no feature has a gate of its own",
            "Use the published JumpReLU form, or the openmoss format for newer checkpoints.",
            RefusalReason.SOURCE_ARCHITECTURE,
        )
    return threshold


def _scales(location: Location, config: Config, d_in: int) -> _Scales:
    mode = config.text("norm_activation") or "none"
    if mode in ("none", "inference"):
        return _Scales(1.0, 1.0)
    norms = config.section("dataset_average_activation_norm")
    norm_in, norm_out = norms.number("in") or 0.0, norms.number("out") or 0.0
    if mode != "dataset-wise" or norm_in <= 0 or norm_out <= 0:
        raise location.refuse(
            f"norm_activation is {mode!r} with dataset_average_activation_norm {dict(norms.fields)}",
            "Only 'dataset-wise' with its two norms can be folded into the rows.",
            RefusalReason.SOURCE_SCALE_MISSING,
        )
    return _Scales(math.sqrt(d_in) / norm_in, math.sqrt(d_in) / norm_out)
