"""The books of one engine: which positions of which request are accounted for (invariant I1).

A step's rows become final when a later step says which of them are true (see pending_steps.py), at the earliest when
the next one arrives. What a request found in the prefix cache is taken over then too: the rows that filled those KV
blocks may belong to the very step in which it began.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import Final

import numpy as np

from latentwatch.arrays import I64, U8, Array
from latentwatch.client_ids import briefly
from latentwatch.exporter.attribution import ScoredRows, StepRows, attribute, joined, span
from latentwatch.exporter.inheritance import Hit, Inheritance
from latentwatch.exporter.ledger_state import LedgerState
from latentwatch.exporter.pending_steps import NO_BOUND, DecidedStep, PendingSteps, steps_were_lost
from latentwatch.exporter.score_cache import ScoreCache
from latentwatch.handover.events import (
    Blocks,
    Closed,
    Event,
    Grown,
    Opened,
    TurnEnded,
    Unannounced,
    decode_events,
    encode_events,
    positions_computed,
)
from latentwatch.handover.ring import RawStep
from latentwatch.names import Outcome, Reason
from latentwatch.step.batch import (
    SEGMENT_DTYPE,
    UNANNOUNCED,
    EngineCounters,
    RequestClosed,
    RequestOpened,
    StepBatch,
)

_COUNTS: Final = (
    "recomputed_tokens",
    "surplus_tokens",
    "op_silent_steps",
    "unattributed_rows",
    "unannounced_requests",
    "untraced_requests",
)
"""Fields of EngineCounters, and attributes of Ledger."""


class _Settled:
    """What one call of settle() settles, in the order in which the batch will hold it."""

    def __init__(self) -> None:
        self.segments: list[Array] = []
        self.scored: list[ScoredRows] = []

    def add(self, segments_S: Array, scored: ScoredRows | None = None) -> None:
        """Segments; `scored` must be there where one of them owns rows."""
        if len(segments_S):
            self.segments.append(segments_S)
            if scored is not None:
                self.scored.append(scored)

    def batch(self, raw: RawStep | None) -> StepBatch:
        """Everything as one batch, named after the step that settled it."""
        batch = StepBatch(step=raw.step if raw else 0, time_unix_nano=raw.time_unix_nano if raw else 0)
        if self.segments:
            batch = dataclasses.replace(batch, segments_S=np.concatenate(self.segments).astype(SEGMENT_DTYPE))
        if not self.scored:
            return batch
        rows = joined(self.scored)
        return dataclasses.replace(batch, fires_N=rows.fires_N, dense_RP=rows.dense_RP, norm_RH=rows.norm_RH)


class _BySlot:
    """What is known of the requests, by their slot in the engine's tables."""

    def __init__(self) -> None:
        self.handle = np.full(64, -1, np.int64)
        self.prompt = np.zeros(64, np.int64)
        self.next = np.zeros(64, np.int64)
        """First position not accounted for."""
        self.rows_at = np.zeros(64, np.int64)
        """Number of the last step with rows of the request."""

    def place(self, slot: int, handle: int, prompt: int) -> None:
        """A request has this slot now."""
        while slot >= len(self.handle):
            self.handle = np.concatenate([self.handle, np.full_like(self.handle, -1)])
            self.prompt = np.concatenate([self.prompt, np.zeros_like(self.prompt)])
            self.next = np.concatenate([self.next, np.zeros_like(self.next)])
            self.rows_at = np.concatenate([self.rows_at, np.zeros_like(self.rows_at)])
        self.handle[slot], self.prompt[slot] = handle, prompt


class Ledger:
    """State per engine; `settle()` turns each raw step into the batch that settles what the step decides."""

    def __init__(
        self,
        *,
        armed: bool,
        drafts: bool,
        score_cache: ScoreCache | None = None,
        cached_reason: Reason = Reason.PREFIX_CACHE,
    ) -> None:
        """Args:
        armed: scores are there.
        drafts: the engine decodes speculatively, so that rows may be rejected.
        score_cache: scores by KV slot, for prefix-cache hits to inherit; None where they cannot be followed.
        cached_reason: why tokens that the engine did not compute are unseen, where they inherit nothing.
        """
        self._armed = armed
        # Of an engine that is not armed nothing is seen, for that reason alone.
        self._inheritance = Inheritance(score_cache, cached_reason if armed else Reason.NOT_ARMED)
        self._pending = PendingSteps(drafts=drafts)
        self._hits: list[Hit] = []
        self._open: dict[int, Opened] = {}
        self._lines: dict[int, bytes] = {}
        """The same as lines for the checkpoint."""
        self._by_slot = _BySlot()
        self._newest = self._lost_at = 0
        """Number of the newest step, and of the last one before which steps were lost."""
        self.recomputed_tokens = 0
        self.surplus_tokens = 0
        self.op_silent_steps = 0
        self.unattributed_rows = 0
        self.unannounced_requests = 0
        self.untraced_requests = 0

    def settle(self, raw: RawStep, counters: EngineCounters) -> StepBatch:
        """Settle what `raw` decides of the steps that wait, then let `raw` wait.

        The batch carries their scores, the closings that `raw` announced and the openings that stand before the rows
        that wait now.
        """
        events = decode_events(raw.events)
        if steps_were_lost(self._newest, raw):
            self._lost_at = raw.step
        settled = self._decide(raw, self._ends(events))
        opened, closed = self._apply(events, settled)
        self._pending.add(raw)
        self._newest = raw.step
        if raw.silent:
            self.op_silent_steps += 1
        return dataclasses.replace(
            settled.batch(raw), opened=tuple(opened), closed=tuple(closed), counters=self.count(counters)
        )

    def _apply(self, events: Sequence[Event], settled: _Settled) -> tuple[list[RequestOpened], list[RequestClosed]]:
        """Open and close the requests that the events name; what that settles is added to `settled`."""
        opened: list[RequestOpened] = []
        closed: list[RequestClosed] = []
        # In their order: a request whose steps all found the ring full may begin and end within one list.
        for event in events:
            if isinstance(event, Blocks):
                self._inheritance.assign(event, self._open)
            elif isinstance(event, Unannounced):
                self._fold(event, settled)
            elif isinstance(event, Opened):
                self._begin(event)
                opened.append(_told(event))
            elif isinstance(event, Grown) and event.slot in self._open:
                opened.append(_told(self._grow(event)))
            elif isinstance(event, Closed) and event.slot in self._open:
                closed.append(self._close(event, settled))
        return opened, closed

    def count(self, counters: EngineCounters) -> EngineCounters:
        """`counters` with those that the ledger keeps."""
        return dataclasses.replace(counters, **{name: getattr(self, name) for name in _COUNTS})

    def state(self, *, brief: bool = False, most: int = sys.maxsize) -> LedgerState:
        """What the next exporter needs to go on behind the newest step.

        Args: brief: texts of requests are cut, and parts of steps that wait for long are left out: they become gaps.
              most: requests, the newest of them.
        """
        left_out = max(0, len(self._open) - most)
        events = dict(itertools.islice(self._open.items(), left_out, None))
        slots = np.fromiter(events, np.int64, len(events))
        lines = (encode_events([_cut(event)]) if brief else self._lines[slot] for slot, event in events.items())
        parts = self._pending.parts
        return LedgerState(
            newest=self._newest,
            lost_at=self._newest if brief and parts else self._lost_at,
            counts={name: getattr(self, name) for name in _COUNTS},
            opened=b"".join(lines),
            next_n=self._by_slot.next[slots],
            rows_at_n=self._by_slot.rows_at[slots],
            hits=[(hit.request.slot, hit.start, hit.stop) for hit in self._hits if hit.request.slot in events],
            parts=() if brief else parts,
        )

    def restore(self, state: LedgerState, last: RawStep | None) -> None:
        """Go on from another ledger's state; what it knew of the KV cache is forgotten. `last`: the step that waits."""
        self._open.clear()
        self._lines.clear()
        self._by_slot.handle[:] = -1
        self._hits = []
        self._inheritance.clear()
        for event, reached, rows_at in zip(
            decode_events(state.opened), state.next_n.tolist(), state.rows_at_n.tolist(), strict=True
        ):
            assert isinstance(event, Opened)
            self._place(event)
            self._by_slot.next[event.slot], self._by_slot.rows_at[event.slot] = reached, rows_at
        self._hits = [Hit(self._open[slot], start, stop) for slot, start, stop in state.hits]
        self._newest, self._lost_at = state.newest, state.lost_at
        for name in _COUNTS:
            setattr(self, name, state.counts.get(name, 0))
        self._pending.restore(state.newest, state.parts, last)

    def finish(self) -> StepBatch:
        """The steps that wait as they stand, once the engine will say no more. Requests still open stay open."""
        return self._decide(None, np.full(len(self._by_slot.handle), NO_BOUND)).batch(None)

    def _fold(self, event: Unannounced, settled: _Settled) -> None:
        """Book requests of which only sums are known; what became of the KV blocks meanwhile is not known."""
        self.unannounced_requests += event.requests
        self.untraced_requests += event.untraced
        self._inheritance.clear()
        settled.add(span(UNANNOUNCED, 0, event.prompt_tokens, event.prompt_tokens, Reason.RING_FULL))
        settled.add(span(UNANNOUNCED, 0, event.output_tokens, 0, Reason.RING_FULL))

    def _begin(self, event: Opened) -> None:
        self.untraced_requests += event.untraced
        self._place(event)
        self._by_slot.next[event.slot] = event.cached
        # No row of it was read. Its opening may be told behind its rows, when they found the ring full.
        self._by_slot.rows_at[event.slot] = 0
        if event.cached:
            self._hits.append(Hit(event, 0, event.cached))

    def _place(self, event: Opened) -> None:
        """Give a request its slot of the tables."""
        self._open[event.slot] = event
        self._lines[event.slot] = encode_events([event])
        self._by_slot.place(event.slot, event.handle, event.prompt_tokens)
        self._inheritance.open(event.slot)

    def _grow(self, event: Grown) -> Opened:
        """Returns the request as it is now."""
        known = self._open[event.slot]
        self._open[event.slot] = grown = dataclasses.replace(known, prompt_tokens=event.prompt_tokens)
        self._lines[event.slot] = encode_events([grown])
        self._by_slot.prompt[event.slot] = event.prompt_tokens
        self._hits = [hit._replace(request=grown) if hit.request is known else hit for hit in self._hits]
        return grown

    def _close(self, event: Closed, settled: _Settled) -> RequestClosed:
        if event.prompt_tokens >= 0 and event.prompt_tokens != self._open[event.slot].prompt_tokens:
            self._grow(Grown(event.slot, event.prompt_tokens))
        request = self._open[event.slot]
        for hit in [hit for hit in self._hits if hit.request is request]:
            self._hits.remove(hit)
            settled.add(*self._inheritance.of(hit))
        settled.add(self._missing(request, event))
        del self._open[event.slot], self._lines[event.slot]
        self._by_slot.handle[event.slot] = -1
        return _closed(request, event, self._total(request, event))

    def _ends(self, events: Sequence[Event]) -> I64:
        """By slot: the first position past what a request that ended has computed, NO_BOUND for the others."""
        end = np.full(len(self._by_slot.handle), NO_BOUND)
        for event in reversed(events):
            if isinstance(event, Closed) and event.slot in self._open:
                # Overwrites: the first closing of a slot is that of the request in the steps that wait.
                end[event.slot] = self._end(event)
            elif isinstance(event, TurnEnded) and event.slot in self._open:
                end[event.slot] = event.end
        return end

    def _decide(self, raw: RawStep | None, end: I64) -> _Settled:
        steps, hits = _Settled(), _Settled()
        for decided in self._pending.settled(raw, self._by_slot.prompt, end):
            self._attribute(decided, steps)
        # Read behind the rows that were just stored, and put before them: they are earlier positions.
        for hit in self._hits:
            hits.add(*self._inheritance.of(hit))
        self._hits = []
        hits.segments += steps.segments
        hits.scored += steps.scored
        return hits

    def _attribute(self, decided: DecidedStep, settled: _Settled) -> None:
        """Account for the true rows of a step, and for the gaps before them that no step covers."""
        rows, slot_Q = self._rows(decided)
        known_Q = slot_Q >= 0
        attributed = attribute(rows)
        if decided.newest:
            self._inheritance.store(rows, attributed, slot_Q)
        unattributed = int(rows.count_Q[~known_Q].sum())
        self.unattributed_rows += unattributed
        self.recomputed_tokens += attributed.recomputed - unattributed
        self.surplus_tokens += attributed.beyond
        self._account_for_gaps(rows, slot_Q, settled)
        self._by_slot.rows_at[slot_Q[known_Q]] = decided.raw.step
        reached_Q = np.maximum(np.minimum(rows.start_Q + rows.count_Q, rows.to_Q), rows.from_Q)
        self._by_slot.next[slot_Q[known_Q]] = reached_Q[known_Q]
        settled.add(attributed.segments_S, attributed.scored)

    def _rows(self, decided: DecidedStep) -> tuple[StepRows, I64]:
        """The rows of a step, and the table slot of each of its requests, -1 for one that is not known."""
        raw = decided.raw
        slot_Q = raw.requests_Q["slot"].astype(np.int64)
        start_Q = raw.requests_Q["start"].astype(np.int64)
        count_Q = raw.requests_Q["count"].astype(np.int64)
        table = self._by_slot
        known_Q = (slot_Q < len(table.handle)) & (table.handle[np.minimum(slot_Q, len(table.handle) - 1)] >= 0)
        at_Q = np.where(known_Q, slot_Q, 0)
        from_Q = self._by_slot.next[at_Q]
        rows = StepRows(
            handle_Q=self._by_slot.handle[at_Q],
            prompt_Q=self._by_slot.prompt[at_Q],
            start_Q=start_Q,
            count_Q=count_Q,
            # An unknown request's rows are all "computed before": they belong to an account that is lost.
            from_Q=np.where(known_Q, from_Q, start_Q + count_Q),
            to_Q=np.maximum(np.where(known_Q, decided.to_Q, 0), from_Q),
            reason_T=_reasons(raw, self._armed),
            fires_N=raw.fires_N,
            dense_TP=_padded(raw.dense_TP, raw.rows),
            norm_TH=_padded(raw.norm_TH, raw.rows),
        )
        return rows, np.where(known_Q, slot_Q, -1)

    def _account_for_gaps(self, rows: StepRows, slot_Q: I64, settled: _Settled) -> None:
        """Positions between what is accounted for and a request's first row."""
        gap_Q = (slot_Q >= 0) & (rows.start_Q > rows.from_Q)
        for slot, first, stop in zip(
            *(column[gap_Q].tolist() for column in (slot_Q, rows.from_Q, np.minimum(rows.start_Q, rows.to_Q))),
            strict=True,
        ):
            request = self._open[slot]
            if self._by_slot.rows_at[slot] < self._lost_at:
                settled.add(span(request.handle, first, stop, request.prompt_tokens, Reason.RING_FULL))
            else:
                # Preempted, and resumed behind what it had computed: others have filled the cache for it meanwhile.
                self._hits.append(Hit(request, first, stop))

    def _end(self, closing: Closed) -> int:
        """First position past what the engine computed for the request, as far as the closing says it."""
        request = self._open.get(closing.slot)
        if request is None or closing.output_tokens < 0:
            return int(NO_BOUND)
        prompt_tokens = closing.prompt_tokens if closing.prompt_tokens >= 0 else request.prompt_tokens
        return prompt_tokens + max(0, closing.output_tokens - 1)

    def _total(self, request: Opened, closing: Closed) -> int:
        """Positions that the request's segments must cover."""
        return positions_computed(request.prompt_tokens, closing, int(self._by_slot.next[closing.slot]))

    def _missing(self, request: Opened, closing: Closed) -> Array:
        """Positions up to the end that no step covered.

        Their steps found the ring full, or they were drafts of a request that was preempted before the next step could
        say that they were accepted, and that ended before it computed them again.
        """
        lost = self._by_slot.rows_at[closing.slot] < self._lost_at
        reason = Reason.RING_FULL if lost else Reason.LOST
        reached, stop = int(self._by_slot.next[closing.slot]), self._total(request, closing)
        return span(request.handle, reached, stop, request.prompt_tokens, reason)


def _closed(request: Opened, closing: Closed, total: int) -> RequestClosed:
    """Args: total: positions that the request's segments cover."""
    output_tokens = closing.output_tokens if closing.output_tokens >= 0 else max(0, total + 1 - request.prompt_tokens)
    return RequestClosed(
        handle=request.handle,
        request_id=request.request_id,
        prompt_tokens=request.prompt_tokens,
        output_tokens=output_tokens,
        total_tokens=total,
        outcome=Outcome.ABORTED if closing.aborted else Outcome.FINISHED,
        response_id=request.response_id,
    )


def _told(event: Opened) -> RequestOpened:
    names = event.adapter, event.traceparent, event.response_id
    return RequestOpened(event.handle, event.request_id, event.prompt_tokens, *names)


def _cut(event: Opened) -> Opened:
    """With so little text that any number of requests fits into a checkpoint, and ids that are told apart as before."""
    request_id, response_id = briefly(event.request_id), briefly(event.response_id)
    return dataclasses.replace(event, request_id=request_id, response_id=response_id, adapter="", traceparent="")


def _padded(values: Array, rows: int) -> Array:
    """`values` with zero rows up to `rows`; the added rows are never scored."""
    out = np.zeros((rows, values.shape[1]), values.dtype)
    out[: len(values)] = values
    return out


def _reasons(raw: RawStep, armed: bool) -> U8:
    """uint8 [T]: why each row of the step carries no score."""
    reason_T = np.full(raw.rows, Reason.NONE, np.uint8)
    if not armed or raw.silent:
        reason_T[:] = Reason.OP_SILENT if armed else Reason.NOT_ARMED
        return reason_T
    reason_T[raw.scored_rows :] = Reason.TRIPLES_FULL
    reason_T[: raw.scored_rows][~np.isfinite(raw.norm_TH).all(axis=1)] = Reason.NON_FINITE
    return reason_T
