"""What SAELens does to the stream before the encoder: a norm, a factor, and the centring of TransformerLens.

Three things stand in no cfg.json, or in no old one, but in SAELens' registry of releases (pretrained_saes.yaml): that
gpt2-small-res-jb was trained on a centred stream, that mistral-7b-res-wg rescales to a constant norm, and the factors
of `expected_average_only_in`. They are asked for. A training checkpoint of version 6 has its factor beside it.
"""

from __future__ import annotations

from typing import Final

from latentwatch.errors import RefusalReason
from latentwatch.watchlist.declared import Known
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import SourceOptions
from latentwatch.watchlist.sources.saelens_config import SaelensConfig

SCALER: Final = "activation_scaler.json"
"""Beside the weights of a training checkpoint: the factor that is not yet folded into them."""
_SCALER: Final = Known(used=frozenset(("scaling_factor",)), only={"has_whitening": (False,)})
NORM_OF: Final = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": "none",
}


def preparation(location: Location, config: SaelensConfig, options: SourceOptions) -> tuple[str, float]:
    """The norm, as `file.NORMS` names it, and the factor that the stream is multiplied by after it.

    Raises: WatchlistRefused: the files do not say it and no option does, or an option says what they say.
    """
    mode = _mode(location, config, options)
    if mode not in NORM_OF:
        raise location.refuse(
            f"normalize_activations is {mode!r}", f"Fold it into the weights first; known are {', '.join(NORM_OF)}."
        )
    scale = _input_scale(location, mode, options)
    return _centred(location, NORM_OF[mode], config, options), scale


def _mode(location: Location, config: SaelensConfig, options: SourceOptions) -> str:
    stated = config.norm_mode
    if stated is not None and options.norm is not None:
        raise location.refuse(
            f"normalize_activations is {stated!r}, so option norm = {options.norm!r} has no meaning",
            "Remove it.",
            RefusalReason.SOURCE_OPTION,
        )
    mode = stated or options.norm
    if mode is None:
        raise location.refuse(
            "its cfg.json is too old to say how the stream was normalised (no normalize_activations)",
            "Give option norm: none, layer_norm, constant_norm_rescale or expected_average_only_in; SAELens' registry "
            "(pretrained_saes.yaml, config_overrides of the release) says it where it is not none.",
            RefusalReason.SOURCE_OPTION,
        )
    return mode


def _input_scale(location: Location, mode: str, options: SourceOptions) -> float:
    stated = location.config(SCALER, _SCALER).number("scaling_factor") if location.has(SCALER) else None
    if stated is not None and (mode != "expected_average_only_in" or options.input_scale not in (None, stated)):
        raise location.refuse(
            f"{SCALER} says that its stream is multiplied by {stated}, normalize_activations is {mode!r} and option "
            f"input_scale is {options.input_scale}",
            "Remove the wrong one.",
            RefusalReason.SOURCE_OPTION,
        )
    if mode != "expected_average_only_in":
        if options.input_scale is not None:
            raise location.refuse(
                f"normalize_activations is {mode!r}, so option input_scale = {options.input_scale} has no meaning",
                "Remove it.",
                RefusalReason.SOURCE_OPTION,
            )
        return 1.0
    scale = options.input_scale if stated is None else stated
    if scale is None or not scale > 0:
        raise location.refuse(
            "normalize_activations is 'expected_average_only_in', whose factor is not in the files",
            "Give option input_scale: sqrt(d_model) / (mean norm of the training activations), or 1 if it is folded.",
            RefusalReason.SOURCE_SCALE_MISSING,
        )
    return scale


def _centred(location: Location, norm: str, config: SaelensConfig, options: SourceOptions) -> str:
    """TransformerLens may subtract each token's mean from the stream; the files only say how the model was loaded."""
    centred = config.centred
    if centred is not False and options.centre is None:
        how = "on a model loaded with center_writing_weights" if centred else "by a version that does not say how the "
        how += "" if centred else "model was loaded (no model_from_pretrained_kwargs)"
        raise location.refuse(
            f"it was trained {how}",
            "Give option centre: true if the stream that it was trained on had its mean subtracted (a LayerNorm model "
            "loaded with center_writing_weights, as SAELens' registry says of gpt2-small-res-jb), else false.",
            RefusalReason.SOURCE_OPTION,
        )
    if centred is False and options.centre is not None:
        raise location.refuse(
            f"its model was loaded without center_writing_weights, so option centre = {options.centre} has no meaning",
            "Remove it.",
            RefusalReason.SOURCE_OPTION,
        )
    if not options.centre:
        return norm
    if norm != "none":
        raise location.refuse(
            f"option centre does not go with the norm {norm!r}", "Remove it.", RefusalReason.SOURCE_OPTION
        )
    return "centre"
