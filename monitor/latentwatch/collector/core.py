"""A collector's logic in one piece: batches in, plain values out. No I/O, no clock, no thread; one caller at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from latentwatch.client_ids import IdKind
from latentwatch.collector import erase
from latentwatch.collector.config import Bounds
from latentwatch.collector.core_state import CoreState
from latentwatch.collector.drift import Drift, DriftSettings
from latentwatch.collector.evidence_buffer import EvidenceBuffer, EvidenceScope
from latentwatch.collector.federation.outbox import OutboxState, ReportOutbox
from latentwatch.collector.ingest import Ingest
from latentwatch.collector.lookup import Lookup
from latentwatch.collector.pseudonyms import Pseudonyms
from latentwatch.collector.state import CollectorState
from latentwatch.collector.step_listener import StepListener
from latentwatch.drift.limits import with_limits
from latentwatch.evidence.records import Record
from latentwatch.watchlist.file import Watchlist


class Core:
    """A state with what changes it (`ingest`), what is read of it (`lookup`), and its listeners."""

    def __init__(
        self,
        watchlist: Watchlist,
        bounds: Bounds | None = None,
        drift: DriftSettings | None = None,
        *,
        evidence: Sequence[Callable[[Sequence[Record]], None]] = (),
        evidence_scope: EvidenceScope = "exceeded",
        forward_boot_id: str = "",
        pseudonyms: Pseudonyms | None = None,
    ) -> None:
        """
        Args:   evidence: take the evidence, and must neither block nor raise.   evidence_scope: see EvidenceBuffer.
                forward_boot_id: 32 hex digits, drawn anew, for a collector that cuts reports for a gateway; a state
                that is restored has the one that it began with.   pseudonyms: those of the ids that it is given.
        Raises: BaselineRefused: drift is to be measured against a baseline of something else.
        """
        drift = drift or DriftSettings()
        self.drift = Drift(watchlist, drift)
        self.watchlist = with_limits(watchlist, drift.baseline)
        self._state = state = CollectorState(self.watchlist, bounds or Bounds())
        self.bounds = state.bounds
        self.outbox = ReportOutbox(forward_boot_id, state) if forward_boot_id else None
        self._outbox_before: OutboxState | None = None
        """Of a life that forwarded, where this one does not: what the gateway was told is not told again later."""
        listeners: list[StepListener] = [self.drift]
        if evidence:
            listeners.append(EvidenceBuffer(self.watchlist, state.scratch + 1, evidence, evidence_scope))
        if self.outbox is not None:
            listeners.append(self.outbox)
        self._listeners = tuple(listeners)
        self.ingest = Ingest(state, self._listeners, forwards=self.outbox is not None)
        self.lookup = Lookup(state, self.drift, self.outbox, pseudonyms)

    def state(self) -> CoreState:
        """Everything that the next batch or reading depends on, as values that later batches do not change."""
        outbox = self.outbox.state() if self.outbox is not None else self._outbox_before
        return CoreState(self._state.state(), self.drift.state(), outbox)

    def restore(self, state: CoreState) -> None:
        """Go on from what `state` gave, where nothing was seen yet, with the same watchlist and bounds.

        Raises ValueError where it does not fit them, or not together.
        """
        self._state.restore(state.collector)
        self.drift.restore(state.drift)
        self._outbox_before = state.outbox
        if self.outbox is not None and state.outbox is not None:
            self.outbox.restore(state.outbox)

    def forget(self, meant: Mapping[IdKind, Sequence[str]]) -> None:
        """See erase.forget."""
        erase.forget(self._state, self._listeners, meant)
