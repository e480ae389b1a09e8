"""What happened in a window of time: counters and maxima that merge, and a bounded ring of windows to plot.

Shape legend: F features, M windows kept.

The clock is the caller's: windows are numbered floor(now / window_seconds), and a `now` before the newest window counts
into the newest one, so a clock that steps back cannot reopen or reorder windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from latentwatch.arrays import Array
from latentwatch.names import TokenState


@dataclass(frozen=True)
class FeatureWindow:
    """One window's totals. Merging is associative and commutative; `empty` is its neutral element."""

    tokens_by_state: Array
    """Tokens by TokenState value, int64 [5]; index 0 is unused."""
    fired_F: Array
    """Tokens on which each feature fired, int64."""
    peak_F: Array
    """Largest value of each feature's statistic, float32; -inf where there was none."""
    exceedances_F: Array
    """Requests that crossed the feature's limit in this window, int64."""

    @classmethod
    def empty(cls, features: int) -> FeatureWindow:
        """A window in which nothing happened."""
        return cls(
            np.zeros(len(TokenState) + 1, np.int64),
            np.zeros(features, np.int64),
            np.full(features, -np.inf, np.float32),
            np.zeros(features, np.int64),
        )

    def merge(self, other: FeatureWindow) -> FeatureWindow:
        """Both together."""
        return FeatureWindow(
            self.tokens_by_state + other.tokens_by_state,
            self.fired_F + other.fired_F,
            np.maximum(self.peak_F, other.peak_F),
            self.exceedances_F + other.exceedances_F,
        )


class WindowRing:
    """The last M windows, oldest first. Memory is M * 20 F bytes, whatever happens."""

    def __init__(self, features: int, windows: int, window_seconds: float) -> None:
        self.window_seconds = window_seconds
        self._number = 0
        self._tokens = np.zeros((windows, len(TokenState) + 1), np.int64)
        self._fired = np.zeros((windows, features), np.int64)
        self._peak = np.full((windows, features), -np.inf, np.float32)
        self._exceedances = np.zeros((windows, features), np.int64)

    def add(self, window: FeatureWindow, now: float) -> None:
        """Merge totals into the window that holds `now`."""
        i = self._advance(now)
        self._tokens[i] += window.tokens_by_state
        self._fired[i] += window.fired_F
        np.maximum(self._peak[i], window.peak_F, out=self._peak[i])
        self._exceedances[i] += window.exceedances_F

    def recent(self, now: float) -> tuple[float, FeatureWindow]:
        """The end of the newest window as a time, and all M windows: each array with a leading axis M, oldest first."""
        newest = self._advance(now)
        order = (np.arange(len(self._tokens)) + newest + 1) % len(self._tokens)
        window = FeatureWindow(self._tokens[order], self._fired[order], self._peak[order], self._exceedances[order])
        return (self._number + 1) * self.window_seconds, window

    def state(self) -> dict[str, Any]:
        """The windows, for `restore` of a ring of the same size; copies."""
        return {"number": self._number} | {name: array.copy() for name, array in self._arrays().items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._number = state["number"]
        for name, array in self._arrays().items():
            array[:] = state[name]

    def _arrays(self) -> dict[str, Array]:
        return {
            "tokens": self._tokens,
            "fired": self._fired,
            "peak": self._peak,
            "exceedances": self._exceedances,
        }

    def _advance(self, now: float) -> int:
        """Index of the window of `now`, with every window that was skipped emptied."""
        windows, number = len(self._tokens), int(now // self.window_seconds)
        if number > self._number:
            passed = np.arange(max(self._number + 1, number - windows + 1), number + 1) % windows
            self._tokens[passed] = 0
            self._fired[passed] = 0
            self._peak[passed] = -np.inf
            self._exceedances[passed] = 0
            self._number = number
        return self._number % windows
