"""How many requests of a window reached which level of which feature: count arrays that add.

The request is the sampling unit: tokens of one request are far from independent, requests nearly are.

Shape legend: n requests, F features, L levels, B = L + 1 buckets, C cells, G groups, P features watched in pairs.

A group is a (replica, adapter). Sums over replicas give the traffic of an adapter, sums over adapters a replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from latentwatch.aggregate.features import FeatureTable
from latentwatch.arrays import Array, axes
from latentwatch.names import Severity
from latentwatch.watchlist.file import Feature

COUNT_LEVELS: Final = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Fired tokens of a sparse feature in one request. As many as the bounds of a dense feature's statistic."""
CELLS: Final = 128
_CELL_UNIT: Final = 0.01
_CELL_WIDTH: Final = float(np.arcsinh(float(np.finfo(np.float16).max) / _CELL_UNIT)) / (CELLS // 2)
"""0.256: neighbouring bounds differ by 29 % far from 0 and by 0.0026 near it; float16's range fills the cells."""
PAIRED_FEATURES: Final = 64
"""2,016 pairs; the most severe sparse features are watched in pairs."""
_SEVERITY_ORDER: Final = (Severity.CRITICAL, Severity.WARNING, Severity.INFO, Severity.NONE)


def cells_of(values: Array) -> Array:
    """Cell of each finite value, 0..C-1: logarithmic away from 0 and linear near it, both signs."""
    # In float64: the largest float32 divided by the unit is none any more.
    cell = np.floor(np.arcsinh(values.astype(np.float64) / _CELL_UNIT) / _CELL_WIDTH).astype(np.int64) + CELLS // 2
    clipped: Array = np.clip(cell, 0, CELLS - 1)
    return clipped


def cell_values() -> Array:
    """The middle of each cell, in the feature's own units, [C]."""
    middles: Array = np.sinh((np.arange(CELLS) - CELLS // 2 + 0.5) * _CELL_WIDTH) * _CELL_UNIT
    return middles


@dataclass(frozen=True)
class Layout:
    """What the counts are over; two sets of counts add when their layouts are equal."""

    sparse_F: Array
    levels_FL: Array
    """Ascending. A sparse feature's score is its fired tokens, a dense one's the statistic of its limit."""
    pairs_P: Array
    """Features whose joint activity is counted, at most PAIRED_FEATURES; a feature stands once."""

    @classmethod
    def of(cls, table: FeatureTable, features: Sequence[Feature]) -> Layout:
        """The layout of a watchlist."""
        levels_FL = np.where(table.sparse_F[:, None], np.array(COUNT_LEVELS), table.edges_FB)
        rank = [_SEVERITY_ORDER.index(feature.severity) for feature in features]
        sparse = sorted(np.flatnonzero(table.sparse_F).tolist(), key=lambda i: (rank[i], i))
        return cls(table.sparse_F, levels_FL, np.sort(np.array(sparse[:PAIRED_FEATURES], np.int64)))

    @property
    def features(self) -> int:
        """F."""
        return len(self.sparse_F)


@dataclass
class RequestCounts:
    """The requests of one window. Merging is associative and commutative; `empty` is its neutral element."""

    levels_GFB: Array = field(metadata=axes("G", "F", "B", dtype=np.int64))
    """Requests by the number of levels that their score is above, int64."""
    cells_FC: Array = field(metadata=axes("F", "C", dtype=np.int64))
    """Requests by the cell of their value, int64; a sparse feature that did not fire has none."""
    coactive_PP: Array = field(metadata=axes("P", "P", dtype=np.int64))
    """Requests in which both features fired, int64; the diagonal has those in which the one fired."""

    @classmethod
    def empty(cls, layout: Layout, groups: int) -> RequestCounts:
        """No request yet."""
        (F, L), P = layout.levels_FL.shape, len(layout.pairs_P)
        return cls(np.zeros((groups, F, L + 1), np.int64), np.zeros((F, CELLS), np.int64), np.zeros((P, P), np.int64))

    def add(self, layout: Layout, group_n: Array, fired_nF: Array, value_nF: Array) -> None:
        """Count n requests.

        Args: group_n: 0..G-1. fired_nF: fired tokens of sparse features. value_nF: the statistic in its own units;
              where it is not finite, a dense feature's request is not counted for that feature.
        """
        if not len(group_n):
            return
        _, F, B = self.levels_GFB.shape
        finite_nF = np.isfinite(value_nF)
        score_nF = np.where(layout.sparse_F, fired_nF, np.where(finite_nF, value_nF, 0.0))
        bucket_nF = np.zeros(score_nF.shape, np.int64)
        for level_F in layout.levels_FL.T:
            bucket_nF += score_nF > level_F
        key_nF = (group_n[:, None] * F + np.arange(F)) * B + bucket_nF
        counted_nF = finite_nF | layout.sparse_F
        np.add.at(self.levels_GFB.reshape(-1), key_nF if counted_nF.all() else key_nF[counted_nF], 1)
        row, feature = np.nonzero(finite_nF & ((fired_nF > 0) | ~layout.sparse_F))
        np.add.at(self.cells_FC.reshape(-1), feature * CELLS + cells_of(value_nF[row, feature]), 1)
        fired_nP = (fired_nF[:, layout.pairs_P] > 0).astype(np.float32)
        self.coactive_PP += (fired_nP.T @ fired_nP).astype(np.int64)

    def merge(self, other: RequestCounts) -> RequestCounts:
        """Both together, group by group."""
        return RequestCounts(
            self.levels_GFB + other.levels_GFB, self.cells_FC + other.cells_FC, self.coactive_PP + other.coactive_PP
        )

    def clear(self) -> None:
        """Begin a new window."""
        for array in (self.levels_GFB, self.cells_FC, self.coactive_PP):
            array[:] = 0

    @property
    def requests_GF(self) -> Array:
        """Requests counted per group and feature."""
        # A quarter of the time of `sum` over so short an axis.
        requests: Array = np.einsum("gfb->gf", self.levels_GFB)
        return requests


def above(levels_FB: Array) -> Array:
    """From requests per bucket to requests above each level, [..., F, L]."""
    counts: Array = np.cumsum(levels_FB[..., ::-1], axis=-1)[..., ::-1][..., 1:]
    return counts
