"""Logging of trouble that repeats: a collector that is away must not fill the disk of the engine that waits for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

_KINDS: Final = 256
"""Kinds remembered; far more than there are, unless a peer makes them up."""


class LogLimit:
    """Says whether to log one kind of trouble now: at once, then at most once in `seconds`."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._logged_at: dict[str, float] = {}

    def __call__(self, kind: str) -> bool:
        now = self._clock()
        if now - self._logged_at.get(kind, -math.inf) < self._seconds:
            return False
        if len(self._logged_at) >= _KINDS:
            self._logged_at.clear()
        self._logged_at[kind] = now
        return True
