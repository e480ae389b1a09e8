"""The scores of tokens whose KV the engine still holds, so that a prefix-cache hit inherits what was scored then.

They are kept by KV slot: block * block size + offset, where vLLM keeps the token's keys and values. A block that is
allocated anew forgets, so that what is read for a slot was computed by the request that filled it, whatever steps were
lost in between.

Memory is bounded. Each KV slot has a place for its row; where there are fewer places than slots, some slots share one,
which holds the row written last. Activations lie in a circular log whose oldest go first; those inherited from its
older half are written again at its head, so that a prefix in use stays, as it does in the engine's cache.

Legend: K KV slots asked for, R rows written, N activations, P dense features, H hook points.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from latentwatch.arrays import I64, Bool
from latentwatch.exporter.attribution import ScoredRows
from latentwatch.step.batch import FIRE_DTYPE

MAX_BYTES: Final = 64 << 20
"""Beside the 192 MiB that the ring may take. At 16 probes and 4 hook points half of it holds 490,000 tokens; the other
half holds their activations at 11 a token."""
_FIRE_BYTES: Final = 6
_ROW_BYTES: Final = 20


class ScoreCache:
    """Rows of scores by KV slot."""

    def __init__(
        self, *, blocks: int, block_size: int, dense: int, hook_points: int, max_bytes: int = MAX_BYTES
    ) -> None:
        """Args: blocks: of the engine's KV cache.   block_size: tokens.   dense, hook_points: widths of a row."""
        self.block_size = block_size
        half = max_bytes // 2
        places = max(1, min(blocks * block_size, half // (_ROW_BYTES + 2 * dense + 4 * hook_points)))
        # Zeros: the system backs only the pages that are used.
        self._owner = np.zeros(places, np.int64)  # KV slot + 1, 0 for none
        self._dense = np.zeros((places, dense), np.float16)
        self._norm = np.zeros((places, hook_points), np.float32)
        self._first = np.zeros(places, np.int64)
        self._count = np.zeros(places, np.int32)
        self._max_fires = max(1, half // _FIRE_BYTES)
        self._fires = 0  # ever written
        self._feature = np.zeros(self._max_fires, np.uint16)
        self._act = np.zeros(self._max_fires, np.float32)

    def forget(self, blocks: I64) -> None:
        """These blocks were allocated anew: what they held is not what they will hold."""
        slot = (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()
        place = slot % len(self._owner)
        self._owner[place[self._owner[place] == slot + 1]] = 0

    def clear(self) -> None:
        """Which blocks were allocated anew is not known any more."""
        self._owner[:] = 0

    def write(self, slot_R: I64, scored: ScoredRows) -> None:
        """Keep the scores of these KV slots; none of them where their activations alone exceed the log."""
        fires = len(scored.fires_N)
        if fires > self._max_fires:
            return
        place = slot_R % len(self._owner)
        self._owner[place] = slot_R + 1
        self._dense[place] = scored.dense_RP
        self._norm[place] = scored.norm_RH
        count = np.bincount(scored.fires_N["row"], minlength=len(slot_R))
        self._count[place] = count
        self._first[place] = self._fires + np.cumsum(count) - count
        at = (self._fires + np.arange(fires)) % self._max_fires
        self._feature[at] = scored.fires_N["feature"]
        self._act[at] = scored.fires_N["act"]
        self._fires += fires

    def read(self, slot_K: I64) -> tuple[Bool, ScoredRows]:
        """(bool [K]: which of these slots have scores, the scores of those in their order)."""
        place = slot_K % len(self._owner)
        there_K = (self._owner[place] == slot_K + 1) & (self._first[place] >= self._fires - self._max_fires)
        place = place[there_K]
        first, count = self._first[place], self._count[place].astype(np.int64)
        row_N = np.repeat(np.arange(len(place)), count)
        at = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(row_N))
        at %= self._max_fires
        fires_N = np.empty(len(row_N), FIRE_DTYPE)
        fires_N["row"], fires_N["feature"], fires_N["act"] = row_N, self._feature[at], self._act[at]
        found = ScoredRows(fires_N, self._dense[place], self._norm[place])
        if len(first) and first.min() < self._fires - self._max_fires // 2:
            self.write(slot_K[there_K], found)
        return there_K, found
