"""The books of one engine: which positions of which request are accounted for (invariant I1).

A step's rows become final when a later step says which of them are true (see held.py), at the earliest when the next
one arrives. What a request found in the prefix cache is taken over then too: the rows that filled those KV blocks may
belong to the very step in which it began.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from latentwatch.arrays import I64, U8, Array
from latentwatch.exporter.attribution import (
    Attributed,
    ScoredRows,
    StepRows,
    attribute,
    joined,
    positions,
    runs,
    scores_of,
    span,
)
from latentwatch.exporter.pending_steps import NO_BOUND, HeldStep, PendingSteps
from latentwatch.exporter.score_cache import ScoreCache
from latentwatch.handover.events import Blocks, Closed, Event, Opened, Resync, decode_events
from latentwatch.handover.ring import RawStep
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.step.batch import SEGMENT_DTYPE, EngineCounters, RequestClosed, RequestOpened, StepBatch


class _Settled:
    """What one call of take() settles, in the order in which the batch will hold it."""

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


class _Hit(NamedTuple):
    """Positions start..stop-1 of a request, found in the prefix cache and not taken over yet."""

    request: Opened
    start: int
    stop: int


class Ledger:
    """State per engine; `take()` turns each raw step into the batch that settles what the step decides."""

    def __init__(
        self,
        *,
        armed: bool,
        drafts: bool,
        kept: ScoreCache | None = None,
        cached_reason: Reason = Reason.PREFIX_CACHE,
    ) -> None:
        """Args:
        armed: scores are there.
        drafts: the engine decodes speculatively, so that rows may be rejected.
        kept: scores by KV slot, for prefix-cache hits to inherit; None where the engine's cache cannot be followed.
        cached_reason: why tokens that the engine did not compute are unseen, where they inherit nothing.
        """
        self._armed = armed
        self._kept = kept
        self._cached_reason = cached_reason
        self._held = PendingSteps(drafts=drafts)
        self._hits: list[_Hit] = []
        self._open: dict[int, Opened] = {}
        # Tables by slot. `next` is the first position not accounted for; -1: not known yet (resumed). `laid_at` is the
        # number of the last step with rows of the request; `lost_at` that of the last one before which steps were lost.
        self._handle = np.full(64, -1, np.int64)
        self._prompt = np.zeros(64, np.int64)
        self._next = np.zeros(64, np.int64)
        self._laid_at = np.zeros(64, np.int64)
        self._blocks = np.full((64, 64), -1, np.int32)
        self._newest = self._lost_at = 0
        self.recomputed_tokens = 0
        self.surplus_tokens = 0
        self.op_silent_steps = 0
        self.unattributed_rows = 0
        self.unannounced_requests = 0
        self.untraced_requests = 0

    def take(self, raw: RawStep, counters: EngineCounters) -> StepBatch:
        """Settle what `raw` decides of the steps held, then hold `raw`.

        The batch carries their scores, the closings that `raw` announced and the openings that stand before the rows
        that are held now.
        """
        events = decode_events(raw.events)
        if raw.step > self._newest + 1:
            self._lost_at = raw.step
        settled = self._settle(raw, self._ends(events))
        opened: list[RequestOpened] = []
        closed: list[RequestClosed] = []
        # In their order: a request whose steps all found the ring full may begin and end within one list.
        for event in events:
            if isinstance(event, Blocks):
                self._give(event)
            elif isinstance(event, Resync):
                closed += self._begin_anew(event, settled)
            elif isinstance(event, Opened):
                if self._knows(event):
                    continue
                self._begin(event)
                opened.append(
                    RequestOpened(event.handle, event.request_id, event.prompt_tokens, event.adapter, event.traceparent)
                )
            elif event.slot in self._open:
                closed.append(self._close(event, settled))
        self._held.hold(raw)
        self._newest = raw.step
        if raw.silent:
            self.op_silent_steps += 1
        return dataclasses.replace(
            settled.batch(raw), opened=tuple(opened), closed=tuple(closed), counters=self.count(counters)
        )

    def count(self, counters: EngineCounters) -> EngineCounters:
        """`counters` with those that the ledger keeps."""
        return dataclasses.replace(
            counters,
            recomputed_tokens=self.recomputed_tokens,
            surplus_tokens=self.surplus_tokens,
            op_silent_steps=self.op_silent_steps,
            unattributed_rows=self.unattributed_rows,
            unannounced_requests=self.unannounced_requests,
            untraced_requests=self.untraced_requests,
        )

    def finish(self) -> StepBatch:
        """The held steps as they stand, once the engine will say no more. Requests still open stay open."""
        return self._settle(None, np.full(len(self._handle), NO_BOUND)).batch(None)

    def _begin_anew(self, event: Resync, settled: _Settled) -> list[RequestClosed]:
        """Close what is not live any more, as lost; what became of the KV blocks meanwhile is not known."""
        self.unannounced_requests = event.unannounced
        if self._kept is not None:
            self._kept.clear()
        self._blocks[:] = -1
        ended = [slot for slot, request in self._open.items() if request.handle not in event.handles]
        return [
            dataclasses.replace(self._close(Closed(slot, -1, aborted=False), settled), outcome=Outcome.LOST)
            for slot in ended
        ]

    def _knows(self, event: Opened) -> bool:
        known = self._open.get(event.slot)
        return known is not None and known.handle == event.handle

    def _begin(self, event: Opened) -> None:
        self.untraced_requests += event.untraced
        while event.slot >= len(self._handle):
            self._handle = np.concatenate([self._handle, np.full_like(self._handle, -1)])
            self._prompt = np.concatenate([self._prompt, np.zeros_like(self._prompt)])
            self._next = np.concatenate([self._next, np.zeros_like(self._next)])
            self._laid_at = np.concatenate([self._laid_at, np.zeros_like(self._laid_at)])
            self._blocks = np.concatenate([self._blocks, np.full_like(self._blocks, -1)])
        self._open[event.slot] = event
        self._handle[event.slot] = event.handle
        self._prompt[event.slot] = event.prompt_tokens
        self._next[event.slot] = -1 if event.resumed else event.cached
        self._laid_at[event.slot] = self._newest
        self._blocks[event.slot] = -1
        if event.cached and not event.resumed:
            self._hits.append(_Hit(event, 0, event.cached))

    def _give(self, event: Blocks) -> None:
        """Take over what KV blocks requests were given; the new ones among them forget what they held."""
        if self._kept is None:
            return
        for slot, at, hits, *blocks in event.given:
            if slot not in self._open:
                continue
            while at + len(blocks) > self._blocks.shape[1]:
                self._blocks = np.concatenate([self._blocks, np.full_like(self._blocks, -1)], axis=1)
            self._blocks[slot, at : at + len(blocks)] = blocks
            self._blocks[slot, at + len(blocks) :] = -1
            self._kept.forget(np.array(blocks[hits:], np.int64))

    def _close(self, event: Closed, settled: _Settled) -> RequestClosed:
        request = self._open[event.slot]
        for hit in [hit for hit in self._hits if hit.request is request]:
            self._hits.remove(hit)
            settled.add(*self._inherited(hit))
        settled.add(self._missing(request, event))
        closed = self._closed(request, event)
        del self._open[event.slot]
        self._handle[event.slot] = -1
        return closed

    def _ends(self, events: Sequence[Event]) -> I64:
        """By slot: the first position past what a request that ended has computed, NO_BOUND for the others."""
        end = np.full(len(self._handle), NO_BOUND)
        for event in reversed(events):
            if isinstance(event, Resync):
                # What follows it may speak of other requests in the same slots.
                end[:] = NO_BOUND
            elif isinstance(event, Closed) and event.slot in self._open:
                # Overwrites: the first closing of a slot is that of the request in the held steps.
                end[event.slot] = self._end(event)
        return end

    def _settle(self, raw: RawStep | None, end: I64) -> _Settled:
        laid, hits = _Settled(), _Settled()
        for held in self._held.settled(raw, self._prompt, end):
            self._lay(held, laid)
        # Read behind the rows that were just kept, and put before them: they are earlier positions.
        for hit in self._hits:
            hits.add(*self._inherited(hit))
        self._hits = []
        hits.segments += laid.segments
        hits.scored += laid.scored
        return hits

    def _lay(self, held: HeldStep, settled: _Settled) -> None:
        """Account for the true rows of a step, and for the gaps before them that no step covers."""
        raw = held.raw
        slot_Q = raw.requests_Q["slot"].astype(np.int64)
        start_Q = raw.requests_Q["start"].astype(np.int64)
        count_Q = raw.requests_Q["count"].astype(np.int64)
        known_Q = (slot_Q < len(self._handle)) & (self._handle[np.minimum(slot_Q, len(self._handle) - 1)] >= 0)
        slot_Q = np.where(known_Q, slot_Q, 0)
        from_Q = np.where(self._next[slot_Q] < 0, start_Q, self._next[slot_Q])
        to_Q = np.maximum(np.where(known_Q, held.to_Q, 0), from_Q)
        # An unknown request's rows are all "computed before": they belong to an account that is lost.
        from_Q = np.where(known_Q, from_Q, start_Q + count_Q)
        rows = StepRows(
            handle_Q=self._handle[slot_Q],
            prompt_Q=self._prompt[slot_Q],
            start_Q=start_Q,
            count_Q=count_Q,
            from_Q=from_Q,
            to_Q=to_Q,
            reason_T=self._reasons(raw),
            fires_N=raw.fires_N,
            dense_TP=_padded(raw.dense_TP, raw.rows),
            norm_TH=_padded(raw.norm_TH, raw.rows),
        )
        laid = attribute(rows)
        if held.newest:
            self._keep(rows, laid, np.where(known_Q, slot_Q, -1))
        unattributed = int(count_Q[~known_Q].sum())
        self.unattributed_rows += unattributed
        self.recomputed_tokens += laid.recomputed - unattributed
        self.surplus_tokens += laid.beyond
        gap_Q = known_Q & (start_Q > from_Q)
        for slot, first, stop in zip(
            *(column[gap_Q].tolist() for column in (slot_Q, from_Q, np.minimum(start_Q, to_Q))), strict=True
        ):
            request = self._open[slot]
            if self._laid_at[slot] < self._lost_at:
                settled.add(span(request.handle, first, stop, request.prompt_tokens, Reason.RING_FULL))
            else:
                # Preempted, and resumed behind what it had computed: others have filled the cache for it meanwhile.
                self._hits.append(_Hit(request, first, stop))
        self._laid_at[slot_Q[known_Q]] = raw.step
        reached_Q = np.maximum(np.minimum(start_Q + count_Q, to_Q), from_Q)
        self._next[slot_Q[known_Q]] = reached_Q[known_Q]
        settled.add(laid.segments_S, laid.scored)

    def _keep(self, rows: StepRows, laid: Attributed, slot_Q: I64) -> None:
        """Keep what was scored under the KV slot of its token. `slot_Q` is -1 for a request that is not known."""
        if self._kept is None:
            return
        request_T, position_T = positions(rows.start_Q, rows.count_Q)
        for chosen, scored in ((laid.scored_T, laid.scored), (laid.again_T, None)):
            if not len(chosen):
                continue
            slot_R = slot_Q[request_T[chosen]]
            kv_R = np.where(slot_R >= 0, self._kv_slots(slot_R, position_T[chosen]), -1)
            there = kv_R >= 0
            if scored is None or not there.all():
                scored = scores_of(rows, chosen[there])
            self._kept.write(kv_R[there], scored)

    def _kv_slots(self, slot: I64 | int, position: I64) -> I64:
        """Where the engine keeps each position's KV, -1 where it did not say."""
        assert self._kept is not None
        size, width = self._kept.block_size, self._blocks.shape[1]
        at = position // size
        block = np.where(at < width, self._blocks[slot, np.minimum(at, width - 1)], -1).astype(np.int64)
        return np.where(block >= 0, block * size + position % size, -1)

    def _inherited(self, hit: _Hit) -> tuple[Array, ScoredRows | None]:
        """What a request found in the prefix cache: inherited where scores are kept, else unseen."""
        request, start, stop = hit
        if self._kept is None:
            return span(request.handle, start, stop, request.prompt_tokens, self._cached_reason), None
        position = np.arange(start, stop)
        kv = self._kv_slots(request.slot, position)
        there = kv >= 0
        there[there], scored = self._kept.read(kv[there])
        return runs(
            np.full(len(position), request.handle, np.int64),
            position,
            np.where(there, TokenState.INHERITED, TokenState.UNSEEN).astype(np.uint8),
            np.where(there, Reason.NONE, self._cached_reason).astype(np.uint8),
            np.where(position < request.prompt_tokens, Phase.PROMPT, Phase.OUTPUT).astype(np.uint8),
        ), scored

    def _reasons(self, raw: RawStep) -> U8:
        """uint8 [T]: why each row of the step carries no score."""
        reason_T = np.full(raw.rows, Reason.NONE, np.uint8)
        if not self._armed or raw.silent:
            reason_T[:] = Reason.OP_SILENT if self._armed else Reason.NOT_ARMED
            return reason_T
        reason_T[raw.scored_rows :] = Reason.TRIPLES_FULL
        reason_T[: raw.scored_rows][~np.isfinite(raw.norm_TH).all(axis=1)] = Reason.NON_FINITE
        return reason_T

    def _end(self, closing: Closed) -> int:
        """First position past what the engine computed for the request, as far as the closing says it."""
        request = self._open.get(closing.slot)
        if request is None or closing.output_tokens < 0:
            return int(NO_BOUND)
        return request.prompt_tokens + max(0, closing.output_tokens - 1)

    def _total(self, closing: Closed) -> int:
        """Positions that the request's segments must cover."""
        if closing.output_tokens > 0:
            return self._end(closing)
        return min(max(int(self._next[closing.slot]), 0), self._end(closing))

    def _missing(self, request: Opened, closing: Closed) -> Array:
        """Positions up to the end that no step covered.

        Their steps found the ring full, or they were drafts of a request that was preempted before the next step could
        say that they were accepted, and that ended before it computed them again.
        """
        lost = self._laid_at[closing.slot] < self._lost_at
        reached = int(self._next[closing.slot])
        stop = self._total(closing) if reached >= 0 else reached
        return span(request.handle, reached, stop, request.prompt_tokens, Reason.RING_FULL if lost else Reason.LOST)

    def _closed(self, request: Opened, closing: Closed) -> RequestClosed:
        total = self._total(closing)
        return RequestClosed(
            handle=request.handle,
            request_id=request.request_id,
            prompt_tokens=request.prompt_tokens,
            output_tokens=closing.output_tokens
            if closing.output_tokens >= 0
            else max(0, total + 1 - request.prompt_tokens),
            total_tokens=total,
            outcome=Outcome.ABORTED if closing.aborted else Outcome.FINISHED,
        )


def _padded(values: Array, rows: int) -> Array:
    """`values` with zero rows up to `rows`; the added rows are never scored."""
    out = np.zeros((rows, values.shape[1]), values.dtype)
    out[: len(values)] = values
    return out
