"""A metric's series and their values at one moment: what both the exposition and OTLP are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from latentwatch.arrays import Array
from latentwatch.export.metrics import Metric

LabelRows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ExemplarLine:
    """One event that a counter counted."""

    labels: tuple[tuple[str, str], ...]
    """The most telling first."""
    value: float
    seconds: float


@dataclass(frozen=True)
class Family:
    """One metric's series and their values.

    `labels` has one row per series, in the order of the metric's label names. A counter, gauge or info has one value
    per series. A histogram has bounds, cumulative counts (the last one is the count) and a sum per series.
    """

    metric: Metric
    labels: LabelRows
    values: Sequence[float] = ()
    edges_SB: Array = field(default_factory=lambda: np.empty((0, 0)))
    cumulative_SB: Array = field(default_factory=lambda: np.empty((0, 0), np.int64))
    sum_S: Sequence[float] = ()
    exemplars: Mapping[int, ExemplarLine] = field(default_factory=dict)
    """By series; counters only."""

    @property
    def sums(self) -> list[bool]:
        """Which series of a histogram show `_sum` and `_count`: those without negative bounds.

        A sum of values of both signs is no counter, and OpenMetrics forbids it. The +Inf bucket has the count.
        """
        return (self.edges_SB[:, 0] >= 0).tolist() if len(self.edges_SB) else []

    @property
    def samples(self) -> int:
        """Lines on the page: at most these, since some histograms show no `_sum` and `_count`."""
        per_series = self.edges_SB.shape[1] + 3 if self.metric.kind == "histogram" else 1
        return len(self.labels) * per_series

    def first(self, series: int) -> Family:
        """The same with its first series only."""
        return replace(
            self,
            labels=self.labels[:series],
            values=self.values[:series],
            edges_SB=self.edges_SB[:series],
            cumulative_SB=self.cumulative_SB[:series],
            sum_S=self.sum_S[:series],
            exemplars={place: exemplar for place, exemplar in self.exemplars.items() if place < series},
        )
