"""Detectors of what a user asks, read where the model has read the whole request: at the tokens that the chat template
puts behind it.

A detector is a logistic regression on the mean of the stream over the last WINDOW positions of a prompt. What is
watched is the largest such mean anywhere in the prompt, so windows inside harmless texts are trained on
too, as negatives.

Shape legend: R requests, T tokens, L layers, D d_model, M training windows.
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
class Labels:
    """What each request is to a detector."""

    positive_R: Bool
    hard_R: Bool
    """Harmless, with the words or in the form of a positive one."""
    family_R: Sequence[str]


@dataclass(frozen=True)
class Windows:
    """Rolling means of every request at one layer, [T - W + 1, D]; the last row ends where the prompt ends."""

    means: Sequence[F32]

    @classmethod
    def of(cls, streams: Sequence[F16], layer: int, window: int) -> Windows:
        """Of streams [T, L, D] at one of their layers."""
        return cls([rolling_means(stream[:, layer], window) for stream in streams])

    def last(self, requests: Sequence[int]) -> F32:
        """Means over the last window of each."""
        return np.stack([self.means[at][-1] for at in requests])

    def scores(self, detector: Detector) -> F64:
        """The watched statistic of each request; -inf for one of fewer tokens than the window, which has none."""
        return np.array([detector.score(means) if len(means) else -np.inf for means in self.means])


def rolling_means(stream_TD: F16, window: int) -> F32:
    """Means over `window` consecutive tokens; none of fewer tokens."""
    summed = np.cumsum(np.vstack([np.zeros((1, stream_TD.shape[1])), stream_TD.astype(np.float64)]), 0)
    result: F32 = ((summed[window:] - summed[:-window]) / window).astype(np.float32)
    return result


def fit(windows: Windows, labels: Labels, requests: Sequence[int], rng: np.random.Generator) -> Detector:
    """A detector of the positive ones among some requests, against the others and what stands inside those.

    Positives weigh half of everything. Of the other half, those that only look like it weigh as much as all the rest:
    else telling a false statement from other talk would be learned, and not from a true one.
    """
    positive_R, hard_R = labels.positive_R[requests], labels.hard_R[requests]
    x, group = [windows.last(requests)], [np.where(positive_R, 0, np.where(hard_R, 1, 2))]
    for at, kind in zip(requests, group[0].tolist(), strict=True):
        if kind:
            means = windows.means[at]
            x.append(means[rng.integers(len(means), size=INSIDE)])
            group.append(np.full(INSIDE, kind))
    x_MD, group_M = np.concatenate(x), np.concatenate(group)
    share = np.array([0.5, 0.25, 0.25]) / np.maximum(1, np.bincount(group_M, minlength=3))
    mean_D, scale_D = x_MD.mean(0), x_MD.std(0) + 1e-6
    model = LogisticRegression(C=PENALTY, max_iter=300)
    model.fit((x_MD - mean_D) / scale_D, group_M == 0, sample_weight=share[group_M] * len(group_M))
    direction_D = model.coef_[0] / scale_D
    return Detector(direction_D.astype(np.float32), float(model.intercept_[0] - direction_D @ mean_D))


def heldout_area(windows: Windows, labels: Labels, requests: Sequence[int], rng: np.random.Generator) -> float:
    """Mean AUROC over the families of positives, each left out in turn, half of it against what only looks like it.

    A third of the harmless texts is left out too.
    """
    back_R = rng.random(len(labels.positive_R)) < 1 / 3
    areas = []
    for family in sorted({labels.family_R[at] for at in requests if labels.positive_R[at]}):
        out_R = np.where(labels.positive_R, np.array(labels.family_R) == family, back_R)
        detector = fit(windows, labels, [at for at in requests if not out_R[at]], rng)
        out = [at for at in requests if out_R[at]]
        scores = Windows([windows.means[at] for at in out]).scores(detector)
        positive, hard = labels.positive_R[out], labels.hard_R[out]
        areas += [auroc(scores[positive], scores[hard]), auroc(scores[positive], scores[~positive & ~hard])]
    return float(np.nanmean(areas))
