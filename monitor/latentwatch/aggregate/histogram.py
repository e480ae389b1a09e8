"""Fixed-bucket histograms as count arrays: they add, and they are Prometheus' classic histograms as they stand.

Shape legend: F features (or whatever the histograms stand for), B finite upper bounds, B+1 buckets with +Inf last.
A value on a bound belongs to the bucket below it, as `le` says.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from latentwatch.arrays import F64, I64, Array, Bool, axes

ACTIVATION_EDGES: Final = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Half decades: SAE activations run from hundredths (small models) to hundreds (Gemma Scope); `activation_edges`."""
NORM_EDGES: Final = tuple(2.0**k for k in range(-1, 21))
"""Octaves from 0.5 to 1,048,576: residual norms of small models, of Gemma 3's last layers (270M: 36,000 at the end of a
stream that begins at 125) and of first tokens in large ones."""
LAG_EDGES: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds; 1-2.5-5 around the target of 2 s from step to /metrics, up to a minute of spooling."""


def activation_edges(limit: float | None) -> tuple[float, ...]:
    """Bounds around a sparse feature's limit: ACTIVATION_EDGES, up by as many decades as leave one above the limit.

    In deep layers of a model whose stream grows, activations and limits are in the thousands, and all of them would
    stand above the last bound.
    """
    decades = max(0, math.ceil(math.log10(limit / 100.0))) if limit is not None and limit > 0 else 0
    return tuple(float(f"{edge * 10.0**decades:.6g}") for edge in ACTIVATION_EDGES)


def limit_edges(limit: float | None) -> tuple[float, ...]:
    """Ten linear bounds around a dense feature's limit: limit + step * (-5..4), step = max(|limit|, 1) / 4.

    The limit itself is a bound, so the share of requests above it is exact. Without a limit the bounds are
    those of limit 0. As many as `ACTIVATION_EDGES`, so that one array holds the histograms of every feature.
    """
    centre = 0.0 if limit is None else limit
    step = max(abs(centre), 1.0) / 4
    return tuple(centre if k == 0 else float(f"{centre + k * step:.6g}") for k in range(-5, 5))


@dataclass
class Histograms:
    """F classic histograms over bounds of their own, with equal bucket counts."""

    edges_FB: F64 = field(metadata=axes("F", "B"))
    """Ascending along B, finite."""
    counts_FB: I64 = field(metadata=axes("F", "B+1", dtype=np.int64))
    """Values per bucket (not cumulative)."""
    sum_F: F64 = field(metadata=axes("F"))

    def __post_init__(self) -> None:
        self._shared = bool((self.edges_FB == self.edges_FB[:1]).all())

    @classmethod
    def empty(cls, edges_FB: Array) -> Histograms:
        """Nothing counted yet. Raises ValueError when bounds are not finite and strictly ascending."""
        edges = np.array(edges_FB, np.float64, ndmin=2)
        if not np.isfinite(edges).all() or (np.diff(edges, axis=1) <= 0).any():
            raise ValueError(f"histogram bounds must be finite and ascending, got {edges.tolist()[:2]}")
        return cls(edges, np.zeros((edges.shape[0], edges.shape[1] + 1), np.int64), np.zeros(edges.shape[0]))

    def observe(self, values_NF: Array, counted_NF: Bool | None = None) -> None:
        """Count one value per row and histogram, [N, F]; where `counted_NF` is False the value is left out."""
        F, B = self.edges_FB.shape
        values = values_NF.astype(np.float64)
        if counted_NF is not None:
            values = np.where(counted_NF, values, 0.0)
        bucket = self._buckets(values) + np.arange(F) * (B + 1)
        flat = bucket.ravel() if counted_NF is None else bucket[counted_NF]
        self.counts_FB += np.bincount(flat, minlength=F * (B + 1)).reshape(F, B + 1)
        self.sum_F += values.sum(axis=0)

    def merge(self, other: Histograms) -> Histograms:
        """Both together. Raises ValueError when the bounds differ."""
        if not np.array_equal(self.edges_FB, other.edges_FB):
            raise ValueError("histograms over different bounds do not add")
        return Histograms(self.edges_FB, self.counts_FB + other.counts_FB, self.sum_F + other.sum_F)

    def copy(self) -> Histograms:
        """The same counts, free of later ones."""
        return Histograms(self.edges_FB, self.counts_FB.copy(), self.sum_F.copy())

    def _buckets(self, values_NF: F64) -> npt.NDArray[np.intp]:
        """Index of the bucket of each value, 0..B."""
        if self._shared:
            return np.searchsorted(self.edges_FB[0], values_NF)
        below_NF: npt.NDArray[np.intp] = (values_NF[:, :, None] > self.edges_FB).sum(axis=2)
        return below_NF

    @property
    def cumulative_FB(self) -> I64:
        """[F, B+1]: values at or below each bound, the last column is the count."""
        return np.cumsum(self.counts_FB, axis=1)


@dataclass(frozen=True)
class ScalarHistogramState:
    """The counts of a ScalarHistogram."""

    counts: list[int]
    sum: float


class ScalarHistogram:
    """One histogram fed by single values, without the cost of array calls per value."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def state(self) -> ScalarHistogramState:
        """The counts; copies."""
        return ScalarHistogramState(list(self.counts), self.sum)

    def restore(self, state: ScalarHistogramState) -> None:
        """Go on from `state`. Raises ValueError where it has other buckets."""
        if len(state.counts) != len(self.counts):
            raise ValueError(f"a histogram of {len(self.counts)} buckets, the state has {len(state.counts)}")
        self.counts, self.sum = list(state.counts), state.sum

    def observe(self, value: float) -> None:
        """Count one finite value."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value
