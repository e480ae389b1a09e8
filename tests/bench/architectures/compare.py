"""Whether the scores of a run are those of streams that somebody else computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from latentwatch.watchlist.file import Watchlist

from tests.support.oracle import expected_scores
from tests.support.recording import Scores

TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}
"""By the model's dtype, the largest error of a score that counts as right, relative to the score or to its feature's
root mean square, whichever is larger. Dense scores travel as float16, whose resolution is 1e-3; bfloat16's is 8e-3."""
APART = 0.1
"""The scores of the position before must be at least that far off, or being right says nothing."""


@dataclass(frozen=True)
class Comparison:
    positions: int
    worst: float
    """Error over all positions and features, as TOLERANCE has it; infinite where a score or a stream is missing."""
    beyond: int
    """Positions with an error beyond TOLERANCE."""
    median: float
    """Over positions, of their largest errors."""
    neighbour: float
    """Median over positions of the largest error, if each had been given the scores of the position before."""

    @property
    def exact(self) -> bool:
        return self.positions > 0 and self.beyond == 0 and self.neighbour > APART

    @property
    def same_place(self) -> bool:
        """At most positions nearly right: the stream is the same, and only arithmetic differs at some."""
        return self.median < APART / 2


def compare(
    watchlist: Watchlist, told: list[Scores], fed: list[list[int]], streams: Mapping[str, Any], tolerance: float
) -> Comparison | None:
    """Args: told: by request. streams: [T, D] by "<request>-<layer>". None: the streams are of another shape."""
    layers = [rows.hook_point.layer for rows in watchlist.hooks]
    expected, found, margins, norms, norms_found = [], [], [], [], []
    features = len(watchlist.sparse_F)
    for i, (scores, tokens) in enumerate(zip(told, fed, strict=True)):
        of_request = [np.asarray(streams[f"{i}-{layer}"], np.float64) for layer in layers if f"{i}-{layer}" in streams]
        if [x.shape for x in of_request] != [(len(tokens), watchlist.model.d_model)] * len(layers):
            return None
        act_TF, margin_TF = expected_scores(watchlist, of_request)
        expected.append(act_TF)
        margins.append(margin_TF)
        norms.append(np.stack([np.linalg.norm(x_TD, axis=1) for x_TD in of_request], axis=1))
        missing = np.full(features, np.inf)
        found.append(np.stack([scores.at.get(t, missing) for t in range(len(tokens))]))
        none = np.full(len(layers), np.inf)
        norms_found.append(np.stack([scores.norm_at.get(t, none) for t in range(len(tokens))]))
    sparse_F = watchlist.sparse_F
    errors_N = _errors(*map(np.concatenate, (expected, found, margins, norms, norms_found)), sparse_F, tolerance)
    shifted = [np.concatenate([x[:1], x[:-1]]) for x in expected]
    apart_N = _errors(*map(np.concatenate, (expected, shifted, margins, norms, norms)), sparse_F, tolerance)
    return Comparison(
        positions=len(errors_N),
        worst=float(errors_N.max()),
        beyond=int((errors_N > tolerance).sum()),
        median=float(np.median(errors_N)),
        neighbour=float(np.median(apart_N)),
    )


def _errors(
    expected_NF: Any, found_NF: Any, margin_NF: Any, norm_NH: Any, norm_found_NH: Any, sparse_F: Any, tolerance: float
) -> Any:
    """The largest error of each position, [N]. A sparse score at its very threshold may be on either side of it."""
    scale_NF = np.maximum(np.abs(expected_NF), np.sqrt(np.mean(expected_NF**2, axis=0)) + 1e-6)
    error_NF = np.abs(found_NF - expected_NF) / scale_NF
    error_NF[sparse_F & (np.abs(margin_NF) < tolerance * scale_NF)] = 0.0
    error_NH = np.abs(norm_found_NH - norm_NH) / np.maximum(norm_NH, 1e-6)
    return np.maximum(error_NF.max(axis=1), error_NH.max(axis=1))
