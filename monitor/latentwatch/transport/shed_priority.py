"""Which rows of a batch are given up last: those above a limit of a critical feature, before them those of a warning.

Shape legend: F features in watchlist order, P those of them that are dense, R rows, N fired activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from latentwatch.names import Severity
from latentwatch.step.batch import StepBatch

RANKS = {Severity.WARNING: 1, Severity.CRITICAL: 2}
"""What is kept longer has the higher rank; all else has 0."""


class ShedPriority:
    """How much each feature matters, and from which value on."""

    def __init__(self, features: Sequence[tuple[str, float, bool]]) -> None:
        """Args: features: severity, the value from which a token matters, and whether it is dense; watchlist order."""
        self._rank_F = np.array([RANKS.get(Severity(severity), 0) for severity, _, _ in features], np.uint8)
        self._level_F = np.array([level for _, level, _ in features], np.float64)
        self._dense_P = np.flatnonzero([dense for _, _, dense in features])

    def rank_R(self, batch: StepBatch) -> npt.NDArray[np.uint8]:
        """uint8 [R]: the highest rank of the features that are at or above their level in each row."""
        rank_R = np.zeros(batch.rows, np.uint8)
        fires_N = batch.fires_N[batch.fires_N["act"] >= self._level_F[batch.fires_N["feature"]]]
        np.maximum.at(rank_R, fires_N["row"], self._rank_F[fires_N["feature"]])
        if len(self._dense_P):
            over_RP = batch.dense_RP >= self._level_F[self._dense_P]
            np.maximum(rank_R, (over_RP * self._rank_F[self._dense_P]).max(axis=1), out=rank_R)
        return rank_R
