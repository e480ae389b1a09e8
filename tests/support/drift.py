"""Baselines of random traffic, for tests that need one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from latentwatch.aggregate.counts import Layout, RequestCounts
from latentwatch.aggregate.features import FeatureTable
from latentwatch.drift.baseline import Baseline, Fingerprint
from latentwatch.drift.sums import TrafficSums
from latentwatch.watchlist.file import Feature

from tests.support.streams import SHA256


def layout_of(features: Sequence[Feature]) -> Layout:
    return Layout.of(FeatureTable.of(features), features)


def rows(rng: np.random.Generator, layout: Layout, requests: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Fired tokens and values of random requests; dense features have normal scores."""
    fired = (rng.random((requests, layout.features)) < share) * rng.integers(1, 9, (requests, layout.features))
    fired *= layout.sparse_F
    value = np.exp(rng.normal(0, 0.5, fired.shape))
    value = np.where(layout.sparse_F, np.where(fired > 0, value, np.nan), rng.normal(0, 1, fired.shape))
    return fired, value.astype(np.float32)


def observe(
    observed: TrafficSums,
    layout: Layout,
    fired: np.ndarray,
    value: np.ndarray,
    end_seconds: float,
    adapter: str = "",
    key: int = 0,
) -> None:
    """One window of these requests, of one replica."""
    counts = RequestCounts.empty(layout, 1)
    counts.add(layout, np.zeros(len(fired), np.int64), fired, value)
    observed.add_window(counts, observed.strata_of([adapter], np.array([len(fired)])), end_seconds, key=key)
    observed.add_tail(value)


def random_baseline(
    features: Sequence[Feature], *, requests: int = 4000, share: float = 0.05, seed: int = 0, sha256: str = SHA256
) -> Baseline:
    """A baseline of windows of 50 requests."""
    rng, layout = np.random.default_rng(seed), layout_of(features)
    observed = TrafficSums.empty(layout)
    for window in range(requests // 50):
        observe(observed, layout, *rows(rng, layout, 50, share), end_seconds=1e9 + 60 * window)
    return Baseline(Fingerprint(sha256, ""), tuple(f.id for f in features), layout, observed)
