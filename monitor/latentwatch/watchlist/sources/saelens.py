"""SAELens folders: cfg.json beside sae_weights.safetensors, of versions 3 to 6.

    x -> norm -> - b_dec (if apply_b_dec_to_input) -> @ W_enc + b_enc -> activation

Upstream truth: sae_lens/saes/*.py and loading/pretrained_sae_loaders.py of 6.54; for the flat cfg.json before
version 6, the `scaling_factor` tensor belongs to the decoder and leaves activations alone (sae_lens/sae.py of 5.x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from latentwatch.arrays import F64
from latentwatch.errors import RefusalReason
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, refuse_architecture
from latentwatch.watchlist.tensors import SafetensorsFile

NORM_OF: Final = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": "none",
}
_NOT_LINEAR: Final = {
    "abstopk": "it keeps the sign of the k largest magnitudes, which depends on every other feature",
    "temporal": "its features depend on earlier tokens",
    "matching_pursuit": "its features are chosen one after another",
}
_TRAINING_ONLY: Final = ("batchtopk", "matryoshka_batchtopk")
_NOTED: Final = ("model_name", "sae_lens_version", "prepend_bos", "context_size", "dataset_path", "neuronpedia_id")


class _Saelens:
    """cfg.json of any version, read as version 6 reads it."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self.config = location.config("cfg.json")
        metadata = self.config.section("metadata")
        self.metadata = metadata if metadata.fields else self.config
        major = (self.metadata.text("sae_lens_version") or "0").split(".")[0]
        self.flat = not major.isdigit() or int(major) < 6
        """Written before version 6: names and defaults differ."""
        self.architecture = self._architecture()
        self.transcoder = "transcoder" in self.architecture
        self.subtracts_b_dec = self.config.flag("apply_b_dec_to_input", True) and not self.transcoder
        self.hook = self.metadata.text("hook_name") or self.config.text("hook_point")
        self.norm_mode = self._norm_mode()
        self.d_in, self.width = self._size("d_in"), self._size("d_sae")
        self.k = self._k() if self.architecture == "topk" else None

    def _architecture(self) -> str:
        architecture = self.config.text("architecture") or "standard"
        activation = self.config.text("activation_fn") or self.config.text("activation_fn_str") or "relu"
        if self.flat and activation == "topk":
            return "topk"
        if self.flat and activation != "relu":
            raise refuse_architecture(self._location, architecture, f"its activation is {activation!r}, not ReLU")
        return architecture

    def _norm_mode(self) -> str:
        mode = self.config.fields.get("normalize_activations")
        if isinstance(mode, bool):  # before version 4
            return "expected_average_only_in" if mode else "none"
        return self.config.text("normalize_activations") or "none"

    def _size(self, key: str) -> int:
        size = self.config.count(key)
        if size is None:
            raise self.config.refuse(key, "a whole number above zero")
        return size

    def _k(self) -> int:
        k = self.config.count("k") or self.config.section("activation_fn_kwargs").count("k")
        if k is None:
            raise self.config.refuse("k", "a whole number above zero")
        return k

    def check(self) -> None:
        """Refuse what has no linear row per feature on the residual stream."""
        if self.architecture in _TRAINING_ONLY:
            why = "this is a training checkpoint; save it with save_inference_model()"
            raise refuse_architecture(self._location, self.architecture, why)
        base = self.architecture.removeprefix("jumprelu_").removeprefix("skip_")
        if base not in ("standard", "jumprelu", "gated", "topk", "transcoder"):
            why = _NOT_LINEAR.get(self.architecture, "it is unknown here")
            raise refuse_architecture(self._location, self.architecture, why)
        reshaped = (self.config.text("reshape_activations") or "none") != "none"
        if reshaped or self.metadata.fields.get("hook_head_index") is not None:
            raise self._location.refuse(
                "it reads attention heads, not the residual stream", "Only the residual stream can be watched."
            )
        if self.norm_mode not in NORM_OF:
            raise self._location.refuse(
                f"normalize_activations is {self.norm_mode!r}",
                f"Fold it into the weights first; known are {', '.join(NORM_OF)}.",
            )


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open a SAELens folder. The hook point is checked by the caller, against cfg.json."""
    options.refuse_unused(location, "input_scale", "centre")
    config = _Saelens(location)
    config.check()
    norm = _centred(location, NORM_OF[config.norm_mode], config.metadata, options)
    scale = _input_scale(location, config.norm_mode, options)
    tensors = SafetensorsFile(location.file("sae_weights.safetensors"))
    names = _check_tensors(tensors, config)

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return canonical.input_scaled(_rows(tensors, config, names, norm, index_K), scale)

    noted = config.metadata.noted(*_NOTED)
    if "scaling_factor" in tensors.entries:
        noted["scaling_factor"] = "of the decoder; activations are before it, as in SAELens"
    about = About(
        architecture=config.architecture,
        d_in=config.d_in,
        width=config.width,
        hook=config.hook,
        notes=noted,
        k=config.k,
    )
    decoder = None if config.transcoder else _decoder(tensors, config, scale)
    return Source(about, (location.file("cfg.json"), tensors.path), rows, decoder=decoder)


def _check_tensors(tensors: SafetensorsFile, config: _Saelens) -> tuple[str, ...]:
    """The names of the per-feature vectors, with every shape checked."""
    if config.architecture == "gated":
        names: tuple[str, ...] = ("b_gate", "b_mag", "r_mag")
    elif config.architecture.startswith("jumprelu"):
        names = ("b_enc", "log_threshold" if "log_threshold" in tensors.entries else "threshold")
    else:
        names = ("b_enc",)
    expected = {"W_enc": (config.d_in, config.width)} | dict.fromkeys(names, (config.width,))
    if config.subtracts_b_dec:
        expected["b_dec"] = (config.d_in,)
    for name, shape in expected.items():
        tensors.expect(name, shape)
    return names


def _rows(
    tensors: SafetensorsFile, config: _Saelens, names: Sequence[str], norm: str, index_K: Sequence[int]
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
    if config.k is not None and config.config.flag("rescale_acts_by_decoder_norm", False):
        return canonical.scaled(rows, _decoder_norms(tensors, config, index_K))
    return rows


def _decoder(tensors: SafetensorsFile, config: _Saelens, input_scale: float) -> Decoder:
    rescaled = config.k is not None and config.config.flag("rescale_acts_by_decoder_norm", False)

    def rows(index_K: Sequence[int]) -> F64:
        tensors.expect("W_dec", (config.width, config.d_in))
        w_KD = tensors.rows("W_dec", index_K)
        return w_KD / np.linalg.norm(w_KD, axis=1, keepdims=True) if rescaled else w_KD

    return Decoder(rows, lambda: tensors.whole("b_dec"), input_scale)


def _decoder_norms(tensors: SafetensorsFile, config: _Saelens, index_K: Sequence[int]) -> F64:
    tensors.expect("W_dec", (config.width, config.d_in))
    return np.asarray(np.linalg.norm(tensors.rows("W_dec", index_K), axis=1))


def _input_scale(location: Location, mode: str, options: SourceOptions) -> float:
    if (mode == "expected_average_only_in") != (options.input_scale is not None):
        if options.input_scale is not None:
            raise location.refuse(
                f"normalize_activations is {mode!r}, so option input_scale = {options.input_scale} has no meaning",
                "Remove it.",
                RefusalReason.SOURCE_OPTION,
            )
        raise location.refuse(
            "normalize_activations is 'expected_average_only_in', whose factor is not in the files",
            "Give option input_scale: sqrt(d_model) / (mean norm of the training activations), or 1 if it is folded.",
            RefusalReason.SOURCE_SCALE_MISSING,
        )
    return options.input_scale or 1.0


def _centred(location: Location, norm: str, metadata: Config, options: SourceOptions) -> str:
    """TransformerLens may subtract each token's mean from the stream; the files only say how the model was loaded."""
    processed = metadata.section("model_from_pretrained_kwargs").flag("center_writing_weights", False)
    if processed and options.centre is None:
        raise location.refuse(
            "it was trained on a model loaded with center_writing_weights",
            "Give option centre: true if that model has LayerNorm (its stream then has mean zero), false if RMSNorm.",
            RefusalReason.SOURCE_OPTION,
        )
    if not options.centre:
        return norm
    if norm != "none":
        raise location.refuse(
            f"option centre does not go with the norm {norm!r}", "Remove it.", RefusalReason.SOURCE_OPTION
        )
    return "centre"
