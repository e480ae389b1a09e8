"""What of the table is so in a running collector: it remembers counts for some minutes, and reads the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from latentwatch.collector.health.cause import FoundCause, HealthFacts
from latentwatch.collector.health.recent_counts import RecentCounts, counts_of
from latentwatch.collector.health.table import found_causes
from latentwatch.names import Reason, TokenState
from latentwatch.transport.report import TOKEN_SHAPE

if TYPE_CHECKING:
    from latentwatch.collector.lookup import Lookup
    from latentwatch.collector.process_facts import ProcessFacts
    from latentwatch.collector.snapshot import Snapshot


RECORD_SECONDS: Final = 15.0
"""Between two records of the counts."""


class HealthWatch:
    """The causes of one collector."""

    def __init__(self, lookup: Lookup, process: Callable[[], ProcessFacts]) -> None:
        self._lookup, self._process = lookup, process
        self._recent = RecentCounts()
        self._recorded_seconds = -np.inf

    def record(self, now: float) -> None:
        """Remember the counts, at most every RECORD_SECONDS. Call it once before anything may go wrong, then often."""
        if not 0 <= now - self._recorded_seconds < RECORD_SECONDS:
            self._recorded_seconds = now
            self._recent.record(counts_of(self._lookup.snapshot(now), self._process()), now)

    def found(self, snapshot: Snapshot, process: ProcessFacts) -> list[FoundCause]:
        """See table.found_causes."""
        return found_causes(self.facts(snapshot, process))

    def facts(self, snapshot: Snapshot, process: ProcessFacts) -> HealthFacts:
        """What the causes look at."""
        now = snapshot.now
        _, windows = self._lookup.recent(now)
        by_state = windows.tokens_by_state.sum(axis=0)
        seen = int(by_state[[TokenState.SCORED, TokenState.INHERITED]].sum())
        total = seen + int(by_state[[TokenState.UNSEEN, TokenState.DROPPED]].sum())
        tokens = sum((engine.tokens for engine in snapshot.engines), np.zeros(TOKEN_SHAPE, np.int64))
        by_reason = tokens[[TokenState.UNSEEN, TokenState.DROPPED]].sum(axis=(0, 2))
        return HealthFacts(
            snapshot,
            process,
            self._recent.rises(counts_of(snapshot, process), now),
            seen / total if total else None,
            {reason.name.lower(): int(by_reason[reason]) for reason in Reason if by_reason[reason]},
        )
