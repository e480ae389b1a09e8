"""Rolling means over consecutive tokens of each request, for all requests of a step at once.

Shape legend: R rows of the step, G features of the group, U runs (consecutive counted tokens of one request in this
step), W window.

Guarantee: the means do not depend, to the last bit, on how the tokens were cut into steps. Scores are float16, whose
values are multiples of 2**-24 below 2**16, so every window sum is exact in float64 and sums can be carried from step
to step (new value in, oldest value out). The running sum over a step's rows stays exact as well while the scores are
below 2**29 / R in size, e.g. 8192 rows of any float16 at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from latentwatch.aggregate.packed_max import NOTHING, pack
from latentwatch.arrays import Array, axes, check

if TYPE_CHECKING:
    from latentwatch.aggregate.features import RollingGroup


@dataclass(frozen=True)
class RollingStep:
    """What one step gave: the best mean of each run, and every (row, feature) whose mean is above the limit."""

    slot_U: Array
    packed_UG: Array
    """Largest mean and the position of its window's last token; NOTHING where no window was full."""
    over_slot: Array
    over_feature: Array
    """Column of the group, 0..G-1."""
    over_position: Array
    over_value: Array
    over_phase_bit: Array


@dataclass(frozen=True)
class RollingState:
    """What is in some slots of a RollingMeans."""

    last: Array = field(metadata=axes("slots", "window", "features", dtype=np.float16))
    sum: Array = field(metadata=axes("slots", "features"))
    next_position: Array = field(metadata=axes("slots", dtype=np.int64))
    length: Array = field(metadata=axes("slots", dtype=np.int64))


class RollingMeans:
    """Windows in progress of every request slot; the state is W values, one sum and two counters per slot."""

    def __init__(self, group: RollingGroup, limit_G: Array, slots: int) -> None:
        self._group = group
        self._limit_G = limit_G
        W, G = group.window_tokens, len(group.features)
        self._last = np.zeros((slots, W, G), np.float16)  # the value at position t stands at t % W
        self._sum = np.zeros((slots, G), np.float64)
        self._next_position = np.full(slots, -1, np.int64)
        self._length = np.zeros(slots, np.int64)

    def clear(self, slots: Array) -> None:
        """Forget what these slots held. Values of an earlier request are never read: its length is gone."""
        self._next_position[slots] = -1
        self._length[slots] = 0

    def state(self, slots: Array) -> RollingState:
        """What is in these slots; copies."""
        return RollingState(self._last[slots], self._sum[slots], self._next_position[slots], self._length[slots])

    def restore(self, slots: Array, state: RollingState) -> None:
        """Put `state` of as many slots into these. Raises ValueError where it does not fit."""
        _, W, G = self._last.shape
        check(state, slots=len(slots), window=W, features=G)
        self._last[slots], self._sum[slots] = state.last, state.sum
        self._next_position[slots], self._length[slots] = state.next_position, state.length

    def update(self, slot_R: Array, position_R: Array, phase_bit_R: Array, score_RG: Array) -> RollingStep | None:
        """Take the rows of one step, ordered by slot and then by position; None where none of them counts.

        Args: score_RG: float16, finite.
        """
        group, W = self._group, self._group.window_tokens
        counts = ((phase_bit_R & group.phases) != 0) & (position_R >= group.skip_first_positions)
        if not counts.all():
            slot_R, position_R, phase_bit_R, score_RG = (x[counts] for x in (slot_R, position_R, phase_bit_R, score_RG))
        if not len(slot_R):
            return None
        starts = np.ones(len(slot_R), bool)
        starts[1:] = (slot_R[1:] != slot_R[:-1]) | (position_R[1:] != position_R[:-1] + 1)
        first_U = np.flatnonzero(starts)
        run_R = np.cumsum(starts) - 1
        slot_U = slot_R[first_U]
        # A second run of one slot in one step lies behind a gap: its start is not the stored position either.
        goes_on_U = self._next_position[slot_U] == position_R[first_U]
        length_R = np.arange(len(slot_R)) - first_U[run_R] + 1  # tokens of the run so far, in this step
        total_R = length_R + np.where(goes_on_U, self._length[slot_U], 0)[run_R]

        leaving_RG = self._leaving(slot_R, position_R, score_RG, length_R, total_R)
        running_RG = np.cumsum(score_RG.astype(np.float64) - leaving_RG, axis=0)
        before_UG = np.zeros((len(first_U), score_RG.shape[1]))
        before_UG[1:] = running_RG[first_U[1:] - 1]
        carried_UG = np.where(goes_on_U[:, None], self._sum[slot_U], 0.0)
        sum_RG = running_RG + (carried_UG - before_UG)[run_R]

        self._keep(slot_R, position_R, score_RG, sum_RG, total_R, first_U)
        mean_RG, full_R = sum_RG / W, total_R >= W
        packed_RG = np.where(full_R[:, None], pack(mean_RG, position_R[:, None]), NOTHING)
        row, column = np.nonzero((mean_RG > self._limit_G) & full_R[:, None])
        return RollingStep(
            slot_U=slot_U,
            packed_UG=np.maximum.reduceat(packed_RG, first_U, axis=0),
            over_slot=slot_R[row],
            over_feature=column,
            over_position=position_R[row],
            over_value=mean_RG[row, column],
            over_phase_bit=phase_bit_R[row],
        )

    def _leaving(self, slot_R: Array, position_R: Array, score_RG: Array, length_R: Array, total_R: Array) -> Array:
        """The score W tokens earlier, which leaves the window as the row enters; 0 while the window fills."""
        W = self._group.window_tokens
        leaving_RG = np.zeros(score_RG.shape, np.float64)
        from_state = np.flatnonzero((total_R > W) & (length_R <= W))
        leaving_RG[from_state] = self._last[slot_R[from_state], position_R[from_state] % W]
        from_rows = np.flatnonzero(length_R > W)
        leaving_RG[from_rows] = score_RG[from_rows - W]
        return leaving_RG

    def _keep(
        self, slot_R: Array, position_R: Array, score_RG: Array, sum_RG: Array, total_R: Array, first_U: Array
    ) -> None:
        W = self._group.window_tokens
        last_U = np.append(first_U[1:], len(slot_R)) - 1
        run_end_R = np.repeat(last_U, np.diff(np.append(first_U, len(slot_R))))
        tail = np.flatnonzero(np.arange(len(slot_R)) > run_end_R - W)
        self._last[slot_R[tail], position_R[tail] % W] = score_RG[tail]
        # Where a slot has two runs the later one is assigned last and stands.
        self._sum[slot_R[last_U]] = sum_RG[last_U]
        self._next_position[slot_R[last_U]] = position_R[last_U] + 1
        self._length[slot_R[last_U]] = total_R[last_U]
