"""Whether another host's clock is ahead of this one's: what it stamped has not happened yet here."""

from __future__ import annotations

from typing import Final

WINDOW_SECONDS: Final = 120.0
"""An idle engine sends a message every 5 s."""


class ClockAhead:
    """By how much one sender's clock is ahead, at least, by its messages of the last minutes.

    A message takes some time, so that one stamped in the future is sure to come from a clock that is ahead. A clock
    that is behind looks like a message that waited, and cannot be told from one.
    """

    def __init__(self) -> None:
        self._since = self._most = self._most_before = 0.0

    def observe(self, stamped_seconds: float, now: float) -> None:
        """A message that was stamped then arrives now."""
        if not 0 <= now - self._since < WINDOW_SECONDS:
            is_next = 0 <= now - self._since < 2 * WINDOW_SECONDS
            self._most_before, self._most, self._since = self._most if is_next else 0.0, 0.0, now
        self._most = max(self._most, stamped_seconds - now)

    @property
    def seconds(self) -> float:
        """0 where no message says so."""
        return max(self._most, self._most_before)
