"""Linear probes for what an alert will see: a request's largest token, or its largest mean over some tokens in a row.

A probe is fitted on windows, not on whole requests: first on the last window of each prompt, where a model has read all
of it, then also on each request's highest window under the probe of the round before. So the windows of harmless
requests that would set off the alert are what it learns to pass over.

Attention sinks, tokens whose stream is many times longer than the others' (`is_sink`), are left out of the fit. Scores
have them, as in serving.

Legend: R requests, T tokens, D d_model, N windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from latentwatch.arrays import F32, F64, I64, Bool
from latentwatch.watchlist.captured import CapturedLayer

WINDOWS: Final = (1, 8)
"""Tokens of a window; 1 is the statistic "max", more are "rolling_mean"."""
STRENGTHS: Final = (0.003, 0.03)
"""Of the fit: scikit-learn's C."""
ROUNDS: Final = 3
SINK_RATIO: Final = 8.0
"""A token is an attention sink where its stream is longer than this many times the layer's median."""


@dataclass(frozen=True)
class Settings:
    """What is chosen on the selection families."""

    layer: int
    window_tokens: int
    strength: float

    @property
    def statistic(self) -> str:
        """As a limit names it."""
        return "max" if self.window_tokens == 1 else "rolling_mean"


@dataclass(frozen=True)
class LinearProbe:
    """logit = x . weight + bias"""

    weight_D: F64
    bias: float


class Windows:
    """The windows of a layer's requests; made once for all concerns."""

    def __init__(self, layer: CapturedLayer, last_R: I64, window_tokens: int) -> None:
        """last_R: the last token of each request's prompt, counted from its first stored one."""
        self.layer = layer
        self.window_tokens = window_tokens
        self._bounds_S = layer.bounds_S
        self._last_T: I64 = self._bounds_S[:-1] + np.minimum(last_R, layer.length_R - 1)
        self._start_T = np.repeat(self._bounds_S[:-1], layer.length_R)
        self.sink_T = is_sink(np.linalg.norm(layer.x_TD, axis=1).astype(np.float64))

    def scores(self, logit_T: F64) -> F64:
        """Of the window that ends at each token, -inf where a request has no full window yet: serving counts none."""
        if self.window_tokens == 1:
            return logit_T
        width = self.window_tokens
        total = np.concatenate([[0.0], np.cumsum(logit_T)])
        mean_T = np.full(len(logit_T), -np.inf)
        mean_T[width - 1 :] = (total[width:] - total[:-width]) / width
        mean_T[np.arange(len(logit_T)) - self._start_T < width - 1] = -np.inf
        return mean_T

    def highest(self, score_T: F64) -> tuple[F64, I64]:
        """Each request's highest score, and the token at which it stands."""
        best_R = np.maximum.reduceat(score_T, self._bounds_S[:-1])
        at_T = np.flatnonzero(score_T == np.repeat(best_R, self.layer.length_R))
        request_A = np.searchsorted(self._bounds_S, at_T, side="right") - 1
        _, first = np.unique(request_A, return_index=True)
        return best_R, at_T[first]

    def last(self) -> I64:
        """The last token of each prompt."""
        return self._last_T

    def mean(self, end_N: I64) -> F32:
        """The mean stream of the windows that end at these tokens, sinks left out, [N, D]."""
        if self.window_tokens == 1:
            return self.layer.x_TD[end_N]
        means = []
        for end in end_N.tolist():
            window = slice(max(end + 1 - self.window_tokens, int(self._start_T[end])), end + 1)
            calm = ~self.sink_T[window]
            x_WD = self.layer.x_TD[window]
            means.append((x_WD[calm] if calm.any() else x_WD).mean(axis=0))
        return np.array(means)


def is_sink(norm_T: F64) -> Bool:
    """Which tokens are attention sinks, by the lengths of their streams in one layer."""
    return np.asarray(norm_T > SINK_RATIO * np.median(norm_T))


def fit(windows: Windows, positive: Sequence[int], negative: Sequence[int], strength: float) -> LinearProbe:
    """A probe that tells these requests apart. Raises ImportError: scikit-learn is missing."""
    from sklearn.linear_model import LogisticRegression

    chosen_R = np.array([*positive, *negative])
    label_R = np.arange(len(chosen_R)) < len(positive)
    ends, labels = [windows.last()[chosen_R]], [label_R]
    probe = LinearProbe(np.zeros(windows.layer.x_TD.shape[1]), 0.0)
    for number in range(ROUNDS):
        end_N, label_N = np.concatenate(ends), np.concatenate(labels)
        calm_N = ~windows.sink_T[end_N]
        x_ND, y_N = windows.mean(end_N[calm_N]).astype(np.float64), label_N[calm_N]
        mean_D, scale_D = x_ND.mean(axis=0), np.maximum(x_ND.std(axis=0), 1e-6)
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=300, tol=1e-3)
        model.fit((x_ND - mean_D) / scale_D, y_N)
        weight_D = model.coef_[0] / scale_D
        probe = LinearProbe(weight_D, float(model.intercept_[0] - mean_D @ weight_D))
        if number + 1 < ROUNDS:
            _, at_R = windows.highest(windows.scores(logits(probe, windows.layer)))
            ends.append(at_R[chosen_R])
            labels.append(label_R)
    return probe


def logits(probe: LinearProbe, layer: CapturedLayer) -> F64:
    """Of every token."""
    return np.asarray(layer.x_TD @ probe.weight_D.astype(np.float32), np.float64) + probe.bias


def request_scores(probe: LinearProbe, windows: Windows) -> F64:
    """What an alert's limit is compared with, for each request."""
    return windows.highest(windows.scores(logits(probe, windows.layer)))[0]
