"""What happened in a window of time: counters and maxima that merge, and a bounded ring of windows to plot.

Shape legend: F features, M windows kept.

The clock is the caller's: windows are numbered floor(now / window_seconds), and a `now` before the newest window counts
into the newest one, so a clock that steps back cannot reopen or reorder windows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from latentwatch.arrays import Array, axes, check
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
    """Requests that went above the feature's limit in this window, int64."""

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


@dataclass(frozen=True)
class WindowRingState:
    """Every window of a ring, in the order of their numbers modulo M."""

    number: int
    """Of the newest one."""
    tokens_by_state: Array = field(metadata=axes("windows", "states", dtype=np.int64))
    fired_F: Array = field(metadata=axes("windows", "features", dtype=np.int64))
    peak_F: Array = field(metadata=axes("windows", "features", dtype=np.float32))
    exceedances_F: Array = field(metadata=axes("windows", "features", dtype=np.int64))


class WindowRing:
    """The last M windows, oldest first. Memory is M * 20 F bytes, whatever happens."""

    def __init__(self, features: int, windows: int, window_seconds: float) -> None:
        self.window_seconds = window_seconds
        self._number = 0
        empty = FeatureWindow.empty(features)
        # Each array with a leading axis M.
        self._windows = FeatureWindow(*(np.repeat(array[None], windows, axis=0) for array in vars(empty).values()))

    def add(self, window: FeatureWindow, now: float) -> None:
        """Merge totals into the window that holds `now`."""
        i, windows = self._advance(now), self._windows
        windows.tokens_by_state[i] += window.tokens_by_state
        windows.fired_F[i] += window.fired_F
        np.maximum(windows.peak_F[i], window.peak_F, out=windows.peak_F[i])
        windows.exceedances_F[i] += window.exceedances_F

    def recent(self, now: float) -> tuple[float, FeatureWindow]:
        """The end of the newest window as a time, and all M windows: each array with a leading axis M, oldest first."""
        newest, windows = self._advance(now), len(self._windows.peak_F)
        order = (np.arange(windows) + newest + 1) % windows
        return (self._number + 1) * self.window_seconds, FeatureWindow(
            *(a[order] for a in vars(self._windows).values())
        )

    def state(self) -> WindowRingState:
        """The windows; copies."""
        return WindowRingState(self._number, *(array.copy() for array in vars(self._windows).values()))

    def restore(self, state: WindowRingState) -> None:
        """Go on from `state` of a ring of the same size. Raises ValueError where it is another."""
        windows, features = self._windows.peak_F.shape
        check(state, windows=windows, features=features, states=len(TokenState) + 1)
        self._number = state.number
        self._windows = FeatureWindow(
            state.tokens_by_state.copy(), state.fired_F.copy(), state.peak_F.copy(), state.exceedances_F.copy()
        )

    def _advance(self, now: float) -> int:
        """Index of the window of `now`, with every window that was skipped emptied."""
        windows, number = len(self._windows.peak_F), int(now // self.window_seconds)
        if number > self._number:
            passed = np.arange(max(self._number + 1, number - windows + 1), number + 1) % windows
            for name, array in vars(self._windows).items():
                array[passed] = -np.inf if name == "peak_F" else 0
            self._number = number
        return self._number % windows
