"""Step by step from the ring to the sender, so that an exporter which dies at any moment loses and doubles nothing.

A step is settled by the ledger, numbered by the sender, and noted in the checkpoint: batches, ledger and the place in
the ring in one commit. Only then it goes to the sender, and its slot back to the engine. What dies before the commit
is read again by the next exporter from the same slot and the same ledger; what dies after it is sent again under its
number, which a collector takes once. A batch leaves the checkpoint when the spool or a collector has it, or when it is
counted as lost.

What a death costs: the scores by KV slot, so that hits on what was computed before are unseen for a while; and of what
waits for a collector that is away, without a spool, the scores (and then the books) of the oldest steps beyond the
checkpoint's bound.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import Final

from latentwatch.exporter.ledger import Ledger
from latentwatch.exporter.state import ExporterState, added
from latentwatch.handover.checkpoint import Logged
from latentwatch.handover.ring import RawStep, Ring
from latentwatch.names import Reason
from latentwatch.step.batch import EngineCounters, StepBatch
from latentwatch.step.reshape import without_scores
from latentwatch.transport import codec
from latentwatch.transport.intake import Numbered
from latentwatch.transport.send_buffer import tokens_of
from latentwatch.transport.sender import Sender
from latentwatch.transport.sink import ReceivedBatch
from latentwatch.transport.spool import SpoolFolder

log = logging.getLogger("latentwatch.exporter")

HEARTBEAT_SECONDS: Final = 5.0
"""An idle engine still says that it is there, and repeats its counters."""
DRAIN_SECONDS: Final = 5.0
_TRIES_WITH_ROWS: Final = 5
_TRIES: Final = 8
"""Exporters in a row that may die over one step: after the first so many its rows are given up, then all of it."""


class Before:
    """What the exporters before this one left."""

    def __init__(self, state: ExporterState, batches: list[Logged]) -> None:
        self.state = state
        self.batches = batches
        self.dropped: list[tuple[int, int]] = []
        """Numbers of batches that this exporter's sender gave up, first and last."""

    @classmethod
    def load(cls, ring: Ring) -> Before:
        """From the ring's checkpoint; nothing where this is the first exporter."""
        try:
            found = ring.checkpoint.load()
            if found is None:
                return cls(ExporterState(read=ring.read), [])
            return cls(ExporterState.from_bytes(found[0]), found[1])
        except Exception:
            # A bug, or memory that something wrote over. Scores from here on are better than none at all.
            log.exception("latentwatch: what the exporter before this one left cannot be read; its requests are lost")
            ring.checkpoint.restart()
            # Numbers go on: a collector takes each of them once.
            return cls(ExporterState(read=ring.read, sequence=ring.checkpoint.numbered), [])

    def on_drop(self, first: int, last: int) -> None:
        """The sender gave these up."""
        self.dropped.append((first, last))


class Exporter:
    """One engine's ring, ledger and sender."""

    def __init__(
        self, ring: Ring, ledger: Ledger, sender: Sender, before: Before, folder: SpoolFolder | None = None
    ) -> None:
        """Go on where the exporter before this one stopped. The sender is not started yet."""
        self._ring = ring
        self._ledger = ledger
        self._sender = sender
        self._folder = folder
        self._counted_before = before.state.before()
        self._dropped = before.dropped
        self._drops_counted = self._drops_noted = self._dropped_requests = 0
        self._forgotten_tokens = self._forgotten_to = 0
        self._waits = before.state.waits
        self._committed = before.state
        self._step = before.state.ledger.newest
        self._sent_at = -math.inf
        ring.attach(before.state.read)
        self._restore()
        self._resend(before)

    def forward_step(self, now: float) -> bool:
        """Move one step from the ring to the sender; False where none waits. `now`: monotonic seconds."""
        self._ring.checkpoint.done_to(self._sender.acked)
        raw = self._ring.peek()
        if raw is not None:
            self._step = raw.step
            batch = self._settled(raw)
            self._offer(batch, self._ring.read + 1)
            self._ring.release(waits=self._waits)
        elif now - self._sent_at > HEARTBEAT_SECONDS:
            self._offer(self._heartbeat(), self._ring.read)
        else:
            return False
        self._sent_at = now
        return raw is not None

    def finish(self, *, engine_ended: bool) -> None:
        """Deliver what is buffered, within DRAIN_SECONDS. Where the engine ended, what waits is settled first; else the
        next exporter settles it, from the checkpoint.
        """
        if engine_ended:
            batch = dataclasses.replace(self._ledger.finish(), counters=self._counters())
            if len(batch.segments_S) or self._sender.intake.owes_ends:
                self._sender.offer(batch)
        elif self._sender.intake.owes_ends:
            self._offer(self._heartbeat(), self._ring.read)
        stats = self._sender.close(DRAIN_SECONDS)
        if engine_ended and stats.dropped_tokens:
            log.error(
                "latentwatch: %d tokens were not delivered to the collector before the engine ended, nor spooled",
                stats.dropped_tokens,
            )

    # -- one step

    def _heartbeat(self) -> StepBatch:
        return StepBatch(step=self._step, time_unix_nano=time.time_ns(), counters=self._counters())

    def _settled(self, raw: RawStep) -> StepBatch:
        """What the step settles. Where that fails its rows are given up, which counts as a gap, or all of it."""
        counters, tries = self._counters(), self._ring.tries
        if tries < _TRIES_WITH_ROWS:
            try:
                return self._settle(raw, counters)
            except Exception:
                # One step that cannot be read must not end the export.
                log.exception("latentwatch: step %d could not be settled; its rows are given up", raw.step)
                self._restore()
        else:
            log.error("latentwatch: %d exporters died over step %d; its rows are given up", tries, raw.step)
        if tries < _TRIES:
            try:
                return self._settle(_without_rows(raw), counters)
            except Exception:
                # As above, with what the step says of requests: they stay open, which the collector ends as lost.
                log.exception("latentwatch: what step %d says of requests could not be read", raw.step)
                self._restore()
        self._waits = False
        return StepBatch(step=raw.step, time_unix_nano=raw.time_unix_nano, counters=counters)

    def _settle(self, raw: RawStep, counters: EngineCounters) -> StepBatch:
        batch = self._ledger.settle(raw, counters)
        self._waits = len(raw.requests_Q) > 0
        return batch

    def _offer(self, batch: StepBatch, read: int) -> None:
        """Number a batch, commit it with the ledger and the place in the ring, and send it."""
        numbered = self._sender.intake.number(batch)
        self._commit(numbered, read)
        for sequence in self._sender.intake.send(numbered):
            self._ring.checkpoint.done(sequence)

    def _commit(self, numbered: Sequence[Numbered], read: int) -> None:
        checkpoint = self._ring.checkpoint
        logged = [Logged(one.sequence, tokens_of(one.batch), one.message) for one in numbered if one.message]
        logged, let_go = checkpoint.make_room(logged, _shorter)
        self._forget(let_go)
        drops = self._dropped[: self._drops_counted - self._drops_noted]
        state = self._committed = ExporterState(
            read=read,
            waits=self._waits,
            sequence=numbered[-1].sequence if numbered else self._committed.sequence,
            acked=self._sender.acked,
            dropped=_joined(drops),
            forgotten_tokens=self._forgotten_tokens,
            forgotten_to=self._forgotten_to,
            counters=self._counted,
            ledger=self._ledger.state(),
        )
        checkpoint.commit(self._fitting(state, checkpoint.max_state_bytes), logged, numbered=state.sequence)
        for first, last in drops:
            for sequence in range(first, last + 1):
                checkpoint.done(sequence)
        del self._dropped[: len(drops)]
        self._drops_noted += len(drops)

    def _fitting(self, state: ExporterState, most_bytes: int) -> bytes:
        """The state in no more than so many bytes: with less of its requests' texts, then with fewer of them. Those
        that are left out are lost if this exporter dies before they end.
        """
        data = state.to_bytes()
        requests = len(state.ledger.next_n)
        while len(data) > most_bytes and requests >= 0:
            ledger = self._ledger.state(brief=True, most=requests)
            data = dataclasses.replace(state, ledger=ledger).to_bytes()
            requests = requests // 2 if requests else -1
        return data

    def _forget(self, let_go: Sequence[Logged]) -> None:
        """These batches are in this process's memory only, until a collector has them."""
        if self._sender.acked >= self._forgotten_to:
            self._forgotten_tokens = 0
        for batch in let_go:
            self._forgotten_tokens += batch.tokens
            self._forgotten_to = batch.sequence

    # -- what the exporter before this one left

    def _restore(self) -> None:
        """The ledger as it was committed last."""
        self._waits = self._committed.waits
        self._ledger.restore(self._committed.ledger, self._ring.last() if self._waits else None)

    def _resend(self, before: Before) -> None:
        """Send again what nobody may have, under its own number."""
        given_up = {n for first, last in before.state.dropped for n in range(first, last + 1)}
        again = [batch for batch in before.batches if batch.sequence not in given_up]
        for sequence in (*given_up, *self._sender.intake.resume([(batch.sequence, batch.message) for batch in again])):
            self._ring.checkpoint.done(sequence)
        self._counters()
        self._commit([], self._ring.read)

    def _counters(self) -> EngineCounters:
        """The counts that ring, sender and spool keep, with the ledger's own and those of the exporters before."""
        stats, folder = self._sender.stats(), self._folder
        self._ledger.unannounced_requests += stats.dropped_requests - self._dropped_requests
        self._dropped_requests = stats.dropped_requests
        own = EngineCounters(
            steps=self._step,
            ring_dropped_steps=self._ring.dropped_steps,
            exporter_restarts=self._ring.restarts,
            shed_batches=stats.shed_batches,
            reconnects=stats.reconnects,
            shed_critical_tokens=stats.shed_critical_tokens,
            shed_warning_tokens=stats.shed_warning_tokens,
            lost_tokens=stats.dropped_tokens + (folder.discarded_tokens if folder is not None else 0),
            spool_bytes=folder.bytes if folder is not None else 0,
            spool_failures=folder.failures if folder is not None else 0,
            spool_refused=folder.refused if folder is not None else 0,
        )
        self._counted = self._ledger.count(added(self._counted_before, own))
        self._drops_counted = stats.dropped_batches
        return self._counted


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in few ranges: those that are given up stand next to each other, and may be very many."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return joined


def _without_rows(raw: RawStep) -> RawStep:
    return dataclasses.replace(
        raw,
        requests_Q=raw.requests_Q[:0],
        rows=0,
        scored_rows=0,
        fires_N=raw.fires_N[:0],
        dense_TP=raw.dense_TP[:0],
        norm_TH=raw.norm_TH[:0],
    )


def _shorter(logged: Logged) -> Logged:
    """Only its books, for the checkpoint: the batch itself waits whole in this process."""
    received = codec.decode_request(logged.message)
    assert isinstance(received, ReceivedBatch)
    books = without_scores(received.batch, Reason.BUFFER_FULL)
    return logged._replace(message=codec.encode_batch(logged.sequence, books))
