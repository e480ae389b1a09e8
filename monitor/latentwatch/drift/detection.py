"""All detectors of one model over one window, and their state: plain arrays that a checkpoint can hold.

Shape legend: F features, K alternatives, D replicas, G groups (replica, adapter), P features in pairs, 2 directions
(0 a rise, 1 a fall).

Each kind of detector gets an equal part of the page budget, and each of its streams an equal part of that: over the
whole watchlist, one false page in `Budget.seconds_per_page` on average, and fewer by as much as the nulls are wide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from latentwatch.aggregate.counts import Layout, RequestCounts
from latentwatch.arrays import Array, axes, check, described
from latentwatch.drift.common import (
    ALTERNATIVES,
    FALL,
    MEMORIES,
    RISE,
    Movement,
    common_llr,
    movement,
    remember,
)
from latentwatch.drift.detectors import (
    binomial_llr,
    cusum,
    pair_llr,
    rate_alternatives,
    replica_llr,
    shiryaev_roberts,
)
from latentwatch.drift.reference import PAIR_LIFT, RISES, TILTS, Reference, poisson_limits
from latentwatch.drift.sums import hour_of_week

KINDS: Final = ("rate", "shape", "replica", "coactivation", "canary")
"""What a feature's detectors look at; each has its own share of the page budget."""
REPLICA_TOLERANCE: Final = 1.1
REPLICA_RATIO: Final = 1.5
CANARY_NULL: Final = 0.01
"""Share of canary values that may deviate on the same model: rounding near a threshold."""
CANARY_ALTERNATIVE: Final = 0.3
_RATES: Final = 2 * len(RISES) - 1
_SHAPES: Final = len(TILTS) + 1
_RATIO_KEPT: Final = 0.99
"""Per window, of the sums behind the ratio shown without an alarm: their memory is 100 windows."""
_OVERSHOOT: Final = 1e3
"""How far above its limit a statistic may run, so that it comes down again soon after the change is over."""


@dataclass(frozen=True)
class Budget:
    """How often a false page may come, over the whole watchlist and all kinds of detectors."""

    seconds_per_page: float = 30 * 86400.0
    window_seconds: float = 60.0

    def limit(self, streams: int) -> float:
        """The statistic at which one of so many streams of a kind alarms."""
        return max(1, streams) * (len(KINDS) + 1) * self.seconds_per_page / self.window_seconds


@dataclass
class DetectorState:
    """What the detectors remember. `since` are Unix seconds of the last window at which a change had not begun."""

    rate_KF: Array = field(metadata=axes("rates", "F"))
    shape_KF: Array = field(metadata=axes("shapes", "F"))
    replica_2DF: Array = field(metadata=axes("2", "D", "F"))
    pair_PP: Array = field(metadata=axes("P", "P"))
    canary_F: Array = field(metadata=axes("F"))
    rate_walk_2F: Array = field(metadata=axes("2", "F"))
    rate_since_2F: Array = field(metadata=axes("2", "F"))
    active_2F: Array = field(metadata=axes("2", "F"))
    """Active requests since `rate_since_2F`."""
    expected_2F: Array = field(metadata=axes("2", "F"))
    """Those that the baseline expects for the same traffic."""
    shape_walk_KF: Array = field(metadata=axes("shapes", "F"))
    shape_since_KF: Array = field(metadata=axes("shapes", "F"))
    replica_walk_2DF: Array = field(metadata=axes("2", "D", "F"))
    replica_since_2DF: Array = field(metadata=axes("2", "D", "F"))
    pair_walk_PP: Array = field(metadata=axes("P", "P"))
    pair_since_PP: Array = field(metadata=axes("P", "P"))
    canary_walk_F: Array = field(metadata=axes("F"))
    canary_since_F: Array = field(metadata=axes("F"))
    recent_2F: Array = field(metadata=axes("2", "F"))
    """Active requests and expected ones of the last hundred windows or so, fading."""
    common_K: Array = field(metadata=axes("commons"))
    common_walk_2: Array = field(metadata=axes("2"))
    common_since_2: Array = field(metadata=axes("2"))
    memory_Z2F: Array = field(metadata=axes("memories", "2", "F"))
    """Active requests and expected ones, fading: what the common movement is read from."""
    windows: Array = field(metadata=axes("1", dtype=np.int64))
    """Windows with requests."""

    @classmethod
    def empty(cls, layout: Layout, replicas: int) -> DetectorState:
        """Nothing has happened."""
        lengths = _lengths(layout, replicas)
        return cls(**{name: np.zeros([lengths[a] for a in names], dtype) for name, names, dtype in described(cls)})

    def check(self, layout: Layout) -> None:
        """Raise ValueError where this is the state of detectors over other features."""
        check(self, **_lengths(layout, self.replica_2DF.shape[1]))

    def clear_replica(self, place: int) -> None:
        """Have a replica's detectors begin at nothing, for another one."""
        for name, names, _ in described(type(self)):
            if "D" in names:
                getattr(self, name)[:, place] = 0

    def grow(self, replicas: int) -> None:
        """Make room for more replicas; new ones begin at nothing."""
        for name, names, dtype in described(type(self)):
            if "D" in names:
                array = getattr(self, name)
                wider = np.zeros((2, replicas, array.shape[2]), dtype)
                wider[:, : array.shape[1]] = array
                setattr(self, name, wider)


def _lengths(layout: Layout, replicas: int) -> dict[str, int]:
    """Of each axis of a DetectorState."""
    P = len(layout.pairs_P)
    common = {"commons": 2 * len(ALTERNATIVES), "memories": len(MEMORIES)}
    return {"rates": _RATES, "shapes": _SHAPES, "F": layout.features, "P": P, "D": replicas, "2": 2, "1": 1, **common}


@dataclass(frozen=True)
class Window:
    """The requests of one window, and where they came from."""

    counts: RequestCounts
    replica_G: Array
    """0..D-1."""
    stratum_G: Array
    """Of the reference's strata."""
    end_seconds: float


@dataclass(frozen=True)
class CommonReading:
    """What the detector of the common movement says."""

    log10_evalue: float
    log10_limit: float
    since_seconds: float
    direction: int
    """RISE or FALL, whichever has more evidence."""
    movement: Movement

    @property
    def alarm(self) -> bool:
        """Whether it is above its limit."""
        return self.log10_evalue >= self.log10_limit


@dataclass(frozen=True)
class Readings:
    """What the detectors say after a window."""

    log10_evalue: dict[str, Array]
    """By kind, [F]; of a feature's replicas or pairs the largest."""
    log10_limit: dict[str, float]
    since_seconds: dict[str, Array]
    """By kind, [F]: when the change began if there is one."""
    direction: dict[str, Array]
    """By kind, [F]: RISE or FALL, whichever has more evidence. Of the rate; for "shape" of the values."""
    ratio_F: Array
    """Active requests / expected ones: since the change where the rate alarms, else lately; NaN where none is."""
    ratio_low_F: Array
    ratio_high_F: Array
    """95 % limits, widened by the dispersion."""
    replica_F: Array
    """Index of the replica that differs most."""
    partner_F: Array
    """Watchlist index of the feature that it fires with more than ever, -1 for none."""
    common: CommonReading

    @property
    def alarms(self) -> dict[str, Array]:
        """By kind, bool [F]."""
        return {kind: self.log10_evalue[kind] >= self.log10_limit[kind] for kind in KINDS}

    @property
    def alarming(self) -> bool:
        """Whether any detector is above its limit."""
        return self.common.alarm or any(bool(alarm_F.any()) for alarm_F in self.alarms.values())


def update(state: DetectorState, reference: Reference, layout: Layout, window: Window, budget: Budget) -> None:
    """Take one window into the state, in place. One without requests changes nothing: silence is no evidence."""
    counts = window.counts
    requests_GF = counts.requests_GF
    if not requests_GF.any():
        return
    now, hour = window.end_seconds, hour_of_week(window.end_seconds)
    beyond_FB = np.arange(counts.levels_GFB.shape[2]) > reference.level_F[:, None]
    active_GF = np.einsum("gfb,fb->gf", counts.levels_GFB, beyond_FB.astype(np.int64))
    expected_GF = requests_GF * reference.expected_GF(reference.rate_HF, hour, window.stratum_G)
    state.windows += 1
    moved = _common(state, reference, active_GF.sum(axis=0), expected_GF.sum(axis=0), now, budget)
    _rates(state, reference, window, requests_GF, active_GF, expected_GF, budget, moved)
    shape_llr_KF = np.einsum("fc,kfc->kf", counts.cells_FC, reference.shape_KFC)
    _advance(state.shape_KF, state.shape_walk_KF, state.shape_since_KF, shape_llr_KF, now, budget, layout.features)
    _replicas(state, reference, window, active_GF, expected_GF, budget)
    requests = float(requests_GF.max(axis=1).sum())
    llr_PP = pair_llr(counts.coactive_PP, requests, reference.pair_PP, reference.pair_phi_PP, ratio=PAIR_LIFT)
    _advance(state.pair_PP, state.pair_walk_PP, state.pair_since_PP, llr_PP, now, budget, _pairs(layout))


def update_canary(state: DetectorState, reference: Reference, prompt: int, value_F: Array, now: float) -> None:
    """Take one run of a canary prompt: which of its values are not those of the baseline. 0 stands for no value."""
    if prompt >= len(reference.canary_N) or reference.canary_N[prompt] < 2:
        return
    outside_F = (value_F < reference.canary_low_NF[prompt]) | (value_F > reference.canary_high_NF[prompt])
    deviates = np.log(CANARY_ALTERNATIVE / CANARY_NULL)
    conforms = np.log((1 - CANARY_ALTERNATIVE) / (1 - CANARY_NULL))
    llr_F = np.where(outside_F, deviates, conforms)
    shiryaev_roberts(state.canary_F, llr_F)
    grounded = cusum(state.canary_walk_F, llr_F)
    state.canary_since_F[grounded] = now


def evidence(state: DetectorState, layout: Layout, reference: Reference, budget: Budget) -> Readings:
    """What the state says."""
    F, P, replicas = layout.features, layout.pairs_P, state.replica_2DF.shape[1]
    every = np.arange(F)
    replica_DF = state.replica_2DF.mean(axis=0)
    # When one replica rises, the others' shares fall: the statistics all end at their ceiling, the walks do not.
    replica_F = state.replica_walk_2DF.max(axis=0).argmax(axis=0)
    replica_way_F = state.replica_walk_2DF[:, replica_F, every].argmax(axis=0)
    pair_PP = np.maximum(state.pair_PP, state.pair_PP.T)
    pair_since_PP = np.maximum(state.pair_since_PP, state.pair_since_PP.T)
    coactive_F, partner_F, pair_since_F = np.zeros(F), np.full(F, -1), np.zeros(F)
    if len(P):
        most_P = pair_PP.argmax(axis=0)
        coactive_F[P], partner_F[P] = pair_PP[np.arange(len(P)), most_P], P[most_P]
        pair_since_F[P] = pair_since_PP[np.arange(len(P)), most_P]
        partner_F[coactive_F == 0] = -1
    direction_F = np.where(
        state.rate_KF[: len(RISES)].max(axis=0) >= state.rate_KF[len(RISES) :].max(axis=0), RISE, FALL
    )
    values = {
        "rate": state.rate_KF.mean(axis=0),
        "shape": state.shape_KF.mean(axis=0),
        "replica": replica_DF.max(axis=0),
        "coactivation": coactive_F,
        "canary": state.canary_F,
    }
    limits = {
        "rate": budget.limit(F),
        "shape": budget.limit(F),
        "replica": budget.limit(F * replicas),
        "coactivation": budget.limit(_pairs(layout)),
        "canary": budget.limit(F),
    }
    log10_limit = {kind: float(np.log10(limit)) for kind, limit in limits.items()}
    log10_evalue = {kind: np.log10(np.maximum(value, 1e-3)) for kind, value in values.items()}
    shape_k = state.shape_KF.argmax(axis=0)
    drifting_F = log10_evalue["rate"] >= log10_limit["rate"]
    active_F = np.where(drifting_F, state.active_2F[direction_F, every], state.recent_2F[0])
    expected_F = np.where(drifting_F, state.expected_2F[direction_F, every], state.recent_2F[1])
    low_F, high_F = poisson_limits(active_F / reference.phi_F, 1.96)
    per_F = np.where(expected_F > 0, expected_F, np.nan)
    return Readings(
        log10_evalue=log10_evalue,
        log10_limit=log10_limit,
        since_seconds={
            "rate": state.rate_since_2F[direction_F, every],
            "shape": state.shape_since_KF[shape_k, every],
            "replica": state.replica_since_2DF[replica_way_F, replica_F, every],
            "coactivation": pair_since_F,
            "canary": state.canary_since_F.copy(),
        },
        direction={
            "rate": direction_F,
            "shape": np.where(shape_k == TILTS.index(min(TILTS)), FALL, RISE),
            "replica": replica_way_F,
            "coactivation": np.full(F, RISE),
            "canary": direction_F,
        },
        ratio_F=active_F / per_F,
        ratio_low_F=low_F * reference.phi_F / per_F,
        ratio_high_F=high_F * reference.phi_F / per_F,
        replica_F=replica_F,
        partner_F=partner_F,
        common=_common_reading(state, reference, budget),
    )


def _common_reading(state: DetectorState, reference: Reference, budget: Budget) -> CommonReading:
    rises, falls = state.common_K[: len(ALTERNATIVES)], state.common_K[len(ALTERNATIVES) :]
    direction = RISE if rises.max() >= falls.max() else FALL
    return CommonReading(
        log10_evalue=float(np.log10(max(float(state.common_K.mean()), 1e-3))),
        log10_limit=float(np.log10(budget.limit(1))),
        since_seconds=float(state.common_since_2[direction]),
        direction=direction,
        movement=movement(state.memory_Z2F, reference.phi_F, reference.slow_F),
    )


def _common(
    state: DetectorState, reference: Reference, active_F: Array, expected_F: Array, now: float, budget: Budget
) -> Movement:
    """The common movement with this window in it, which its own detector takes first."""
    remember(state.memory_Z2F, active_F, expected_F)
    moved = movement(state.memory_Z2F, reference.phi_F, reference.slow_F)
    llr_K = common_llr(active_F, expected_F, reference.common, moved)
    shiryaev_roberts(state.common_K, llr_K)
    np.minimum(state.common_K, budget.limit(1) * _OVERSHOOT * len(llr_K), out=state.common_K)
    state.common_since_2[cusum(state.common_walk_2, llr_K[[0, len(ALTERNATIVES)]])] = now
    return moved


def _rates(
    state: DetectorState,
    reference: Reference,
    window: Window,
    requests_GF: Array,
    active_GF: Array,
    expected_GF: Array,
    budget: Budget,
    moved: Movement,
) -> None:
    now, hour = window.end_seconds, hour_of_week(window.end_seconds)
    requests_F, active_F, expected_F = requests_GF.sum(axis=0), active_GF.sum(axis=0), expected_GF.sum(axis=0)
    per_F = np.maximum(requests_F, 1)
    high_F = (requests_GF * reference.expected_GF(reference.high_HF, hour, window.stratum_G)).sum(axis=0) / per_F
    low_F = (requests_GF * reference.expected_GF(reference.low_HF, hour, window.stratum_G)).sum(axis=0) / per_F
    # What all features have in common is no drift of one of them.
    rate_F, high_F, low_F = (np.minimum(moved.ratio * some_F, 0.999) for some_F in (expected_F / per_F, high_F, low_F))
    null_KF, other_KF = rate_alternatives(rate_F, high_F, low_F)
    llr_KF = binomial_llr(active_F, requests_F, null_KF, other_KF) / reference.phi_F
    shiryaev_roberts(state.rate_KF, llr_KF)
    np.minimum(state.rate_KF, budget.limit(len(active_F)) * _OVERSHOOT * _RATES, out=state.rate_KF)
    # The mildest alternative of each direction finds the beginning; the others begin later.
    grounded_2F = cusum(state.rate_walk_2F, llr_KF[[0, len(RISES)]])
    state.active_2F += active_F
    state.expected_2F += expected_F
    state.rate_since_2F[grounded_2F] = now
    state.active_2F[grounded_2F] = 0
    state.expected_2F[grounded_2F] = 0
    state.recent_2F *= _RATIO_KEPT
    state.recent_2F += (active_F, expected_F)


def _replicas(
    state: DetectorState,
    reference: Reference,
    window: Window,
    active_GF: Array,
    expected_GF: Array,
    budget: Budget,
) -> None:
    D = state.replica_2DF.shape[1]
    of_replica_DG = np.equal.outer(np.arange(D), window.replica_G).astype(np.float64)
    active_DF, expected_DF = of_replica_DG @ active_GF, of_replica_DG @ expected_GF
    if (expected_DF.sum(axis=1) > 0).sum() < 2:
        return
    for way, (ratio, tolerance) in enumerate(
        ((REPLICA_RATIO, REPLICA_TOLERANCE), (1 / REPLICA_RATIO, 1 / REPLICA_TOLERANCE))
    ):
        llr_DF = replica_llr(active_DF, expected_DF, reference.phi_F, ratio=ratio, tolerance=tolerance)
        _advance(
            state.replica_2DF[way],
            state.replica_walk_2DF[way],
            state.replica_since_2DF[way],
            llr_DF,
            window.end_seconds,
            budget,
            active_DF.size,
        )


def _advance(statistic: Array, walk: Array, since: Array, llr: Array, now: float, budget: Budget, streams: int) -> None:
    shiryaev_roberts(statistic, llr)
    np.minimum(statistic, budget.limit(streams) * _OVERSHOOT, out=statistic)
    since[cusum(walk, llr)] = now


def _pairs(layout: Layout) -> int:
    P = len(layout.pairs_P)
    return P * (P - 1) // 2
