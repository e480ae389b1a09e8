"""The watchlist as columns: what the arithmetic needs to know of each feature, in watchlist order.

Shape legend: F features, P dense features (in watchlist order), L features whose limit is not on the plain maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentwatch.aggregate.histogram import activation_edges, limit_edges
from latentwatch.arrays import Array
from latentwatch.names import Phase
from latentwatch.watchlist.file import Feature

_PHASE_BITS = {"any": 0b11, "prompt": 0b01, "output": 0b10}


def phase_bit(phase: Array) -> Array:
    """1 for prompt, 2 for output: the bits of `FeatureTable.phases_F`."""
    return np.where(phase == Phase.PROMPT, 1, 2).astype(np.uint8)


@dataclass(frozen=True)
class RollingGroup:
    """Features whose rolling mean runs over the same tokens with the same window, so that they share the arithmetic."""

    features: Array
    """Watchlist indices, [G]."""
    window_tokens: int
    phases: int
    """Bits of the phases whose tokens count."""
    skip_first_positions: int


@dataclass(frozen=True)
class FeatureTable:
    """Columns over the features; every array is read only by agreement."""

    sparse_F: Array
    """bool."""
    dense_P: Array
    """Watchlist index of each dense column."""
    skip_F: Array
    """Positions at the start of a request that no statistic counts, int64."""
    limit_F: Array
    """float64; +inf for features without a limit, so that nothing exceeds it."""
    token_limit_F: Array
    """Like `limit_F` where one token can exceed the limit (statistic "max"); +inf for rolling means."""
    phases_F: Array
    """Bits of the phases that the limit's statistic counts, uint8; both for features without a limit."""
    special_F: Array
    """Column among the L special statistics, -1 where the statistic is the plain maximum over all counted tokens."""
    special_max_F: Array
    """bool: the statistic is a maximum over one phase only."""
    rolling: tuple[RollingGroup, ...]
    edges_FB: Array
    """Histogram bounds of the per-request statistic: activation_edges for sparse features, limit_edges for dense."""

    @property
    def features(self) -> int:
        """F."""
        return len(self.sparse_F)

    @property
    def specials(self) -> int:
        """L."""
        return int((self.special_F >= 0).sum())

    @classmethod
    def of(cls, features: Sequence[Feature]) -> FeatureTable:
        """The columns of these features, in this order."""
        limits = [f.limit for f in features]
        rolling = np.array([lim is not None and lim.statistic == "rolling_mean" for lim in limits], bool)
        phases = np.array([_PHASE_BITS["any" if lim is None else lim.phase] for lim in limits], np.uint8)
        special = rolling | (phases != _PHASE_BITS["any"])
        sparse = np.array([not f.dense for f in features], bool)
        limit = np.array([np.inf if lim is None else lim.value for lim in limits], np.float64)
        return cls(
            sparse_F=sparse,
            dense_P=np.flatnonzero(~sparse),
            skip_F=np.array([f.skip_first_positions for f in features], np.int64),
            limit_F=limit,
            token_limit_F=np.where(rolling, np.inf, limit),
            phases_F=phases,
            special_F=np.where(special, np.cumsum(special) - 1, -1),
            special_max_F=special & ~rolling,
            rolling=_rolling_groups(features),
            edges_FB=np.array(
                [(limit_edges if f.dense else activation_edges)(f.limit.value if f.limit else None) for f in features]
            ),
        )


def _rolling_groups(features: Sequence[Feature]) -> tuple[RollingGroup, ...]:
    members: dict[tuple[int, int, int], list[int]] = {}
    for index, feature in enumerate(features):
        limit = feature.limit
        if limit is not None and limit.statistic == "rolling_mean":
            key = (limit.window_tokens, _PHASE_BITS[limit.phase], feature.skip_first_positions)
            members.setdefault(key, []).append(index)
    return tuple(RollingGroup(np.array(indices), *key) for key, indices in sorted(members.items()))
