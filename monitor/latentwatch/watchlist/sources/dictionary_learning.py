"""dictionary_learning folders: ae.pt beside config.json, every dictionary class.

`normalize_activations` is already folded into the biases when a trainer saves (`scale_biases`). AutoEncoder's own
loader folds the decoder norm into the encoder unless told not to, so its activations are in units of that norm.
Upstream truth: dictionary_learning/dictionary.py and trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py of 0.1.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from latentwatch.arrays import F64
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, refuse_architecture, refuse_other_layer
from latentwatch.watchlist.tensors_torch import TorchFile

Rows = Callable[[TorchFile, Sequence[int]], EncoderRows]


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open a trainer's folder."""
    options.refuse_unused(location)
    trainer = location.config("config.json").section("trainer")
    name = _class_name(location, trainer)
    transposed, class_rows = _CLASSES[name]
    tensors = TorchFile(location.file("ae.pt"))
    width, d_in = _sizes(tensors, transposed)
    _check_threshold(location, name, tensors)
    hook = _hook(trainer)
    if hook is None:
        refuse_other_layer(location, _layer(trainer), hook_point)
    about = About(
        architecture=name,
        units="activation times the decoder norm" if name == "AutoEncoder" else "activation of the SAE as published",
        d_in=d_in,
        width=width,
        hook=hook,
        notes=trainer.noted("lm_name", "submodule_name", "layer"),
        k=int(tensors.scalar("k")) if name == "AutoEncoderTopK" else None,
    )
    decoder = Decoder(lambda index_K: _decoder(tensors, name, index_K), lambda: tensors.whole(_DECODER_BIAS[name]))
    files = (location.file("config.json"), tensors.path)
    return Source(about, files, functools.partial(class_rows, tensors), decoder=decoder)


def _class_name(location: Location, trainer: Config) -> str:
    name = trainer.text("dict_class")
    if name is None:
        raise location.refuse("config.json names no trainer.dict_class", "Give a folder saved by dictionary_learning.")
    if name not in _CLASSES:
        raise refuse_architecture(location, name, "it is not a dictionary class with a linear row per feature")
    return name


def _sizes(tensors: TorchFile, transposed: bool) -> tuple[int, int]:
    """Width and d_model; `transposed` classes store [width, d_model]."""
    first, second = tensors.matrix("encoder.weight" if transposed else "W_enc")
    return (first, second) if transposed else (second, first)


def _check_threshold(location: Location, name: str, tensors: TorchFile) -> None:
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE") and tensors.scalar("threshold") < 0:
        raise location.refuse(
            "its threshold was never learnt (it is below zero), so its features have no gate of their own",
            "Train past threshold_start_step, or set the threshold.",
        )


def _layer(trainer: Config) -> int | None:
    layer = trainer.number("layer")  # a layer may be 0, so it is no count
    return None if layer is None else int(layer)


def _hook(trainer: Config) -> str | None:
    """`submodule_name` is like resid_post_layer_5; where it is missing, only the layer is known."""
    layer, submodule = _layer(trainer), trainer.text("submodule_name")
    if submodule is None or layer is None:
        return None
    return f"blocks.{layer}.hook_resid_post" if "resid_post" in submodule else f"{submodule} of layer {layer}"


def _decoder(tensors: TorchFile, name: str, index_K: Sequence[int]) -> F64:
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        return tensors.rows("W_dec", index_K)
    w_KD = tensors.columns("decoder.weight", index_K)
    return w_KD / np.linalg.norm(w_KD, axis=1, keepdims=True) if name == "AutoEncoder" else w_KD


def _linear(tensors: TorchFile, index_K: Sequence[int]) -> tuple[F64, F64]:
    return tensors.rows("encoder.weight", index_K), tensors.rows("encoder.bias", index_K)


def _auto_encoder(tensors: TorchFile, index_K: Sequence[int]) -> EncoderRows:
    norms_K = np.linalg.norm(tensors.columns("decoder.weight", index_K), axis=1)
    return canonical.scaled(canonical.relu(*_linear(tensors, index_K), tensors.whole("bias")), norms_K)


def _auto_encoder_new(tensors: TorchFile, index_K: Sequence[int]) -> EncoderRows:
    return canonical.relu(*_linear(tensors, index_K))


def _gated(tensors: TorchFile, index_K: Sequence[int]) -> EncoderRows:
    vectors = [tensors.rows(name, index_K) for name in ("gate_bias", "mag_bias", "r_mag")]
    w_KD = tensors.rows("encoder.weight", index_K)
    return canonical.gated(w_KD, vectors[0], vectors[1], vectors[2], tensors.whole("decoder_bias"))


def _jump_relu(tensors: TorchFile, index_K: Sequence[int]) -> EncoderRows:
    return canonical.jumprelu(
        tensors.columns("W_enc", index_K), tensors.rows("b_enc", index_K), tensors.rows("threshold", index_K)
    )


def _top_k(tensors: TorchFile, index_K: Sequence[int]) -> EncoderRows:
    return canonical.relu(*_linear(tensors, index_K), tensors.whole("b_dec"))


def _batch_top_k(tensors: TorchFile, index_K: Sequence[int]) -> EncoderRows:
    threshold_K = np.full(len(index_K), tensors.scalar("threshold"))
    w_KD, bias_K = _linear(tensors, index_K)
    return canonical.jumprelu(w_KD, bias_K, threshold_K, tensors.whole("b_dec"))


def _matryoshka(tensors: TorchFile, index_K: Sequence[int]) -> EncoderRows:
    threshold_K = np.full(len(index_K), tensors.scalar("threshold"))
    w_KD, bias_K = tensors.columns("W_enc", index_K), tensors.rows("b_enc", index_K)
    return canonical.jumprelu(w_KD, bias_K, threshold_K, tensors.whole("b_dec"))


_CLASSES: Final[Mapping[str, tuple[bool, Rows]]] = {
    "AutoEncoder": (True, _auto_encoder),
    "AutoEncoderNew": (True, _auto_encoder_new),
    "GatedAutoEncoder": (True, _gated),
    "JumpReluAutoEncoder": (False, _jump_relu),
    "AutoEncoderTopK": (True, _top_k),
    "BatchTopKSAE": (True, _batch_top_k),
    "MatryoshkaBatchTopKSAE": (False, _matryoshka),
}
"""Class name to: whether it stores its encoder as [width, d_model], and its rows."""
_DECODER_BIAS: Final = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
    "JumpReluAutoEncoder": "b_dec",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "MatryoshkaBatchTopKSAE": "b_dec",
}
