"""How much counts rose lately: what a state knows are totals since its beginning, and a cause is of now."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from latentwatch.errors import RefusalReason
from latentwatch.evidence.writer import DROP_REASONS
from latentwatch.names import Reason, TokenState
from latentwatch.transport.report import TOKEN_SHAPE

if TYPE_CHECKING:
    from latentwatch.collector.process_facts import ProcessFacts
    from latentwatch.collector.snapshot import Snapshot


Counts = Mapping[tuple[str, str], float]
"""By name and label; each only rises, or begins again at 0."""
RECENT_SECONDS: Final = 600.0
LATE_SECONDS: Final = 5.0
"""From a step to its merge, from which on it is late; a bound of the lag's histogram."""
_ENGINE: Final = ("exporter_restarts", "spool_failures", "spool_refused", "lost_tokens", "unattributed_rows")


class RecentCounts:
    """The rises of the last RECENT_SECONDS, in pieces as they were recorded."""

    def __init__(self) -> None:
        self._last: Counts | None = None
        self._rises: deque[tuple[float, dict[tuple[str, str], float]]] = deque()

    def record(self, counts: Counts, now: float) -> None:
        """Take the counts of now. A count that was not there before says nothing of when it rose."""
        self._rises.append((now, self._risen(counts)))
        self._last = counts
        while self._rises and not 0 <= now - self._rises[0][0] <= RECENT_SECONDS:
            self._rises.popleft()

    def rises(self, counts: Counts, now: float) -> dict[tuple[str, str], float]:
        """By how much each rose until now, where the counts are these."""
        total: dict[tuple[str, str], float] = {}
        for seconds, risen in (*self._rises, (now, self._risen(counts))):
            if now - seconds <= RECENT_SECONDS:
                for key, value in risen.items():
                    total[key] = total.get(key, 0) + value
        return total

    def _risen(self, counts: Counts) -> dict[tuple[str, str], float]:
        before = self._last
        if before is None:
            return {}
        return {
            key: value - before[key] if value >= before[key] else value
            for key, value in counts.items()
            if key in before and value != before[key]
        }


def counts_of(snapshot: Snapshot, process: ProcessFacts) -> dict[tuple[str, str], float]:
    """Every count that a cause looks at."""
    totals, writer, sent = snapshot.collector, process.evidence.writer, process.otlp
    refused: dict[str, int] = {str(reason): 0 for reason in RefusalReason if reason.counted}
    refused |= totals.streams_refused
    late = np.asarray(totals.ingest_lag.edges) > LATE_SECONDS
    counts: dict[tuple[str, str], float] = {
        **{("refused", reason): count for reason, count in refused.items()},
        ("state_write_failures", ""): process.state.write_failures,
        ("events_dropped", ""): sum(sent.events.dropped.values()),
        ("metrics_failures", ""): sent.failed_metrics,
        ("requests_evicted", ""): totals.requests_evicted,
        ("excess_tokens", ""): totals.accounting_excess_tokens,
        ("late_steps", ""): sum(totals.ingest_lag.counts[int(np.argmax(late)) :]) if late.any() else 0,
        ("steps", ""): sum(totals.ingest_lag.counts),
        ("forward_shed", ""): snapshot.forward.shed_requests if snapshot.forward else 0,
    }
    for lost in DROP_REASONS:
        counts["evidence_dropped", lost] = sum(n for (_, why), n in writer.dropped.items() if why == lost)
    for replica in snapshot.replicas:
        counts |= {(name, replica.replica): getattr(replica.counters, name) for name in _ENGINE}
    for sidecar in snapshot.forwarders:
        counts["forwarder_shed", sidecar.collector] = sidecar.shed_requests
    dropped = sum((engine.tokens for engine in snapshot.engines), np.zeros(TOKEN_SHAPE, np.int64))[TokenState.DROPPED]
    for reason in Reason:
        counts["dropped_tokens", reason.name.lower()] = int(dropped[reason].sum())
    return counts
