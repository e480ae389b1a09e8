"""The requests that showed most of each feature lately, for alarms to name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from latentwatch.arrays import Array
from latentwatch.drift.alarms import TopRequest

_TOP: Final = 3
"""Requests named with an alarm."""
_TOP_SECONDS: Final = 3600.0


@dataclass(frozen=True)
class TopPlace:
    """Where a request stands among those that showed much."""

    feature: int
    place: int
    request: TopRequest


class Examples:
    """Of each feature three requests of this hour, and three of the one before."""

    def __init__(self, features: int) -> None:
        self._value_FT = np.full((features, 2 * _TOP), -np.inf)
        self._request_FT = np.empty((features, 2 * _TOP), object)
        self.turn_seconds = -math.inf

    def add(self, names: Sequence[str], value_nF: Array, now: float) -> None:
        """Take n requests. Args: value_nF: what each showed of each feature, NaN for nothing."""
        if not now - self.turn_seconds < _TOP_SECONDS:
            self.turn_seconds = now
            self._value_FT[:, _TOP:], self._request_FT[:, _TOP:] = self._value_FT[:, :_TOP], self._request_FT[:, :_TOP]
            self._value_FT[:, :_TOP] = -np.inf
        value_nF = np.where(np.isfinite(value_nF), value_nF, -np.inf)
        row, feature = np.nonzero(value_nF > self._value_FT[:, :_TOP].min(axis=1))
        for i, f in zip(row.tolist(), feature.tolist(), strict=True):
            place = int(self._value_FT[f, :_TOP].argmin())
            if value_nF[i, f] > self._value_FT[f, place]:
                self._value_FT[f, place] = value_nF[i, f]
                self._request_FT[f, place] = TopRequest(names[i], float(value_nF[i, f]), now)

    def of(self, feature: int) -> list[TopRequest]:
        """At most three, the one with the largest value first."""
        places = np.flatnonzero(np.isfinite(self._value_FT[feature]))
        found = sorted((self._request_FT[feature, t] for t in places.tolist()), key=lambda request: -request.value)
        return found[:_TOP]

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """Let go of those with these request ids."""
        for top in self.places():
            if is_gone(top.request.request_id):
                self._value_FT[top.feature, top.place], self._request_FT[top.feature, top.place] = -np.inf, None

    def places(self) -> list[TopPlace]:
        """All of them."""
        found = np.argwhere(np.isfinite(self._value_FT)).tolist()
        return [TopPlace(feature, place, self._request_FT[feature, place]) for feature, place in found]

    def restore(self, places: Iterable[TopPlace], turn_seconds: float) -> None:
        """Go on from those of another one."""
        for top in places:
            self._request_FT[top.feature, top.place] = top.request
            self._value_FT[top.feature, top.place] = top.request.value
        self.turn_seconds = turn_seconds
