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
from typing import Final, NamedTuple

import numpy as np

from latentwatch.arrays import F64
from latentwatch.errors import RefusalReason
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Known, Unread, passed_over
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, refuse_architecture
from latentwatch.watchlist.tensors import SafetensorsFile

_KNOWN: Final = (
    Known(
        used=frozenset(("hook_point_in", "d_model", "d_sae", "act_fn", "jump_relu_threshold", "norm_activation"))
        | {"dataset_average_activation_norm", "use_decoder_bias", "apply_decoder_bias_to_pre_encoder"}
        | {"sparsity_include_decoder_norm", "use_glu_encoder"},
        only={"sae_type": ("sae",)},
    )
    | passed_over("d_model and d_sae are compared with the tensors", "expansion_factor")
    | passed_over("of the output", "hook_point_out")
    | passed_over("the count that training kept; the published gate is a threshold", "top_k", "k_warmup_steps")
    | passed_over("where and how it was computed", "device", "dtype", "tp_size", "ddp_size", "strict_loading")
    | passed_over("a fact for people", "sae_pretrained_name_or_path")
    | passed_over(
        "how it was trained",
        *("seed", "lp", "use_batch_norm_mse", "use_ghost_grads", "l1_coefficient", "l1_coefficient_warmup_steps"),
        *("decoder_exactly_unit_norm", "decoder_exactly_fixed_norm", "decoder_bias_init_method", "init_search"),
        *("init_decoder_norm", "init_encoder_norm", "init_encoder_with_decoder_transpose", "initial_k"),
        *("remove_gradient_parallel_to_decoder_directions", "jumprelu_threshold_grad_scale"),
    )
)
_NORMS: Final = Known(used=frozenset(("in", "out")))


class _Scales(NamedTuple):
    """f of what is read and of what is written."""

    read: float
    written: float


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open one SAE's folder."""
    options.refuse_unused(location)
    config = location.config("hyperparams.json", _KNOWN)
    threshold = _threshold(location, config)
    if config.flag("use_glu_encoder", False):
        raise refuse_architecture(location, "GLU encoder", "its pre-activation is a product of two linear ones")
    tensors = SafetensorsFile(location.file("checkpoints/final.safetensors"))
    width, d_in = tensors.matrix("encoder.weight")
    config.agrees("d_model", d_in)
    config.agrees("d_sae", width)
    decoder_bias = {"decoder.bias": (d_in,)}
    used = {"encoder.weight": (width, d_in), "encoder.bias": (width,), "decoder.weight": (d_in, width)}
    unread = {"decoder.bias": Unread("of the decoder", (d_in,))}
    tensors.declare(location, used | (decoder_bias if _subtracts(config) else {}), unread)
    hook = config.text("hook_point_in")
    scales = _scales(location, config, d_in)
    about = About(
        architecture="jumprelu",
        units="activation as its authors' loader gives it, in units of the residual stream",
        d_in=d_in,
        width=width,
        places=(hook,) if hook else (),
        notes=config.noted("act_fn", "top_k"),
    )
    files = (location.file("hyperparams.json"), tensors.path)
    return Source(about, files, _encoder(tensors, config, threshold, scales), decoder=_decoder(tensors, config, scales))


def _encoder(
    tensors: SafetensorsFile, config: Config, threshold: float, scales: _Scales
) -> Callable[[Sequence[int]], EncoderRows]:
    include_norm = _includes_norm(config)
    subtracts = _subtracts(config)

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


def _subtracts(config: Config) -> bool:
    return config.flag("use_decoder_bias", True) and config.flag("apply_decoder_bias_to_pre_encoder", True)


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
    norms = config.section("dataset_average_activation_norm", _NORMS)
    norm_in, norm_out = norms.number("in") or 0.0, norms.number("out") or 0.0
    if mode != "dataset-wise" or norm_in <= 0 or norm_out <= 0:
        raise location.refuse(
            f"norm_activation is {mode!r} with dataset_average_activation_norm {dict(norms.fields)}",
            "Only 'dataset-wise' with its two norms can be folded into the rows.",
            RefusalReason.SOURCE_SCALE_MISSING,
        )
    return _Scales(math.sqrt(d_in) / norm_in, math.sqrt(d_in) / norm_out)
