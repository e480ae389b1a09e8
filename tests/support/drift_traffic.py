"""Seeded request-level traffic: rates, log-normal values, clustering, season, mix and conversations, window by window.

What a window holds is drawn at once and not request by request, so that months of a 256-feature watchlist take minutes.
The same counts come out that `aggregate.counts` makes of real requests.

Shape legend: F features, G groups (replica x adapter), R replicas, A adapters, C cells, P features in pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist
from typing import Final

import numpy as np
from latentwatch.aggregate.counts import CELLS, Layout, RequestCounts, cells_of
from latentwatch.arrays import Array
from latentwatch.drift.detection import Window

MONTH_SECONDS: Final = 30 * 86400.0
_QUANTILES: Final = 4096
"""Values are drawn from so many equally likely ones of their distribution."""


@dataclass(frozen=True)
class Change:
    """What a drift does from its beginning on; the defaults are no drift."""

    rate_ratio: Callable[[float], float | Array] = lambda _: 1.0
    """Of seconds since the beginning; one for all features, or [F]."""
    value_shift: float = 0.0
    """Of the logarithm of values, in their standard deviations."""
    tail_share: float = 0.0
    """Share of active requests whose value is ten times what it was."""
    replica: int | None = None
    """Only there; None for everywhere."""
    pair_lift: float = 1.0
    """Joint activity of the features 2i and 2i + 1, at unchanged rates of their own."""


@dataclass(frozen=True)
class Scenario:
    """Traffic without drift."""

    rate_F: Array
    """Share of requests in which each feature is active."""
    requests_per_window: float = 4000.0
    window_seconds: float = 60.0
    start_seconds: float = 1_700_438_400.0
    """A Monday, 00:00 UTC."""
    season: float = 0.0
    """Amplitude of a daily sine on each rate, each feature with a phase of its own."""
    mix_sd: float = 0.0
    """Standard deviation of the logarithm of each rate, moving with a correlation time of `mix_seconds`."""
    mix_seconds: float = 3600.0
    users: int = 0
    """Of a time, each with a propensity of its own for each feature; 0 for as many as make no difference."""
    user_sd: float = 1.2
    """Standard deviation of the logarithm of propensities, whose mean is 1."""
    session_seconds: float = 10_800.0
    """So long each user stays; then another comes, with propensities of its own."""
    growth_a_month: float = 0.0
    """Of all rates together, from the start on."""
    conversation: int = 1
    """Requests that share whether they are active, all in one window."""
    replicas: int = 1
    adapter_ratio_AF: Array = field(default_factory=lambda: np.ones((1, 1)))
    """Rate in each adapter's traffic / `rate_F`."""
    adapter_share: Callable[[float], tuple[float, ...]] = lambda _: (1.0,)
    """Shares of the adapters, of seconds since the start."""
    pairs: int = 0
    """Leading features that are watched in pairs."""


class Traffic:
    """Windows of a scenario, in order."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        self.scenario = scenario
        F = len(scenario.rate_F)
        # One level: here a request is active or not.
        self.layout = Layout(np.ones(F, bool), np.zeros((F, 1)), np.arange(scenario.pairs))
        self._rng = rng
        # Not drawn: a baseline and the traffic compared with it have the same season under two seeds.
        self._phase_F = 2 * np.pi * np.modf(np.arange(F) * 0.618)[0]
        self._mix_F = rng.normal(0, scenario.mix_sd, F)
        self._propensity_UF = self._propensities(scenario.users)
        self._left = 0.0
        self._number = 0
        self._plain = _table(0.0, 0.0)

    def go_on_behind(self, other: Traffic) -> None:
        """Begin when the other one is over."""
        self._number = other._number

    def window(self, change: Change | None = None, began_seconds: float = 0.0) -> Window:
        """The next window; with a change that began so many seconds ago."""
        scenario, rng = self.scenario, self._rng
        change = change or Change()
        elapsed = self._number * scenario.window_seconds
        self._number += 1
        rate_F = self._rates(elapsed)
        share_A = np.array(scenario.adapter_share(elapsed))
        A, R, F = len(share_A), scenario.replicas, len(rate_F)
        ratio_RF = np.ones((R, F))
        some = slice(None) if change.replica is None else change.replica
        ratio_RF[some] = change.rate_ratio(began_seconds)
        rate_GF = (ratio_RF[:, None] * scenario.adapter_ratio_AF[None] * rate_F).reshape(R * A, F)
        talks_G = rng.poisson(np.tile(share_A, R) * scenario.requests_per_window / R / scenario.conversation)
        active_GF = scenario.conversation * rng.binomial(talks_G[:, None], np.minimum(rate_GF, 1.0))
        requests_G = scenario.conversation * talks_G
        levels_GFB = np.stack((requests_G[:, None] - active_GF, active_GF), axis=2)
        return Window(
            counts=RequestCounts(
                levels_GFB, self._cells(active_GF.sum(axis=0), change), self._pairs(active_GF, requests_G, change)
            ),
            replica_G=np.repeat(np.arange(R), A),
            stratum_G=np.tile(np.arange(A), R),
            end_seconds=scenario.start_seconds + elapsed + scenario.window_seconds,
        )

    def _rates(self, elapsed: float) -> Array:
        scenario = self.scenario
        kept = np.exp(-scenario.window_seconds / scenario.mix_seconds)
        if scenario.mix_sd:
            self._mix_F = kept * self._mix_F + self._rng.normal(
                0, scenario.mix_sd * np.sqrt(1 - kept**2), len(self._mix_F)
            )
        season_F = 1 + scenario.season * np.sin(2 * np.pi * elapsed / 86400 + self._phase_F)
        growth = (1 + scenario.growth_a_month) ** (elapsed / MONTH_SECONDS)
        rates: Array = scenario.rate_F * season_F * np.exp(self._mix_F) * growth * self._users()
        return rates

    def _users(self) -> Array:
        """Mean propensity of the users of this window, [F]; some of them are new."""
        scenario = self.scenario
        if not scenario.users:
            return np.ones(len(scenario.rate_F))
        # One after the other: sessions do not end together.
        first = int(self._left)
        self._left += scenario.users * scenario.window_seconds / scenario.session_seconds
        new = int(self._left) - first
        self._propensity_UF[np.arange(first, first + new) % scenario.users] = self._propensities(new)
        mean_F: Array = self._propensity_UF.mean(axis=0)
        return mean_F

    def _propensities(self, users: int) -> Array:
        sd = self.scenario.user_sd
        return np.exp(self._rng.normal(0, sd, (users, len(self.scenario.rate_F))) - sd**2 / 2)

    def _cells(self, active_F: Array, change: Change) -> Array:
        """Values of the active requests, log-normal around 1, as cells."""
        table = self._plain
        if change.value_shift or change.tail_share:
            table = _table(change.value_shift, change.tail_share)
        cell = table[self._rng.integers(0, _QUANTILES, int(active_F.sum()))]
        F = len(active_F)
        return np.bincount(np.repeat(np.arange(F) * CELLS, active_F) + cell, minlength=F * CELLS).reshape(F, CELLS)

    def _pairs(self, active_GF: Array, requests_G: Array, change: Change) -> Array:
        """Joint activity of features that know nothing of each other, but for the lift of neighbours."""
        active_P = active_GF.sum(axis=0)[: self.scenario.pairs]
        P = len(active_P)
        mean_PP = np.triu(np.outer(active_P, active_P) / max(1, int(requests_G.sum())), 1)
        first = np.arange(0, P - 1, 2)
        mean_PP[first, first + 1] *= change.pair_lift
        upper_PP = np.minimum(self._rng.poisson(mean_PP), np.minimum(active_P[:, None], active_P))
        together: Array = upper_PP + upper_PP.T + np.diag(active_P)
        return together


@lru_cache(maxsize=16)
def _table(shift: float, tail_share: float) -> Array:
    """Cells of the quantiles of exp(N(shift, 1)), a share of them ten times as large."""
    normal = NormalDist()
    values = np.exp([normal.inv_cdf((i + 0.5) / _QUANTILES) + shift for i in range(_QUANTILES)])
    # Large and small values alike are made larger; the seed only says which.
    values[np.random.default_rng(0).random(_QUANTILES) < tail_share] *= 10
    return cells_of(values)
