"""dictionary_learning folders: ae.pt beside config.json, every dictionary class.

`normalize_activations` is already folded into the biases when a trainer saves (`scale_biases`). AutoEncoder's own
loader folds the decoder norm into the encoder unless told not to, so its activations are in units of that norm.
Upstream truth: dictionary_learning/dictionary.py and trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py of 0.1.0.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from latentwatch.arrays import F64
from latentwatch.errors import RefusalReason
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Known, Unread, passed_over
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.places import refuse_other_layer
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, refuse_architecture
from latentwatch.watchlist.tensors_torch import TorchFile

_TRAINER: Final = (
    Known(used=frozenset(("dict_class", "layer", "submodule_name", "activation_dim", "dict_size", "k")))
    | passed_over("a fact for people", "lm_name", "wandb_name", "trainer_class")
    | passed_over("folded into the biases when the trainer saves", "norm_factor")
    | passed_over(
        "how it was trained",
        *("lr", "steps", "seed", "device", "auxk_alpha", "warmup_steps", "decay_start", "threshold_beta"),
        *("threshold_start_step", "top_k_aux", "bandwidth", "sparsity_penalty", "sparsity_warmup_steps", "target_l0"),
        *("l1_penalty", "resample_steps", "anneal_start", "anneal_end", "sparsity_function", "sparsity_queue_length"),
        *("p_start", "p_end", "n_sparsity_updates", "initial_sparsity_penalty", "sparsity_update_steps"),
    )
    | passed_over("stored as tensor group_sizes; every group is active", "group_fractions", "group_sizes")
    | passed_over("weights of the loss", "group_weights")
)
_BUFFER: Final = Known(used=frozenset(("d_submodule",)), only={"io": ("out",)}) | passed_over(
    "how its training data was read",
    *("n_ctxs", "ctx_len", "refresh_batch_size", "out_batch_size", "device", "n_heads", "apply_W_O"),
)

Rows = Callable[[TorchFile, Sequence[int]], EncoderRows]


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open a trainer's folder."""
    options.refuse_unused(location)
    config = location.config("config.json", Known(used=frozenset(("trainer", "buffer"))))
    trainer, buffer = config.section("trainer", _TRAINER), config.section("buffer", _BUFFER)
    name = _class_name(location, trainer)
    class_rows = _CLASSES[name].rows
    tensors = TorchFile(location.file("ae.pt"))
    width, d_in = _declare(location, tensors, name)
    trainer.agrees("dict_size", width)
    for section, key in ((trainer, "activation_dim"), (buffer, "d_submodule")):
        section.agrees(key, d_in)
    if "k" in tensors.entries:
        trainer.agrees("k", int(tensors.scalar("k")))
    _check_threshold(location, name, tensors)
    refuse_other_layer(location, trainer.index("layer"), hook_point)
    about = About(
        architecture=name,
        units="activation times the decoder norm" if name == "AutoEncoder" else "activation of the SAE as published",
        d_in=d_in,
        width=width,
        places=_places(location, trainer),
        notes=trainer.noted("lm_name", "submodule_name", "layer"),
        k=int(tensors.scalar("k")) if name == "AutoEncoderTopK" else None,
    )
    decoder = Decoder(
        lambda index_K: _decoder(tensors, name, index_K), lambda: tensors.whole(_CLASSES[name].decoder_bias)
    )
    files = (location.file("config.json"), tensors.path)
    return Source(about, files, functools.partial(class_rows, tensors), decoder=decoder)


def _class_name(location: Location, trainer: Config) -> str:
    name = trainer.text("dict_class")
    if name is None:
        raise location.refuse("config.json names no trainer.dict_class", "Give a folder saved by dictionary_learning.")
    if name not in _CLASSES:
        raise refuse_architecture(location, name, "it is not a dictionary class with a linear row per feature")
    return name


def _declare(location: Location, tensors: TorchFile, name: str) -> tuple[int, int]:
    """Width and d_model, with every tensor of the class declared."""
    own = _CLASSES[name]
    first, second = tensors.matrix(own.encoder)
    width, d_in = (first, second) if own.transposed else (second, first)
    shape = (d_in, width) if own.transposed else (width, d_in)
    unread = {own.decoder: Unread("of the decoder", shape)}
    unread[own.decoder_bias] = Unread("of the decoder", (d_in,))
    used = {own.encoder: (first, second)} | dict.fromkeys(own.per_feature, (width,)) | dict.fromkeys(own.scalars, ())
    if own.subtracts:
        used[own.decoder_bias] = (d_in,)
    if name == "AutoEncoder":
        used[own.decoder] = shape
    if name == "AutoEncoderTopK":
        unread["threshold"] = Unread("a running mean of batch minima, which this class does not gate on", ())
    if name == "MatryoshkaBatchTopKSAE":
        unread["group_sizes"] = Unread("every group is active in use")
    tensors.declare(location, used, unread)
    return width, d_in


def _check_threshold(location: Location, name: str, tensors: TorchFile) -> None:
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE") and tensors.scalar("threshold") < 0:
        raise location.refuse(
            "its threshold was never learnt (it is below zero), so its features have no gate of their own",
            "Train past threshold_start_step, or set the threshold.",
        )


def _places(location: Location, trainer: Config) -> tuple[str, ...]:
    """`submodule_name` is like resid_post_layer_5; where it is missing, only the layer is known."""
    layer, submodule = trainer.index("layer"), trainer.text("submodule_name")
    if submodule is None:
        return ()
    match = re.fullmatch(r"resid_post_layer_(\d+)", submodule, re.ASCII)
    if match is None:
        return (submodule,)
    if layer is not None and layer != int(match[1]):
        raise location.refuse(
            f"config.json has layer {layer} and submodule_name {submodule!r}",
            "Correct the wrong one.",
            RefusalReason.SOURCE_HOOK_POINT,
        )
    return (f"blocks.{match[1]}.hook_resid_post",)


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


class _Class(NamedTuple):
    """The tensors of a dictionary class."""

    rows: Rows
    encoder: str
    transposed: bool
    """Whether the encoder is stored as [width, d_model]."""
    decoder: str
    decoder_bias: str
    subtracts: bool
    """Whether the encoder subtracts the decoder's bias."""
    per_feature: tuple[str, ...]
    scalars: tuple[str, ...] = ()


_LINEAR: Final = ("encoder.weight", True, "decoder.weight")
_MATRICES: Final = ("W_enc", False, "W_dec")
_CLASSES: Final[Mapping[str, _Class]] = {
    "AutoEncoder": _Class(_auto_encoder, *_LINEAR, "bias", True, ("encoder.bias",)),
    "AutoEncoderNew": _Class(_auto_encoder_new, *_LINEAR, "decoder.bias", False, ("encoder.bias",)),
    "GatedAutoEncoder": _Class(_gated, *_LINEAR, "decoder_bias", True, ("gate_bias", "mag_bias", "r_mag")),
    "JumpReluAutoEncoder": _Class(_jump_relu, *_MATRICES, "b_dec", False, ("b_enc", "threshold")),
    "AutoEncoderTopK": _Class(_top_k, *_LINEAR, "b_dec", True, ("encoder.bias",), ("k",)),
    "BatchTopKSAE": _Class(_batch_top_k, *_LINEAR, "b_dec", True, ("encoder.bias",), ("k", "threshold")),
    "MatryoshkaBatchTopKSAE": _Class(_matryoshka, *_MATRICES, "b_dec", True, ("b_enc",), ("k", "threshold")),
}
