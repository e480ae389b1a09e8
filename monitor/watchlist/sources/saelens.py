"""SAELens folders: cfg.json beside sae_weights.safetensors (written by version 6, `save_inference_model`).

    x -> norm -> - b_dec (if apply_b_dec_to_input) -> @ W_enc + b_enc -> activation

Upstream truth: sae_lens/saes/{sae,standard_sae,jumprelu_sae,gated_sae,batchtopk_sae}.py of 6.54.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from monitor.names import HookPoint
from monitor.watchlist import canonical
from monitor.watchlist.canonical import EncoderRows
from monitor.watchlist.location import Location
from monitor.watchlist.sources import About, Options, Source, refuse_architecture
from monitor.watchlist.tensors import F64, SafetensorsFile

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
    "topk": "whether a feature fires depends on every other feature; calibrated gates for TopK are not built yet",
}
_TRAINING_ONLY: Final = ("batchtopk", "matryoshka_batchtopk")
_NOTED: Final = ("model_name", "sae_lens_version", "prepend_bos", "context_size", "dataset_path", "neuronpedia_id")


class SaelensSource(Source):
    """An opened SAELens folder."""

    def __init__(self, location: Location, options: Options) -> None:
        self._location = location
        self._cfg = location.json("cfg.json")
        self._metadata = _metadata(self._cfg)
        self._tensors = SafetensorsFile(location.file("sae_weights.safetensors"))
        self.files = (location.file("cfg.json"), self._tensors.path)
        architecture = str(self._cfg.get("architecture", "standard"))
        _check_architecture(location, architecture)
        self._norm, self._input_scale = _normalisation(location, self._cfg, self._metadata, options)
        d_in, width = self._size()
        self.about = About(
            architecture=architecture,
            kind="sae",
            gate="exact",
            units="activation of the SAE as published",
            d_in=d_in,
            width=width,
            hook=self._metadata.get("hook_name"),
            notes={key: self._metadata[key] for key in _NOTED if self._metadata.get(key) is not None},
        )

    def _size(self) -> tuple[int, int]:
        sizes = [self._cfg.get("d_in"), self._cfg.get("d_sae")]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise self._location.refuse(f"cfg.json has d_in, d_sae = {sizes}", "Fetch the file again.")
        d_in, width = (int(size) for size in sizes if size is not None)
        expected = {"W_enc": (d_in, width), "b_dec": (d_in,)}
        names = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}
        expected |= dict.fromkeys(names.get(str(self._cfg.get("architecture")), ("b_enc",)), (width,))
        for name, shape in expected.items():
            self._tensors.expect(name, shape)
        return d_in, width

    def rows(self, index_K: Sequence[int]) -> EncoderRows:
        def picked(name: str) -> F64:
            return self._tensors.rows(name, index_K)

        w_KD = self._tensors.columns("W_enc", index_K)
        offset_D = self._tensors.whole("b_dec") if self._cfg.get("apply_b_dec_to_input", True) else None
        if self.about.architecture == "gated":
            rows = canonical.gated(w_KD, picked("b_gate"), picked("b_mag"), picked("r_mag"), offset_D, self._norm)
        elif self.about.architecture == "jumprelu":
            rows = canonical.jumprelu(w_KD, picked("b_enc"), picked("threshold"), offset_D, self._norm)
        else:
            rows = canonical.relu(w_KD, picked("b_enc"), offset_D, self._norm)
        return canonical.input_scaled(rows, self._input_scale)


def open_source(location: Location, hook_point: HookPoint, options: Options) -> Source:  # noqa: ARG001
    """Open a SAELens folder. The hook point is checked by the caller, against cfg.json."""
    options.refuse_unused(location, "input_scale", "centre")
    return SaelensSource(location, options)


def _metadata(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata = cfg.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _check_architecture(location: Location, architecture: str) -> None:
    if architecture in _TRAINING_ONLY:
        raise refuse_architecture(
            location, architecture, "this is a training checkpoint; save it with save_inference_model()"
        )
    if "transcoder" in architecture:
        raise refuse_architecture(location, architecture, "a transcoder reads the input of an MLP, not the stream")
    if architecture not in ("standard", "jumprelu", "gated"):
        raise refuse_architecture(location, architecture, _NOT_LINEAR.get(architecture, "it is unknown here"))


def _normalisation(
    location: Location, cfg: Mapping[str, Any], metadata: Mapping[str, Any], options: Options
) -> tuple[str, float]:
    """The canonical norm and the factor on its result."""
    mode = cfg.get("normalize_activations", "none")
    if cfg.get("reshape_activations", "none") != "none":
        raise location.refuse(
            f"it reshapes its input ({cfg['reshape_activations']})", "Only the residual stream can be watched."
        )
    if mode not in NORM_OF:
        raise location.refuse(
            f"normalize_activations is {mode!r}", f"Fold it into the weights first; known are {', '.join(NORM_OF)}."
        )
    return _centred(location, NORM_OF[mode], metadata, options), _input_scale(location, mode, options)


def _input_scale(location: Location, mode: str, options: Options) -> float:
    if (mode == "expected_average_only_in") != (options.input_scale is not None):
        if options.input_scale is not None:
            raise location.refuse(
                f"normalize_activations is {mode!r}, so option input_scale = {options.input_scale} has no meaning",
                "Remove it.",
                "source_option",
            )
        raise location.refuse(
            "normalize_activations is 'expected_average_only_in', whose factor is not in the files",
            "Give option input_scale: sqrt(d_model) / (mean norm of the training activations), or 1 if it is folded.",
            "source_scale_missing",
        )
    return options.input_scale or 1.0


def _centred(location: Location, norm: str, metadata: Mapping[str, Any], options: Options) -> str:
    """TransformerLens may subtract each token's mean from the stream; the files only say how the model was loaded."""
    processed = bool((metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"))
    if processed and options.centre is None:
        raise location.refuse(
            "it was trained on a model loaded with center_writing_weights",
            "Give option centre: true if that model has LayerNorm (its stream then has mean zero), false if RMSNorm.",
            "source_option",
        )
    if not options.centre:
        return norm
    if norm != "none":
        raise location.refuse(f"option centre does not go with the norm {norm!r}", "Remove it.", "source_option")
    return "centre"
