"""All concerns together: one layer in memory at a time, whatever number of layers and concerns there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from latentwatch.arrays import F64
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.prompts.prompt import Part
from latentwatch.watchlist import captured
from latentwatch.watchlist.captured import CaptureJob
from latentwatch.watchlist.starter import concern as concerns
from latentwatch.watchlist.starter import measure, training
from latentwatch.watchlist.starter.concern import Detector, Split
from latentwatch.watchlist.starter.tokens import Encoded
from latentwatch.watchlist.starter.training import Settings, Windows

_FITTED: Final = (Part.TRAIN, Part.SELECTION)


def train(
    folder: Path,
    job: CaptureJob,
    encoded: Encoded,
    wanted: Sequence[str],
    *,
    exceedance_rate: float,
    traffic: Sequence[int],
    seed: int,
    progress: Callable[[str], None],
) -> list[Detector]:
    """A detector for each concern, chosen, fitted and measured.

    Args:   traffic: requests that the limits come from; empty for the ordinary texts that are not of a test family.
    Raises: WatchlistRefused: scikit-learn is missing, or a part of what was captured.
    """
    splits = {name: concerns.split(encoded.prompts, name) for name in wanted}
    try:
        import sklearn  # noqa: F401  # here it is only asked for
    except ImportError as error:
        raise WatchlistRefused(
            "watchlist start",
            found="scikit-learn is not installed; it fits the probes and the text classifiers beside them",
            instead="Run in a clone of the repository: pip install '.[start]'",
            reason=RefusalReason.PACKAGE_MISSING,
        ) from error
    selection: dict[str, dict[Settings, float]] = {name: {} for name in wanted}
    for index, layer in enumerate(job.layers):
        for windows in _windows(folder, job, encoded, index):
            for name, split in splits.items():
                for strength in training.STRENGTHS:
                    probe = concerns.train(split, windows, strength, (Part.TRAIN,))
                    figure = concerns.selection_figure(split, training.request_scores(probe, windows))
                    selection[name][Settings(layer, windows.window_tokens, strength)] = figure
        progress(f"layer {layer}: probes of {len(wanted)} concerns tried on their selection families")
    best = {name: max(figures, key=lambda one: figures[one]) for name, figures in selection.items()}
    rng = np.random.default_rng(seed)
    found: dict[str, Detector] = {}
    for index, layer in enumerate(job.layers):
        of_layer = [name for name in wanted if best[name].layer == layer]
        for windows in _windows(folder, job, encoded, index) if of_layer else ():
            for name in (name for name in of_layer if best[name].window_tokens == windows.window_tokens):
                found[name] = _detector(
                    encoded, splits[name], windows, best[name], selection[name], name, exceedance_rate, traffic, rng
                )
                progress(f"{name}: layer {layer}, {best[name].statistic}, measured on families that it never saw")
    return [found[name] for name in wanted]


def _windows(folder: Path, job: CaptureJob, encoded: Encoded, index: int) -> list[Windows]:
    layer = captured.layer(folder, job, index)
    last_R = np.array([encoded.last(at) for at in range(len(encoded.ids))])
    return [Windows(layer, last_R, width) for width in training.WINDOWS]


def _detector(
    encoded: Encoded,
    split: Split,
    windows: Windows,
    settings: Settings,
    selection: Mapping[Settings, float],
    name: str,
    exceedance_rate: float,
    traffic: Sequence[int],
    rng: np.random.Generator,
) -> Detector:
    probe = concerns.train(split, windows, settings.strength, _FITTED)
    score_R = training.request_scores(probe, windows)
    ordinary = list(traffic) or [at for part in _FITTED for at in split.ordinary[part]]
    rows = concerns.rows(encoded.prompts, split, score_R, rng)
    limit = _limit(score_R[ordinary], exceedance_rate)
    return Detector(name, settings, probe, selection, rows, limit, len(ordinary), score_R)


def _limit(ordinary: F64, rate: float) -> float:
    finite = np.maximum(ordinary, np.min(ordinary[np.isfinite(ordinary)], initial=0.0))
    return measure.limit_at(finite, rate)
