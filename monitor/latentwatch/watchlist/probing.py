"""Train a linear probe on recorded requests: logistic regression on every token, measured on requests held out.

A request's score is its tokens' logits, aggregated as a limit or a reader would: their largest, the largest mean over 8
tokens in a row, or the largest exponential moving average. Each is measured; the limit that is proposed is at the
1 % false positive rate of the held-out half and has to be set again on an operator's own traffic.

Legend: R requests, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import safetensors.numpy

from latentwatch import storage
from latentwatch.arrays import F64, Array, Bool
from latentwatch.names import HookPoint
from latentwatch.watchlist.activations import Recording
from latentwatch.watchlist.discover import midranks, split, tpr_at

WINDOW_TOKENS: Final = 8
EMA_TOKENS: Final = 8.0
PENALTIES: Final = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of the squared weights, per token of weight; one is chosen on a quarter of the training requests."""
NEWTON_STEPS: Final = 25


@dataclass(frozen=True)
class Probe:
    """A trained probe and what it reaches on the held-out half."""

    direction_D: F64
    bias: float
    mean_D: F64
    scale_D: F64
    figures: dict[str, dict[str, float]]
    """Aggregation ("max", "rolling_mean", "ema") to auroc, tpr_at_fpr_1pct, tpr_at_fpr_0_1pct and threshold."""
    n: int
    n_positive: int

    def logits(self, x_TD: Array) -> F64:
        """Of each token."""
        return np.asarray((x_TD - self.mean_D) / self.scale_D @ self.direction_D + self.bias)

    @property
    def best(self) -> str:
        """The aggregation with the largest held-out AUROC among those that a limit can have."""
        return max(("max", "rolling_mean"), key=lambda name: self.figures[name]["auroc"])


def train(recording: Recording, positive_R: Bool, groups: Sequence[str], *, seed: int = 0) -> Probe:
    """Fit on one half of the requests, measure on the other.

    Raises: WatchlistRefused: too few requests of either kind in a half.
    """
    rng = np.random.default_rng(seed)
    held_R = split(positive_R, groups, rng)
    fitted = recording.select(np.flatnonzero(~held_R).tolist())
    label_R = positive_R[~held_R]
    mean_D = fitted.x_TD.mean(axis=0, dtype=np.float64)
    scale_D = np.maximum(fitted.x_TD.std(axis=0, dtype=np.float64), 1e-6)
    penalty = _penalty(fitted, label_R, mean_D, scale_D, rng)
    direction_D, bias = _fit(fitted, label_R, mean_D, scale_D, penalty)
    bare = Probe(direction_D, bias, mean_D, scale_D, {}, int(held_R.sum()), int(positive_R[held_R].sum()))
    held = recording.select(np.flatnonzero(held_R).tolist())
    figures = {
        name: _figures(score_R, positive_R[held_R])
        for name, score_R in aggregated(bare.logits(held.x_TD), held).items()
    }
    return Probe(direction_D, bias, mean_D, scale_D, figures, bare.n, bare.n_positive)


def save(probe: Probe, path: Path, name: str, hook_point: HookPoint) -> None:
    """Write the probe in the linear_probe format."""
    tensors = {
        "direction": probe.direction_D[None],
        "bias": np.array([probe.bias]),
        "mean": probe.mean_D,
        "scale": probe.scale_D,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    float32 = {key: np.ascontiguousarray(value, np.float32) for key, value in tensors.items()}
    with storage.atomic_write(path, private=False) as file:
        file.write(safetensors.numpy.save(float32, {"names": f'["{name}"]', "hook_point": str(hook_point)}))


def aggregated(logit_T: F64, recording: Recording) -> dict[str, F64]:
    """Each request's score under each aggregation, [R]."""
    pieces = np.split(logit_T, recording.starts_R[1:])
    return {
        "max": np.array([piece.max() for piece in pieces]),
        "rolling_mean": np.array([_rolling(piece) for piece in pieces]),
        "ema": np.array([_ema(piece) for piece in pieces]),
    }


def _rolling(logit_T: F64) -> float:
    window = min(WINDOW_TOKENS, len(logit_T))
    total = np.concatenate([[0.0], np.cumsum(logit_T)])
    return float(((total[window:] - total[:-window]) / window).max())


def _ema(logit_T: F64) -> float:
    average, best = float(logit_T[0]), -np.inf
    for value in logit_T:
        average += (float(value) - average) / EMA_TOKENS
        best = max(best, average)
    return float(best)


def _figures(score_R: F64, positive_R: Bool) -> dict[str, float]:
    rank_R1, _ = midranks(score_R.astype(np.float32)[:, None])
    n1, n0 = int(positive_R.sum()), int((~positive_R).sum())
    auroc = (float(rank_R1[positive_R, 0].sum()) - n1 * (n1 + 1) / 2) / (n1 * n0)
    negatives = np.sort(score_R[~positive_R])[::-1]
    return {
        "auroc": auroc,
        "tpr_at_fpr_1pct": tpr_at(score_R, positive_R, 0.01),
        "tpr_at_fpr_0_1pct": tpr_at(score_R, positive_R, 0.001),
        "threshold": float(negatives[int(0.01 * n0)]),
    }


def _penalty(fitted: Recording, label_R: Bool, mean_D: F64, scale_D: F64, rng: np.random.Generator) -> float:
    """The penalty that does best on a quarter of the training requests."""
    checked_R = rng.permutation(len(label_R)) < len(label_R) / 4
    if min(label_R[checked_R].sum(), (~label_R[checked_R]).sum(), label_R[~checked_R].sum()) == 0:
        return PENALTIES[-2]
    inner = fitted.select(np.flatnonzero(~checked_R).tolist())
    outer = fitted.select(np.flatnonzero(checked_R).tolist())

    def auroc(penalty: float) -> float:
        direction_D, bias = _fit(inner, label_R[~checked_R], mean_D, scale_D, penalty)
        probe = Probe(direction_D, bias, mean_D, scale_D, {}, 0, 0)
        return _figures(aggregated(probe.logits(outer.x_TD), outer)["rolling_mean"], label_R[checked_R])["auroc"]

    return max(reversed(PENALTIES), key=auroc)


def _fit(recording: Recording, label_R: Bool, mean_D: F64, scale_D: F64, penalty: float) -> tuple[F64, float]:
    """Penalised logistic regression by Newton's method; every request and both kinds weigh the same."""
    z_TE = np.concatenate([(recording.x_TD - mean_D) / scale_D, np.ones((len(recording.x_TD), 1))], axis=1)
    label_T = label_R[recording.request_T].astype(np.float64)
    length_R = np.bincount(recording.request_T, minlength=len(label_R))
    kind_R = np.where(label_R, 0.5 / max(label_R.sum(), 1), 0.5 / max((~label_R).sum(), 1))
    weight_T = (kind_R / length_R)[recording.request_T]
    ridge = np.full(z_TE.shape[1], penalty)
    ridge[-1] = 1e-9  # the intercept is free, but a separable set must not send it to infinity
    beta = np.zeros(z_TE.shape[1])
    for _ in range(NEWTON_STEPS):
        p_T = 1 / (1 + np.exp(-np.clip(z_TE @ beta, -40, 40)))
        gradient = z_TE.T @ (weight_T * (p_T - label_T)) + ridge * beta
        curvature_T = np.maximum(weight_T * p_T * (1 - p_T), 1e-12)
        step = np.linalg.solve((z_TE * curvature_T[:, None]).T @ z_TE + np.diag(ridge), gradient)
        beta -= step
        if np.abs(step).max() < 1e-6:
            break
    return beta[:-1], float(beta[-1])
