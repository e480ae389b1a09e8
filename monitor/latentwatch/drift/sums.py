"""What a baseline is made of: sums over the windows of trusted traffic, bounded, that add across collectors and days.

Shape legend: F features, L levels, B = L + 1 buckets, C cells, H hours of the week (UTC, Monday 00:00 first), Z scales,
S strata (adapters), K kept tail values, N canary prompts, P features watched in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Final

import numpy as np

from latentwatch.aggregate.counts import CELLS, Layout, RequestCounts, above
from latentwatch.arrays import Array, axes, check
from latentwatch.drift.windows import no_windows, union, with_window

HOURS: Final = 168
SCALES: Final = (1, 4, 16)
"""Windows per block in which dispersion is measured: requests of one conversation fall into neighbouring windows."""
BLOCK_SECONDS: Final = 960.0
"""No block is longer: over hours the season itself would be taken for dispersion."""
TAIL: Final = 256
"""Largest values kept per feature: the request limit at a false-positive rate of 1 in 1,000 needs 100 of 100,000."""
CANARIES: Final = 64
STRATA: Final = 8
"""Adapters and routes with counts of their own, and the last place, which all others share."""
SMALLEST_SHARE: Final = 1 / 64
"""Of requests: who has less gives its place to a newcomer who has more. Names that are made up, one for each request,
take no place from an adapter or route that people use."""
_NOT_STORED: Final = ("hour_FB", "hour_stamp", "blocks", "strata")
_MONDAY_SECONDS: Final = 4 * 86400
"""1970-01-05 was a Monday."""


def hour_of_week(seconds: float) -> int:
    """0..167 of a Unix time."""
    return int((seconds - _MONDAY_SECONDS) // 3600) % HOURS


@dataclass
class TrafficSums:
    """Sums over windows. `merge` is associative and commutative; `empty` is its neutral element."""

    hour_levels_HFB: Array = field(metadata=axes("H", "F", "B", dtype=np.int64))
    """Requests by hour of the week and score bucket, int64."""
    hour_square_HFL: Array = field(metadata=axes("H", "F", "L"))
    """Sum over completed hours of a^2 / n, with a of n requests above the level."""
    hour_count_H: Array = field(metadata=axes("H", dtype=np.int64))
    """Completed hours with requests, int64."""
    difference_ZFL: Array = field(metadata=axes("Z", "F", "L"))
    """Sum over neighbouring blocks of (a/n - a'/n')^2 / (1/n + 1/n'): free of whatever moves slowly."""
    differences_Z: Array = field(metadata=axes("Z", dtype=np.int64))
    """Terms in it, int64."""
    hour_together_HL: Array = field(metadata=axes("H", "L"))
    """As `hour_square_HFL`, of the active requests of all features together: what they have in common."""
    together_ZL: Array = field(metadata=axes("Z", "L"))
    """As `difference_ZFL`, of all features together."""
    strata_SFB: Array = field(metadata=axes("S", "F", "B", dtype=np.int64))
    """Requests by adapter and score bucket, int64."""
    hour_strata_HS: Array = field(metadata=axes("H", "S", dtype=np.int64))
    """Requests by hour of the week and adapter, int64: without it an adapter's hours would count twice."""
    cells_FC: Array = field(metadata=axes("F", "C", dtype=np.int64))
    tail_FK: Array = field(metadata=axes("F", "K", dtype=np.float32))
    """The largest values, descending, -inf where there are fewer."""
    coactive_PP: Array = field(metadata=axes("P", "P", dtype=np.int64))
    canary_N: Array = field(metadata=axes("N", dtype=np.int64))
    """Runs of each canary prompt, int64."""
    canary_sum_NF: Array = field(metadata=axes("N", "F"))
    """Of its values, 0 where a feature did not fire."""
    canary_square_NF: Array = field(metadata=axes("N", "F"))
    windows_W2: Array = field(metadata=axes("W", "2", dtype=np.int64))
    """Which windows; see windows.py."""
    totals: Array = field(metadata=axes("4"))
    """Requests, windows, first and last time as Unix seconds (inf and -inf before any), float64 [4]."""
    hour_FB: Array = field(repr=False, metadata=axes("F", "B", dtype=np.int64))
    """The hour that is not over yet."""
    blocks: list[Block] = field(repr=False)
    """Per scale, the block that is not full and the one before it; not merged."""
    hour_stamp: int = 0
    strata: tuple[str, ...] = ()
    """Adapter of each stratum that is one's own, at most STRATA - 1."""

    @classmethod
    def empty(cls, layout: Layout) -> TrafficSums:
        """Nothing seen yet."""
        features, levels = layout.levels_FL.shape
        return cls._sized(features, levels, len(layout.pairs_P))

    @classmethod
    def _sized(cls, F: int, L: int, P: int) -> TrafficSums:
        return cls(
            hour_levels_HFB=np.zeros((HOURS, F, L + 1), np.int64),
            hour_square_HFL=np.zeros((HOURS, F, L)),
            hour_count_H=np.zeros(HOURS, np.int64),
            difference_ZFL=np.zeros((len(SCALES), F, L)),
            differences_Z=np.zeros(len(SCALES), np.int64),
            hour_together_HL=np.zeros((HOURS, L)),
            together_ZL=np.zeros((len(SCALES), L)),
            strata_SFB=np.zeros((STRATA, F, L + 1), np.int64),
            hour_strata_HS=np.zeros((HOURS, STRATA), np.int64),
            cells_FC=np.zeros((F, CELLS), np.int64),
            tail_FK=np.full((F, TAIL), -np.inf, np.float32),
            coactive_PP=np.zeros((P, P), np.int64),
            canary_N=np.zeros(CANARIES, np.int64),
            canary_sum_NF=np.zeros((CANARIES, F)),
            canary_square_NF=np.zeros((CANARIES, F)),
            windows_W2=no_windows(),
            totals=np.array([0, 0, np.inf, -np.inf]),
            hour_FB=np.zeros((F, L + 1), np.int64),
            blocks=[Block.empty(F, L) for _ in SCALES],
        )

    @property
    def requests(self) -> int:
        """Requests counted."""
        return int(self.totals[0])

    def requests_of(self, feature: int) -> int:
        """Requests counted for one feature; of a dense one those that had a score."""
        return int(self.hour_levels_HFB[:, feature].sum() + self.hour_FB[feature].sum())

    @property
    def levels_FB(self) -> Array:
        """Requests by score bucket over everything, the hour that is not over included."""
        total: Array = self.hour_levels_HFB.sum(axis=0) + self.hour_FB
        return total

    @property
    def span_seconds(self) -> float:
        """From the first window to the last."""
        return max(0.0, float(self.totals[3] - self.totals[2])) if self.requests else 0.0

    def arrays(self) -> dict[str, Array]:
        """What a file keeps: the sums. The hour that is not over is finished, blocks that are not full are left out."""
        self.finish_hour()
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_STORED}

    @classmethod
    def from_arrays(cls, layout: Layout, arrays: Mapping[str, Array], strata: tuple[str, ...]) -> TrafficSums:
        """The inverse of `arrays`. Raises ValueError naming the array whose shape, type or content is not right."""
        observed = cls.empty(layout)
        for name, expected in observed.arrays().items():
            found = arrays.get(name)
            if found is None or found.shape[1:] != expected.shape[1:] or found.dtype != expected.dtype:
                raise ValueError(f"array {name} is {'absent' if found is None else (found.shape, str(found.dtype))}")
            if len(found) != len(expected) and name != "windows_W2":
                raise ValueError(f"array {name} has shape {found.shape}, expected {expected.shape}")
            if np.isnan(found).any() or (name not in ("tail_FK", "canary_sum_NF", "totals") and (found < 0).any()):
                raise ValueError(f"array {name} holds NaN or a negative count")
            setattr(observed, name, found.copy())
        if len(strata) >= STRATA:
            raise ValueError(f"{len(strata)} strata with a name, at most {STRATA - 1} have one")
        observed.strata = strata
        return observed

    def check(self, layout: Layout) -> None:
        """Raise ValueError where these are sums over other features."""
        F, L = layout.levels_FL.shape
        lengths = {"F": F, "L": L, "B": L + 1, "P": len(layout.pairs_P)}
        check(self, **lengths, H=HOURS, Z=len(SCALES), S=STRATA, C=CELLS, K=TAIL, N=CANARIES, **{"2": 2, "4": 4})
        if len(self.blocks) != len(SCALES) or len(self.strata) >= STRATA:
            raise ValueError(f"{len(self.blocks)} blocks and {len(self.strata)} strata")
        for block in self.blocks:
            check(block, F=F, L=L)

    def strata_of(self, adapter_G: Sequence[str], requests_G: Array) -> Array:
        """Index of each group's stratum in a window with so many requests of it.

        While places are free a newcomer gets one. Then one with at least `SMALLEST_SHARE` of the window gets the place
        of whoever has fewest requests, if that is less than `SMALLEST_SHARE` of all; what that one had is from then on
        everybody's, in the shared place.
        """
        of_adapter: dict[str, int] = {}
        for adapter, requests in zip(adapter_G, requests_G.tolist(), strict=True):
            of_adapter[adapter] = of_adapter.get(adapter, 0) + int(requests)
        for adapter in sorted(of_adapter.keys() - set(self.strata), key=lambda name: (-of_adapter[name], name)):
            if len(self.strata) < STRATA - 1:
                self.strata = (*self.strata, adapter)
            elif of_adapter[adapter] >= SMALLEST_SHARE * sum(of_adapter.values()):
                self._give_place(adapter, of_adapter)
        index = {name: i for i, name in enumerate(self.strata)}
        return np.array([index.get(adapter, STRATA - 1) for adapter in adapter_G], np.int64)

    def _give_place(self, adapter: str, of_adapter: Mapping[str, int]) -> None:
        # With this window's, or two newcomers would take the place from each other.
        requests_S = self.hour_strata_HS.sum(axis=0)
        requests_S[: STRATA - 1] += [of_adapter.get(name, 0) for name in self.strata]
        smallest = int(requests_S[: STRATA - 1].argmin())
        if requests_S[smallest] >= SMALLEST_SHARE * (self.hour_strata_HS.sum() + sum(of_adapter.values())):
            return
        for counts in (self.strata_SFB, self.hour_strata_HS.T):
            counts[STRATA - 1] += counts[smallest]
            counts[smallest] = 0
        self.strata = (*self.strata[:smallest], adapter, *self.strata[smallest + 1 :])

    @property
    def unnamed_requests(self) -> int:
        """Requests of adapters and routes that share the last place."""
        return int(self.hour_strata_HS[:, STRATA - 1].sum())

    def add_window(
        self, counts: RequestCounts, stratum_G: Array, end_seconds: float, window_seconds: float = 60.0, key: int = 0
    ) -> None:
        """Take a window that closed at this time. One without requests changes nothing.

        Args: key: which one it is, see windows.key_of; 0 where nobody will ask.
        """
        requests_G = counts.requests_GF.max(axis=1)
        requests = int(requests_G.sum())
        if not requests:
            return
        levels_FB = np.zeros_like(self.hour_FB)
        hour = hour_of_week(end_seconds)
        for stratum in np.unique(stratum_G).tolist():
            of_stratum_G = stratum_G == stratum
            stratum_FB = counts.levels_GFB[of_stratum_G].sum(axis=0)
            self.strata_SFB[stratum] += stratum_FB
            self.hour_strata_HS[hour, stratum] += requests_G[of_stratum_G].sum()
            levels_FB += stratum_FB
        self.cells_FC += counts.cells_FC
        self.coactive_PP += counts.coactive_PP
        first, last = self.totals[2:]
        self.totals = np.array(
            [self.totals[0] + requests, self.totals[1] + 1, min(first, end_seconds), max(last, end_seconds)]
        )
        self.windows_W2 = with_window(self.windows_W2, end_seconds, key)
        above_FL, requests_F = above(levels_FB), levels_FB.sum(axis=1)
        self._add_hour(end_seconds, levels_FB)
        for z, (scale, block) in enumerate(zip(SCALES, self.blocks, strict=True)):
            if scale > 1 and scale * window_seconds > BLOCK_SECONDS:
                continue
            block.add(above_FL, requests_F)
            if block.windows == scale:
                if block.has_previous:
                    self.difference_ZFL[z] += block.squared_difference()
                    self.together_ZL[z] += block.squared_difference_together()
                    self.differences_Z[z] += 1
                block.turn()

    def _add_hour(self, end_seconds: float, levels_FB: Array) -> None:
        stamp = int(end_seconds // 3600)
        if stamp != self.hour_stamp:
            # A clock that steps back only ends the hour early.
            self.finish_hour()
        self.hour_stamp = stamp
        self.hour_FB += levels_FB

    def finish_hour(self) -> None:
        """Count the hour that is not over as one of its own: a short hour is a block like another."""
        requests_F = self.hour_FB.sum(axis=1)
        if not requests_F.any():
            return
        hour = hour_of_week(self.hour_stamp * 3600)
        self.hour_levels_HFB[hour] += self.hour_FB
        above_FL = above(self.hour_FB)
        self.hour_square_HFL[hour] += above_FL**2 / np.maximum(requests_F, 1)[:, None]
        self.hour_together_HL[hour] += above_FL.sum(axis=0) ** 2 / requests_F.max()
        self.hour_count_H[hour] += 1
        self.hour_FB[:] = 0

    def add_tail(self, value_nF: Array) -> None:
        """Remember the largest values of requests, [n, F]; not finite for none."""
        value_nF = np.where(np.isfinite(value_nF), value_nF, -np.inf).astype(np.float32)
        (features,) = np.nonzero(value_nF.max(axis=0, initial=-np.inf) > self.tail_FK[:, -1])
        joined = np.concatenate((self.tail_FK[features], value_nF[:, features].T), axis=1)
        self.tail_FK[features] = -np.sort(-joined, axis=1)[:, :TAIL]

    def add_canary(self, prompt: int, value_F: Array) -> None:
        """One run of canary prompt 0..N-1 with each feature's value, 0 where it did not fire."""
        self.canary_N[prompt] += 1
        self.canary_sum_NF[prompt] += value_F
        self.canary_square_NF[prompt] += value_F.astype(np.float64) ** 2

    def merge(self, other: TrafficSums) -> TrafficSums:
        """Both together; what is in both counts twice, see Baseline.merge. Raises ValueError where the sums are over
        different features."""
        if (
            self.hour_levels_HFB.shape != other.hour_levels_HFB.shape
            or self.coactive_PP.shape != other.coactive_PP.shape
        ):
            raise ValueError("baselines over different features do not add")
        mine, theirs = self.arrays(), other.arrays()
        merged = {name: mine[name] + theirs[name] for name in mine if name != "windows_W2"}
        merged["windows_W2"] = union(self.windows_W2, other.windows_W2)
        tail = np.concatenate((self.tail_FK, other.tail_FK), axis=1)
        merged["tail_FK"] = -np.sort(-tail, axis=1)[:, :TAIL]
        merged["totals"] = np.array(
            [
                *(self.totals[:2] + other.totals[:2]),
                min(self.totals[2], other.totals[2]),
                max(self.totals[3], other.totals[3]),
            ]
        )
        # Strata are told apart by name; in a fixed order, so that a + b is b + a.
        strata = tuple(sorted({*self.strata, *other.strata}))
        merged["strata_SFB"] = np.zeros_like(self.strata_SFB)
        merged["hour_strata_HS"] = np.zeros_like(self.hour_strata_HS)
        for part in (self, other):
            for s, name in enumerate(part.strata):
                to = min(strata.index(name), STRATA - 1)
                merged["strata_SFB"][to] += part.strata_SFB[s]
                merged["hour_strata_HS"][:, to] += part.hour_strata_HS[:, s]
            merged["strata_SFB"][-1] += part.strata_SFB[-1]
            merged["hour_strata_HS"][:, -1] += part.hour_strata_HS[:, -1]
        together = TrafficSums._sized(
            self.hour_square_HFL.shape[1], self.hour_square_HFL.shape[2], len(self.coactive_PP)
        )
        for name, array in merged.items():
            setattr(together, name, array)
        together.strata = strata[: STRATA - 1]
        return together


@dataclass
class Block:
    """Windows of a block that is not over, and the counts of the block before it."""

    above_FL: Array = field(metadata=axes("F", "L"))
    requests_F: Array = field(metadata=axes("F", dtype=np.int64))
    previous_above_FL: Array = field(metadata=axes("F", "L"))
    previous_requests_F: Array = field(metadata=axes("F", dtype=np.int64))
    windows: int = 0
    has_previous: bool = False

    @classmethod
    def empty(cls, features: int, levels: int) -> Block:
        return cls(
            np.zeros((features, levels), np.float64),
            np.zeros(features, np.int64),
            np.zeros((features, levels), np.float64),
            np.zeros(features, np.int64),
        )

    def add(self, above_FL: Array, requests_F: Array) -> None:
        self.above_FL += above_FL
        self.requests_F += requests_F
        self.windows += 1

    def squared_difference(self) -> Array:
        """(a/n - a'/n')^2 / (1/n + 1/n'), 0 where one block had no request; [F, L]."""
        n_F1, m_F1 = self.requests_F[:, None], self.previous_requests_F[:, None]
        known = (n_F1 > 0) & (m_F1 > 0)
        n_F1, m_F1 = np.maximum(n_F1, 1), np.maximum(m_F1, 1)
        difference_FL = self.above_FL / n_F1 - self.previous_above_FL / m_F1
        squared: Array = np.where(known, difference_FL**2 / (1 / n_F1 + 1 / m_F1), 0.0)
        return squared

    def squared_difference_together(self) -> Array:
        """The same of all features' counts added up, [L]."""
        n, m = int(self.requests_F.max(initial=0)), int(self.previous_requests_F.max(initial=0))
        if not n or not m:
            return np.zeros(self.above_FL.shape[1])
        difference_L = self.above_FL.sum(axis=0) / n - self.previous_above_FL.sum(axis=0) / m
        squared: Array = difference_L**2 / (1 / n + 1 / m)
        return squared

    def turn(self) -> None:
        """Make this block the previous one and begin the next."""
        self.previous_above_FL, self.above_FL = self.above_FL, self.previous_above_FL
        self.previous_requests_F, self.requests_F = self.requests_F, self.previous_requests_F
        self.has_previous = True
        self.above_FL[:] = 0
        self.requests_F[:] = 0
        self.windows = 0
