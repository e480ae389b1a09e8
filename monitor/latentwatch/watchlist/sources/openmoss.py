"""OpenMOSS checkpoints (lm-saes, now llamascopium): config.json beside sae_weights.safetensors.

    x -> norm (outside of encode) -> @ W_E + b_E;   gated on pre * |W_D row| if sparsity_include_decoder_norm, act = pre

Upstream truth: src/llamascopium/models/{sae,sparse_dictionary}.py; older files name the tensors `encoder.weight`
(transposed) and `log_jumprelu_threshold`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

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
        used=frozenset(("sae_type", "d_model", "d_sae", "expansion_factor", "act_fn", "norm_activation", "top_k"))
        | {"hook_point_in", "hook_point_out", "sparsity_include_decoder_norm", "use_glu_encoder"},
        only={"apply_decoder_bias_to_pre_encoder": (False,), "jump_relu_threshold": (0, 0.0, None)},
    )
    | passed_over("of the output", "use_decoder_bias")
    | passed_over("how fast it is computed", "use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel")
    | passed_over("where and how it was computed", "device", "dtype", "strict_loading", "sae_pretrained_name_or_path")
    | passed_over("how it was trained", "jumprelu_threshold_window", "jumprelu_threshold_grad_scale")
)
_BESIDE: Final = passed_over("it names the version that wrote the file", "version", "format")


class _Tensors:
    """The tensors by their present or their former names."""

    def __init__(self, location: Location, config: Config, file: SafetensorsFile) -> None:
        self.file = file
        self._former = "encoder.weight" in file.entries
        first, second = file.matrix("encoder.weight" if self._former else "W_E")
        self.d_in, self.width = (second, first) if self._former else (first, second)
        self._declare(location, config)

    def _declare(self, location: Location, config: Config) -> None:
        width, d_in, former = self.width, self.d_in, self._former
        decoder = ("decoder.weight", (d_in, width)) if former else ("W_D", (width, d_in))
        encoder = ("encoder.weight", (width, d_in)) if former else ("W_E", (d_in, width))
        used: dict[str, tuple[int, ...]] = {self._bias: (width,)} | dict((encoder, decoder))
        if config.text("act_fn") == "jumprelu":
            used[self._threshold] = (width,)
        unread = {self._decoder_bias: Unread("of the decoder", (d_in,))}
        for key in ("hook_point_in", "hook_point_out"):
            unread[f"dataset_average_activation_norm.{config.text(key)}"] = Unread("used if norms are dataset-wise")
        self.file.declare(location, used, unread, _BESIDE)
        config.agrees("d_model", d_in)
        config.agrees("d_sae", width)
        factor = config.number("expansion_factor")
        if factor is not None and int(d_in * factor) != width:
            raise location.refuse(
                f"config.json means {int(d_in * factor)} features, and there are {width}", "Fetch both files again."
            )

    @property
    def _decoder_bias(self) -> str:
        return "decoder.bias" if self._former else "b_D"

    @property
    def _threshold(self) -> str:
        name = "log_jumprelu_threshold"
        return name if name in self.file.entries else f"activation_function.{name}"

    @property
    def _bias(self) -> str:
        return "encoder.bias" if self._former else "b_E"

    def encoder(self, index_K: Sequence[int]) -> tuple[F64, F64]:
        """Rows and biases."""
        former = self._former
        w_KD = self.file.rows("encoder.weight", index_K) if former else self.file.columns("W_E", index_K)
        return w_KD, self.file.rows(self._bias, index_K)

    def decoder(self, index_K: Sequence[int]) -> F64:
        """Rows of the decoder, [K, D]."""
        return self.file.columns("decoder.weight", index_K) if self._former else self.file.rows("W_D", index_K)

    def decoder_bias(self) -> F64:
        """[D]; zero where the decoder has none."""
        name = self._decoder_bias
        return self.file.whole(name) if name in self.file.entries else np.zeros(self.d_in)

    def decoder_norms(self, index_K: Sequence[int]) -> F64:
        """Lengths of the decoder's rows."""
        return np.asarray(np.linalg.norm(self.decoder(index_K), axis=1))

    def threshold(self, index_K: Sequence[int]) -> F64:
        """Of the pre-activation times the decoder norm."""
        return np.exp(self.file.rows(self._threshold, index_K))


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open one SAE's folder."""
    options.refuse_unused(location)
    config = location.config("config.json", _KNOWN)
    _check(location, config)
    tensors = _Tensors(location, config, SafetensorsFile(location.file("sae_weights.safetensors")))
    norm, scale = _normalisation(location, config, tensors)
    activation = config.text("act_fn") or "relu"
    include_norm = config.flag("sparsity_include_decoder_norm", True)

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return canonical.input_scaled(_encoder_rows(tensors, index_K, activation, include_norm, norm), scale)

    about = About(
        architecture=activation,
        units="activation of the SAE as published, for its normalised input",
        d_in=tensors.d_in,
        width=tensors.width,
        places=(hook,) if (hook := config.text("hook_point_in")) else (),
        notes=config.noted("norm_activation"),
        k=config.count("top_k") if activation == "topk" else None,
    )
    transcoder = config.text("hook_point_out") not in (None, config.text("hook_point_in"))
    decoder = None if transcoder else Decoder(tensors.decoder, tensors.decoder_bias, scale)
    return Source(about, (location.file("config.json"), tensors.file.path), rows, decoder=decoder)


def _encoder_rows(
    tensors: _Tensors, index_K: Sequence[int], activation: str, include_norm: bool, norm: str
) -> EncoderRows:
    w_KD, bias_K = tensors.encoder(index_K)
    norms_K = tensors.decoder_norms(index_K) if include_norm else np.ones(len(index_K))
    if activation != "jumprelu":
        return canonical.relu(w_KD, bias_K, norm=norm, rank_K=norms_K)
    with np.errstate(divide="ignore"):  # a dead decoder row: a threshold of infinity, which fold() refuses
        threshold_K = tensors.threshold(index_K) / norms_K
    return canonical.jumprelu(w_KD, bias_K, threshold_K, norm=norm)


def _check(location: Location, config: Config) -> None:
    kind, activation = config.text("sae_type") or "sae", config.text("act_fn") or "relu"
    if kind != "sae":
        raise refuse_architecture(location, kind, "only plain SAEs and transcoders of this library are read")
    if config.flag("use_glu_encoder", False):
        raise refuse_architecture(location, "GLU encoder", "its pre-activation is a product of two linear ones")
    if activation not in ("relu", "jumprelu", "topk"):
        raise refuse_architecture(
            location, activation, "which features fire depends on the whole batch; convert it to JumpReLU first"
        )
    if activation == "topk" and config.count("top_k") is None:
        raise config.refuse("top_k", "a whole number above zero")


def _normalisation(location: Location, config: Config, tensors: _Tensors) -> tuple[str, float]:
    mode = config.text("norm_activation") or "dataset-wise"
    if mode == "inference":
        return "none", 1.0
    if mode == "token-wise":
        return "constant_norm", 1.0
    key = f"dataset_average_activation_norm.{config.text('hook_point_in')}"
    if mode != "dataset-wise" or key not in tensors.file.entries:
        raise location.refuse(
            f"norm_activation is {mode!r}" + (f" and tensor {key!r} is missing" if mode == "dataset-wise" else ""),
            "Only token-wise, dataset-wise with its mean norm, and inference can be scored token by token.",
            RefusalReason.SOURCE_SCALE_MISSING,
        )
    mean_norm = tensors.file.scalar(key)
    if not mean_norm > 0:
        raise location.refuse(f"the mean norm of the training activations is {mean_norm}", "Fetch the file again.")
    return "none", math.sqrt(tensors.d_in) / mean_norm
