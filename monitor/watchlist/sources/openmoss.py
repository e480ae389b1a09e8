"""OpenMOSS checkpoints (lm-saes, now llamascopium): config.json beside sae_weights.safetensors.

    x -> norm (outside of encode) -> @ W_E + b_E;   gated on pre * |W_D row| if sparsity_include_decoder_norm, act = pre

Upstream truth: src/llamascopium/models/{sae,sparse_dictionary}.py; older files name the tensors `encoder.weight`
(transposed) and `log_jumprelu_threshold`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monitor.names import HookPoint
from monitor.watchlist import canonical
from monitor.watchlist.canonical import EncoderRows
from monitor.watchlist.location import Location
from monitor.watchlist.sources import About, Options, Source, refuse_architecture
from monitor.watchlist.tensors import F64, SafetensorsFile


class _Tensors:
    """The tensors by their present or their former names."""

    def __init__(self, file: SafetensorsFile) -> None:
        self.file = file
        self._former = "encoder.weight" in file.entries
        shape = file.shape("encoder.weight" if self._former else "W_E")
        self.d_in, self.width = shape[::-1] if self._former else shape
        file.expect(self._bias, (self.width,))

    @property
    def _bias(self) -> str:
        return "encoder.bias" if self._former else "b_E"

    def encoder(self, index_K: Sequence[int]) -> tuple[F64, F64]:
        """Rows and biases."""
        former = self._former
        w_KD = self.file.rows("encoder.weight", index_K) if former else self.file.columns("W_E", index_K)
        return w_KD, self.file.rows(self._bias, index_K)

    def decoder_norms(self, index_K: Sequence[int]) -> F64:
        if self._former:
            return np.asarray(np.linalg.norm(self.file.columns("decoder.weight", index_K), axis=1))
        return np.asarray(np.linalg.norm(self.file.rows("W_D", index_K), axis=1))

    def threshold(self, index_K: Sequence[int]) -> F64:
        name = "log_jumprelu_threshold"
        return np.exp(self.file.rows(name if name in self.file.entries else f"activation_function.{name}", index_K))


def open_source(location: Location, hook_point: HookPoint, options: Options) -> Source:  # noqa: ARG001
    """Open one SAE's folder."""
    options.refuse_unused(location)
    config = location.json("config.json")
    _check(location, config)
    tensors = _Tensors(SafetensorsFile(location.file("sae_weights.safetensors")))
    norm, scale = _normalisation(location, config, tensors)
    activation = config.get("act_fn", "relu")
    include_norm = bool(config.get("sparsity_include_decoder_norm", True))

    def rows(index_K: Sequence[int]) -> EncoderRows:
        w_KD, bias_K = tensors.encoder(index_K)
        norms_K = tensors.decoder_norms(index_K) if include_norm else np.ones(len(index_K))
        if activation == "jumprelu":
            built = canonical.jumprelu(w_KD, bias_K, tensors.threshold(index_K) / norms_K, norm=norm)
        else:
            built = canonical.relu(w_KD, bias_K, norm=norm, rank_K=norms_K)
        return canonical.input_scaled(built, scale)

    about = About(
        architecture=str(activation),
        kind="sae",
        units="activation of the SAE as published, for its normalised input",
        d_in=tensors.d_in,
        width=tensors.width,
        hook=config.get("hook_point_in"),
        notes={"norm_activation": config.get("norm_activation")},
        k=int(config["top_k"]) if activation == "topk" else None,
    )
    return Source(about, (location.file("config.json"), tensors.file.path), rows)


def _check(location: Location, config: Mapping[str, Any]) -> None:
    kind, activation = config.get("sae_type", "sae"), config.get("act_fn", "relu")
    if kind != "sae":
        raise refuse_architecture(location, str(kind), "only plain SAEs and transcoders of this library are read")
    if config.get("use_glu_encoder"):
        raise refuse_architecture(location, "GLU encoder", "its pre-activation is a product of two linear ones")
    if activation not in ("relu", "jumprelu", "topk"):
        raise refuse_architecture(
            location, str(activation), "which features fire depends on the whole batch; convert it to JumpReLU first"
        )
    if activation == "topk" and not isinstance(config.get("top_k"), int):
        raise location.refuse(f"a TopK SAE with top_k = {config.get('top_k')!r}", "Fetch the file again.")


def _normalisation(location: Location, config: Mapping[str, Any], tensors: _Tensors) -> tuple[str, float]:
    mode = config.get("norm_activation", "dataset-wise")
    if mode == "inference":
        return "none", 1.0
    if mode == "token-wise":
        return "constant_norm", 1.0
    key = f"dataset_average_activation_norm.{config.get('hook_point_in')}"
    if mode != "dataset-wise" or key not in tensors.file.entries:
        raise location.refuse(
            f"norm_activation is {mode!r}" + (f" and tensor {key!r} is missing" if mode == "dataset-wise" else ""),
            "Only token-wise, dataset-wise with its mean norm, and inference can be scored token by token.",
            "source_scale_missing",
        )
    mean_norm = float(tensors.file.whole(key))
    if not mean_norm > 0:
        raise location.refuse(f"the mean norm of the training activations is {mean_norm}", "Fetch the file again.")
    return "none", math.sqrt(tensors.d_in) / mean_norm
