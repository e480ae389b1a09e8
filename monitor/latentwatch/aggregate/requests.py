"""Running statistics of every open request and feature, in arrays allocated once.

Shape legend: K request slots, S segments, R rows, N fired activations, F features, P dense features, L features with a
statistic of their own (see FeatureTable.special_F).

Guarantee: what is known of a request after its last token does not depend on how its tokens were cut into steps nor on
which other requests shared those steps, as long as its positions arrive in order. Maxima and counts do not even need
the order; rolling means and the first exceedance do.

Memory: K * (13 F + 8 L + 2 W per rolling feature) bytes; the operating system backs only the slots that were used. A
step is worked on in slices of some VALUES numbers, so that besides its own columns it takes some tens of MiB whatever
its shape: a prefix-cache hit brings 128k tokens at once, and each rolling mean has a value at each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np

from latentwatch.aggregate.features import FeatureTable, phase_bit
from latentwatch.aggregate.packed_max import NOTHING, pack, positions, values
from latentwatch.aggregate.rolling import RollingMeans, RollingState
from latentwatch.arrays import Array, axes, check
from latentwatch.facts import EXCEEDANCE
from latentwatch.names import Phase
from latentwatch.step.batch import StepBatch, owns_rows

FLOAT16_MAX = float(np.finfo(np.float16).max)
VALUES: Final = 1 << 17
"""In one slice, rows times features, or activations: 1 MiB of float64, which stays in a cache."""

_FOUND = np.dtype([("slot", "<i8"), ("exceedance", EXCEEDANCE)])
_NOTHING_FOUND = np.empty(0, _FOUND)
_NONE, _NO_SLOTS = np.empty(0, EXCEEDANCE), np.empty(0, np.int64)


@dataclass(frozen=True)
class StepView:
    """What one step showed of the features, over all its requests."""

    fired_F: Array
    """Tokens on which each feature fired, int64; dense features 0. Positions that the feature skips do not count."""
    peak_F: Array
    """Largest value of each feature's statistic in this step, float32; -inf where there was none."""
    exceedances: Array
    """EXCEEDANCE, at most one per slot and feature in the whole life of a request."""
    exceeding_slots: Array
    """The slot of each one."""
    rows: Rows
    """Where the step's rows belong."""


@dataclass(frozen=True)
class RequestFeatures:
    """What is known of n requests; copies, safe to keep. Shapes are [n, F]."""

    max_nF: Array
    """Largest activation or score over the counted tokens, float32; NaN where a sparse feature never fired."""
    max_position_nF: Array
    """-1 where max_nF is NaN."""
    statistic_nF: Array
    """The limit's statistic, else the maximum; float32, NaN where there is none yet."""
    statistic_position_nF: Array
    """Position of the maximum, or of the last token of the best window; -1 where there is none."""
    fired_nF: Array
    """Tokens on which the feature fired, int64; 0 for dense features."""
    exceeded_nF: Array
    """bool: the statistic went above the limit."""

    def of(self, requests: Sequence[int]) -> RequestFeatures:
        """The same of some of the requests; copies."""
        return RequestFeatures(**{name: array_nF[requests] for name, array_nF in vars(self).items()})

    def columns(self) -> dict[str, Array]:
        """The arrays themselves, by their names in FEATURE_STAT: all of them but its `index`."""
        return {
            "max": self.max_nF,
            "position": self.max_position_nF,
            "statistic": self.statistic_nF,
            "statistic_position": self.statistic_position_nF,
            "fired": self.fired_nF,
            "exceeded": self.exceeded_nF,
        }


@dataclass(frozen=True)
class StatisticsState:
    """What is in some slots of a RequestStates."""

    max: Array = field(metadata=axes("slots", "features", dtype=np.uint64))
    special: Array = field(metadata=axes("slots", "specials", dtype=np.uint64))
    fired: Array = field(metadata=axes("slots", "features", dtype=np.uint32))
    exceeded: Array = field(metadata=axes("slots", "features", dtype=bool))
    rolling: list[RollingState]


class RequestStates:
    """K slots of running statistics. The caller says which slot a request has and when it is free again."""

    def __init__(self, table: FeatureTable, slots: int) -> None:
        self.table = table
        F, L = table.features, table.specials
        self._max = np.zeros((slots, F), np.uint64)
        self._special = np.zeros((slots, L), np.uint64)
        self._fired = np.zeros((slots, F), np.uint32)
        self._exceeded = np.zeros((slots, F), bool)
        self._rolling = [RollingMeans(group, table.limit_F[group.features], slots) for group in table.rolling]
        self._skips = bool(table.skip_F.any())
        P = table.dense_P
        self._column_F = np.full(F, -1)
        self._column_F[P] = np.arange(len(P))
        self._rolling_F = (table.special_F >= 0) & ~table.special_max_F

    def clear(self, slots: Array) -> None:
        """Make slots ready for new requests."""
        self._max[slots] = NOTHING
        self._special[slots] = NOTHING
        self._fired[slots] = 0
        self._exceeded[slots] = False
        for rolling in self._rolling:
            rolling.clear(slots)

    def state(self, slots: Array) -> StatisticsState:
        """What is in these slots; copies."""
        return StatisticsState(
            self._max[slots],
            self._special[slots],
            self._fired[slots],
            self._exceeded[slots],
            [means.state(slots) for means in self._rolling],
        )

    def restore(self, slots: Array, state: StatisticsState) -> None:
        """Put `state` of as many slots into these. Raises ValueError where it does not fit."""
        check(state, slots=len(slots), features=self.table.features, specials=self.table.specials)
        self._max[slots], self._special[slots] = state.max, state.special
        self._fired[slots], self._exceeded[slots] = state.fired, state.exceeded
        for means, of_group in zip(self._rolling, state.rolling, strict=True):
            means.restore(slots, of_group)

    def update(self, batch: StepBatch, slot_S: Array, now: float) -> StepView:
        """Merge the scores of one validated step.

        Args: slot_S: the slot of each segment's request, [S]; segments without rows may carry anything.
              now: what exceedances say of their time.
        """
        table = self.table
        owner_S = owns_rows(batch.segments_S)
        rows = Rows.of(batch.segments_S[owner_S], slot_S[owner_S])
        peak_F = np.full(table.features, NOTHING, np.uint64)
        if not owner_S.any():
            return StepView(np.zeros(table.features, np.int64), values(peak_F, -np.inf), _NONE, _NO_SLOTS, rows)
        fired_F, found = np.zeros(table.features, np.int64), list[Array]()
        for part in slices(len(batch.fires_N), 1):
            fired_in_part_F, sparse = self._sparse(batch.fires_N[part], rows, peak_F)
            fired_F += fired_in_part_F
            found.append(sparse)
        if len(table.dense_P):
            for part in slices(batch.rows, len(table.dense_P)):
                found.append(self._dense(batch.dense_RP[part], rows.part(part), peak_F))
        for i, group in enumerate(table.rolling):
            scores = _Scores.of(batch, group.features, self._column_F)
            for part in slices(batch.rows, len(group.features)):
                found.append(self._roll(i, scores, rows, rows.by_position[part], peak_F))
        exceedances, slots = self._first(found, now)
        return StepView(fired_F, values(peak_F, -np.inf), exceedances, slots, rows)

    def features_of(self, slots: Array) -> RequestFeatures:
        """Everything known of the requests in these slots."""
        largest, statistic = self._max[slots], self._statistic(slots)
        return RequestFeatures(
            max_nF=values(largest),
            max_position_nF=positions(largest),
            statistic_nF=values(statistic),
            statistic_position_nF=positions(statistic),
            fired_nF=self._fired[slots].astype(np.int64),
            exceeded_nF=self._exceeded[slots],
        )

    def statistic(self, slot: int, feature: int) -> float:
        """The limit's statistic (else the maximum) of one feature of the request in this slot; NaN for none yet."""
        return float(values(self._statistic(np.array([slot]))[:, feature])[0])

    def _statistic(self, slots: Array) -> Array:
        special = self.table.special_F
        packed: Array = self._max[slots]
        packed[:, special >= 0] = self._special[slots][:, special[special >= 0]]
        return packed

    def _sparse(self, fires_N: Array, rows: Rows, peak_F: Array) -> tuple[Array, Array]:
        table, F = self.table, self.table.features
        row, feature, act = fires_N["row"], fires_N["feature"].astype(np.int64), fires_N["act"]
        slot, position = rows.slot[row], rows.position[row]
        if self._skips:
            counted = position >= table.skip_F[feature]
            row, feature, act, slot, position = (column[counted] for column in (row, feature, act, slot, position))
        packed = pack(act, position)
        key = slot * F + feature
        np.maximum.at(self._max.reshape(-1), key, packed)
        np.add.at(self._fired.reshape(-1), key, np.uint32(1))
        in_statistic = np.ones(len(feature), bool)
        if table.specials:
            in_phase = (rows.phase_bit[row] & table.phases_F[feature]) != 0
            special = np.flatnonzero(table.special_max_F[feature] & in_phase)
            special_key = slot[special] * table.specials + table.special_F[feature[special]]
            np.maximum.at(self._special.reshape(-1), special_key, packed[special])
            in_statistic = in_phase & ~self._rolling_F[feature]
        np.maximum.at(peak_F, feature[in_statistic], packed[in_statistic])
        over = np.flatnonzero((act > table.token_limit_F[feature]) & in_statistic)
        found = _found(slot[over], feature[over], position[over], act[over], rows.phase_bit[row[over]])
        return np.bincount(feature, minlength=F).astype(np.int64), _earliest(found, F)

    def _dense(self, score_RP: Array, rows: Rows, peak_F: Array) -> Array:
        table, P = self.table, self.table.dense_P
        packed_RP = pack(score_RP, rows.position[:, None])
        if self._skips:
            packed_RP = np.where(rows.position[:, None] >= table.skip_F[P], packed_RP, NOTHING)
        packed_SP = np.maximum.reduceat(packed_RP, rows.first_S, axis=0)
        _keep_largest(self._max, rows.slot_S, P, packed_SP)
        in_statistic_SP = ((rows.phase_bit_S[:, None] & table.phases_F[P]) != 0) & ~self._rolling_F[P]
        statistic_SP = np.where(in_statistic_SP, packed_SP, NOTHING)
        peak_F[P] = np.maximum(peak_F[P], statistic_SP.max(axis=0))
        special = np.flatnonzero(table.special_max_F[P])
        _keep_largest(self._special, rows.slot_S, table.special_F[P[special]], statistic_SP[:, special])
        row, column = np.nonzero((score_RP > table.token_limit_F[P]) & (packed_RP != NOTHING))
        in_phase = (rows.phase_bit[row] & table.phases_F[P[column]]) != 0
        row, column = row[in_phase], column[in_phase]
        found = _found(rows.slot[row], P[column], rows.position[row], score_RP[row, column], rows.phase_bit[row])
        return _earliest(found, table.features)

    def _roll(self, index: int, scores: _Scores, rows: Rows, chosen_R: Array, peak_F: Array) -> Array:
        """Args: chosen_R: rows, by slot and then by position."""
        group = self.table.rolling[index]
        step = self._rolling[index].update(
            rows.slot[chosen_R], rows.position[chosen_R], rows.phase_bit[chosen_R], scores.rows(chosen_R)
        )
        if step is None:
            return _NOTHING_FOUND
        _keep_largest(self._special, step.slot_U, self.table.special_F[group.features], step.packed_UG)
        peak_F[group.features] = np.maximum(peak_F[group.features], step.packed_UG.max(axis=0))
        return _earliest(
            _found(
                step.over_slot,
                group.features[step.over_feature],
                step.over_position,
                step.over_value,
                step.over_phase_bit,
            ),
            self.table.features,
        )

    def _first(self, parts: Sequence[Array], now: float) -> tuple[Array, Array]:
        """The earliest exceedance of each slot and feature that has had none yet, now marked; and the slots."""
        parts = [some[~self._exceeded[some["slot"], some["exceedance"]["feature"]]] for some in parts]
        if not any(map(len, parts)):
            return _NONE, _NO_SLOTS
        found = np.concatenate(parts)
        del parts
        found = _earliest(found, self.table.features)
        self._exceeded[found["slot"], found["exceedance"]["feature"]] = True
        found["exceedance"]["seconds"] = now
        return found["exceedance"].copy(), found["slot"]


@dataclass(frozen=True)
class Rows:
    """The rows of a step, in wire order: which slot, position and phase each one belongs to."""

    slot_S: Array
    phase_bit_S: Array
    first_S: Array
    """First row of each segment."""
    slot: Array
    position: Array
    phase_bit: Array

    @classmethod
    def of(cls, segments_S: Array, slot_S: Array) -> Rows:
        count_S = segments_S["count"].astype(np.int64)
        first_S = np.cumsum(count_S) - count_S
        bit_S = phase_bit(segments_S["phase"])
        row_offset_S = segments_S["start"] - first_S
        return cls(
            slot_S=slot_S,
            phase_bit_S=bit_S,
            first_S=first_S,
            slot=np.repeat(slot_S, count_S),
            position=np.arange(int(count_S.sum())) + np.repeat(row_offset_S, count_S),
            phase_bit=np.repeat(bit_S, count_S),
        )

    def part(self, part: slice) -> Rows:
        """Consecutive ones of them; the segment that a cut goes through is in both."""
        first, end = part.start, min(part.stop, len(self.slot))
        if end - first == len(self.slot):
            return self
        begin = int(np.searchsorted(self.first_S, first, "right")) - 1
        stop = int(np.searchsorted(self.first_S, end))
        return Rows(
            slot_S=self.slot_S[begin:stop],
            phase_bit_S=self.phase_bit_S[begin:stop],
            first_S=np.maximum(self.first_S[begin:stop] - first, 0),
            slot=self.slot[part],
            position=self.position[part],
            phase_bit=self.phase_bit[part],
        )

    @cached_property
    def by_position(self) -> Array:
        """Order of the rows by slot, then position."""
        order: Array = np.lexsort((self.position, self.slot))
        return order


@dataclass(frozen=True)
class _Scores:
    """What a step says of some features, G of them, at each of its rows."""

    dense_RP: Array
    column_G: Array
    """Dense column of each feature, -1 for a sparse one."""
    row_N: Array
    """Row of each activation of the sparse ones, ascending."""
    feature_N: Array
    """0..G-1 of each one."""
    act_N: Array
    """Float16; an activation beyond it counts as its largest value."""

    @classmethod
    def of(cls, batch: StepBatch, features: Array, column_F: Array) -> _Scores:
        """Args: column_F: dense column of each feature of the watchlist, -1 for a sparse one."""
        place_F = np.full(len(column_F), -1)
        place_F[features] = np.arange(len(features))
        place_F[column_F >= 0] = -1
        fires = batch.fires_N[place_F[batch.fires_N["feature"]] >= 0]
        act_N = np.clip(fires["act"], -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
        return cls(batch.dense_RP, column_F[features], fires["row"], place_F[fires["feature"]], act_N)

    def rows(self, chosen_R: Array) -> Array:
        """Float16 [R, G] at these rows."""
        dense_G = self.column_G >= 0
        if dense_G.all():
            return self.dense_RP[chosen_R[:, None], self.column_G]
        score_RG = np.zeros((len(chosen_R), len(self.column_G)), np.float16)
        if dense_G.any():
            score_RG[:, dense_G] = self.dense_RP[chosen_R[:, None], self.column_G[dense_G]]
        first_R = np.searchsorted(self.row_N, chosen_R)
        count_R = np.searchsorted(self.row_N, chosen_R, "right") - first_R
        place = np.repeat(np.arange(len(chosen_R)), count_R)
        at = np.arange(len(place)) + np.repeat(first_R - np.cumsum(count_R) + count_R, count_R)
        score_RG[place, self.feature_N[at]] = self.act_N[at]
        return score_RG


def slices(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows of so many values each."""
    rows = max(1, VALUES // max(1, width))
    return (slice(first, first + rows) for first in range(0, count, rows))


def _earliest(found: Array, features: int) -> Array:
    """Of _FOUND of one step, the one at the lowest position of each slot and feature, by slot and feature."""
    if not len(found):
        return found
    key = found["slot"] * features + found["exceedance"]["feature"]
    order = np.lexsort((found["exceedance"]["position"], key))
    found, key = found[order], key[order]
    earliest: Array = found[np.append(True, key[1:] != key[:-1])]
    return earliest


def _keep_largest(state_KC: Array, slot_S: Array, columns: Array, packed_SC: Array) -> None:
    """Raise state[slot, column] to the packed values; a slot may stand more than once.

    By flat keys: ufunc.at is some ten times slower with an index per axis.
    """
    key_SC = (slot_S * state_KC.shape[1])[:, None] + columns
    np.maximum.at(state_KC.reshape(-1), key_SC.ravel(), packed_SC.ravel())


def _found(slot: Array, feature: Array, position: Array, value: Array, bit: Array) -> Array:
    if not len(slot):
        return _NOTHING_FOUND
    found = np.zeros(len(slot), _FOUND)
    found["slot"], exceedances = slot, found["exceedance"]
    exceedances["feature"], exceedances["position"], exceedances["value"] = feature, position, value
    exceedances["phase"] = np.where(bit == 1, Phase.PROMPT, Phase.OUTPUT)
    return found
