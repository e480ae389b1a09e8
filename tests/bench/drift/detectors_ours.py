"""Our detectors behind the interface of the others: evidence over its limit, in decades, over all kinds."""

from __future__ import annotations

import numpy as np
from latentwatch.aggregate.counts import Layout
from latentwatch.drift.detection import COMMON, KINDS, Budget, DetectorState, Window, evidence, update
from latentwatch.drift.reference import Reference


class Ours:
    """Pages at its own limit, from the stated budget and not from a calibration on these windows."""

    name = "latentwatch"
    limit = 0.0

    def __init__(self, reference: Reference, layout: Layout, replicas: int, window_seconds: float) -> None:
        self.reference, self.layout = reference, layout
        self.state = DetectorState.empty(layout, replicas)
        self.budget = Budget(window_seconds=window_seconds)
        self.by_kind = dict.fromkeys((*KINDS, COMMON), 0)
        """Of the common movement how often its page began: it stays one page as long as it lasts."""
        self._common_pages = False
        self._over: dict[str, np.ndarray] = {}

    def statistic(self, window: Window) -> np.ndarray:
        update(self.state, self.reference, self.layout, window, self.budget)
        shown = evidence(self.state, self.layout, self.reference, self.budget)
        self.by_kind[COMMON] += shown.common.alarm and not self._common_pages
        self._common_pages = shown.common.alarm
        self._over = {kind: shown.log10_evalue[kind] - shown.log10_limit[kind] for kind in KINDS}
        return np.max(list(self._over.values()), axis=0)

    def reset(self, alarm_F: np.ndarray) -> None:
        for kind, over_F in self._over.items():
            self.by_kind[kind] += int((over_F >= 0).sum())
        for array in (self.state.rate_KF, self.state.shape_KF, self.state.replica_2DF, self.state.canary_F):
            array[..., alarm_F] = 0
        of_pairs = alarm_F[self.layout.pairs_P]
        self.state.pair_PP[of_pairs] = 0
        self.state.pair_PP[:, of_pairs] = 0
