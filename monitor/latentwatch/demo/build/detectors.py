"""Detectors of what a user asks, read where the model has read the whole request: at the tokens that the chat template
puts behind it.

A detector is a logistic regression on the mean of the stream over the last WINDOW positions of a prompt. What is
watched is the largest such mean anywhere in the prompt, so windows inside harmless texts are trained on
too, as negatives.

Shape legend: R requests, T tokens, L layers, D d_model, W window, M training windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from sklearn.linear_model import LogisticRegression

from latentwatch.arrays import F16, F32, F64, Bool
from latentwatch.demo.smollm2.figures import auroc

PENALTY: Final = 0.003
"""scikit-learn's C, on standardised streams: chosen on families of training texts, as the layer is."""
INSIDE: Final = 3
"""Windows of each harmless text beside its last."""


@dataclass(frozen=True)
class Detector:
    """logit = direction . x + bias, on the mean of x over a window."""

    direction_D: F32
    bias: float

    def score(self, means_MD: F32) -> float:
        """The largest logit of a request's windows."""
        return float((means_MD @ self.direction_D).max() + self.bias)


@dataclass(frozen=True)
class Windows:
    """Rolling means of every request at one layer, [T - W + 1, D]; the last row ends where the prompt ends."""

    means: Sequence[F32]

    @classmethod
    def of(cls, streams: Sequence[F16], layer: int, window: int) -> Windows:
        """Of streams [T, L, D] at one of their layers. A request of fewer tokens has one window, shorter."""
        return cls([rolling_means(stream[:, layer], window) for stream in streams])

    def last(self, requests: Sequence[int]) -> F32:
        """Means over the last window of each."""
        return np.stack([self.means[at][-1] for at in requests])

    def scores(self, detector: Detector) -> F64:
        """The watched statistic of each request."""
        return np.array([detector.score(means) for means in self.means])


def rolling_means(stream_TD: F16, window: int) -> F32:
    """Means over `window` consecutive tokens."""
    summed = np.cumsum(np.vstack([np.zeros((1, stream_TD.shape[1])), stream_TD.astype(np.float64)]), 0)
    width = min(window, len(stream_TD))
    result: F32 = ((summed[width:] - summed[:-width]) / width).astype(np.float32)
    return result


def fit(windows: Windows, requests: Sequence[int], positive_R: Bool, rng: np.random.Generator) -> Detector:
    """A detector of the requests that are marked, against the others and what stands inside them."""
    harmless = [at for at, positive in zip(requests, positive_R, strict=True) if not positive]
    inside = [
        windows.means[at][rng.integers(len(windows.means[at]), size=min(INSIDE, len(windows.means[at])))]
        for at in harmless
    ]
    x_MD = np.concatenate([windows.last(requests), *inside])
    y_M = np.concatenate([positive_R, np.zeros(len(x_MD) - len(requests), bool)])
    mean_D, scale_D = x_MD.mean(0), x_MD.std(0) + 1e-6
    model = LogisticRegression(C=PENALTY, max_iter=300, class_weight="balanced").fit((x_MD - mean_D) / scale_D, y_M)
    direction_D = model.coef_[0] / scale_D
    return Detector(direction_D.astype(np.float32), float(model.intercept_[0] - direction_D @ mean_D))


def held_out_area(
    windows: Windows, requests: Sequence[int], positive_R: Bool, family_R: Sequence[str], rng: np.random.Generator
) -> float:
    """Mean AUROC over the families of training texts, each left out in turn, against harmless texts left out too."""
    families = sorted({family for family, positive in zip(family_R, positive_R, strict=True) if positive})
    held_back_R = rng.random(len(requests)) < 1 / 3
    areas = []
    for family in families:
        out_R = np.where(positive_R, np.array(family_R) == family, held_back_R)
        rest = [at for at, out in zip(requests, out_R, strict=True) if not out]
        detector = fit(windows, rest, positive_R[~out_R], rng)
        out = [at for at, out in zip(requests, out_R, strict=True) if out]
        scores = Windows([windows.means[at] for at in out]).scores(detector)
        areas.append(auroc(scores[positive_R[out_R]], scores[~positive_R[out_R]]))
    return float(np.mean(areas))
