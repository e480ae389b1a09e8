"""How well scores tell one family of positive texts from harmless ones, with intervals that know of templates.

A rate at 1 % false positives is taken at the limit that lets at most that share of the harmless texts through.
Intervals are bootstrapped over forms, since texts of one template are no independent draws.

Legend: P positive texts, N harmless texts, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from latentwatch.arrays import F64

DRAWS: Final = 500
FPR: Final = 0.01


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def auroc(positive_P: F64, negative_N: F64) -> float:
    """The chance that a positive text scores higher than a harmless one; equal scores count half."""
    below_P = np.searchsorted(np.sort(negative_N), positive_P, side="left")
    upto_P = np.searchsorted(np.sort(negative_N), positive_P, side="right")
    return float((below_P + upto_P).mean() / 2 / len(negative_N))


def limit_at(negative_N: F64, fpr: float) -> float:
    """The lowest score of which at most this share of the harmless texts is above."""
    return float(np.sort(negative_N)[::-1][int(fpr * len(negative_N))])


def tpr(positive_P: F64, negative_N: F64) -> float:
    """The share of positive texts above the limit at 1 % false positives."""
    return float((positive_P > limit_at(negative_N, FPR)).mean())


def tpr_interval(
    scores: Sequence[tuple[F64, F64]], forms_P: Sequence[str], forms_N: Sequence[str], rng: np.random.Generator
) -> list[Interval]:
    """Of each detector's scores (of the positive texts, of the harmless ones) and, where there are two, of the first
    less the second: the same draws for all.
    """
    groups_P, groups_N = _groups(forms_P), _groups(forms_N)
    values = [tpr(*one) for one in scores]
    drawn = []
    for _ in range(DRAWS):
        p, n = _draw(groups_P, rng), _draw(groups_N, rng)
        drawn.append([tpr(positive_P[p], negative_N[n]) for positive_P, negative_N in scores])
    drawn_BD = np.array(drawn)
    if len(scores) == 2:
        values.append(values[0] - values[1])
        drawn_BD = np.column_stack([drawn_BD, drawn_BD[:, 0] - drawn_BD[:, 1]])
    low, high = np.quantile(drawn_BD, (0.025, 0.975), axis=0)
    return [Interval(value, float(a), float(b)) for value, a, b in zip(values, low, high, strict=True)]


def _groups(forms: Sequence[str]) -> list[np.ndarray]:
    """The texts of each form; those without one stand alone."""
    names = [form or f"\0{at}" for at, form in enumerate(forms)]
    order: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        order.setdefault(name, []).append(at)
    return [np.array(group) for group in order.values()]


def _draw(groups: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """As many forms as there are, drawn with replacement; within each its texts drawn again."""
    chosen = rng.integers(0, len(groups), len(groups))
    return np.concatenate([rng.choice(groups[at], len(groups[at])) for at in chosen])
