"""The books of one engine: which positions of which request are accounted for (invariant I1).

A step's rows become final one step later. Only the next step says where each request went on (drafts that were
rejected and rows computed before a preemption are behind that point) and which requests had ended before it (async
scheduling computes one row past the end). So the ledger holds one step back and settles it when the next arrives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from monitor.events import Closed, Opened, decode_events
from monitor.exporter.layout import StepRows, lay_out, span
from monitor.names import Outcome, Reason
from monitor.ring import RawStep
from monitor.step import SEGMENT_DTYPE, EngineCounters, RequestClosed, RequestOpened, StepBatch

_NO_BOUND: Final = np.int64(1) << 40


class Ledger:
    """State per engine; `take()` turns each raw step into the batch that settles the step before it."""

    def __init__(self, *, armed: bool, drafts: bool) -> None:
        """Args: armed: scores are there.   drafts: the engine decodes speculatively, so that rows may be rejected."""
        self._armed = armed
        self._drafts = drafts
        self._held: RawStep | None = None
        self._open: dict[int, Opened] = {}
        # Tables by slot. `next` is the first position not accounted for; -1: not known yet (resumed).
        self._handle = np.full(64, -1, np.int64)
        self._prompt = np.zeros(64, np.int64)
        self._next = np.zeros(64, np.int64)
        self.recomputed_tokens = 0
        self.surplus_tokens = 0
        self.op_silent_steps = 0
        self.unattributed_rows = 0

    def take(self, raw: RawStep, counters: EngineCounters) -> StepBatch:
        """Settle the held step with what `raw` says of it, then hold `raw`.

        The batch carries the held step's scores, the closings that `raw` announced and the openings that stand
        before the step that is held now.
        """
        events = decode_events(raw.events)
        pieces, batch = self._settle(self._bounds(raw, events))
        opened, closed = [], []
        # In their order: a request whose steps all found the ring full may begin and end within one list.
        for event in events:
            if isinstance(event, Opened):
                self._begin(event)
                opened.append(event)
                pieces.append(span(event.handle, 0, event.cached, event.prompt_tokens, Reason.PREFIX_CACHE))
            elif event.slot in self._open:
                request = self._open[event.slot]
                pieces.append(self._missing(request, event))
                closed.append(self._closed(request, event))
                del self._open[event.slot]
                self._handle[event.slot] = -1
        self._held = _copied(raw)
        if raw.silent:
            self.op_silent_steps += 1
        segments = np.concatenate([batch.segments_S, *pieces]) if pieces else batch.segments_S
        return dataclasses.replace(
            batch,
            step=batch.step or raw.step,
            time_unix_nano=batch.time_unix_nano or raw.time_unix_nano,
            segments_S=segments.astype(SEGMENT_DTYPE),
            opened=tuple(
                RequestOpened(o.handle, o.request_id, o.prompt_tokens, o.adapter, o.traceparent) for o in opened
            ),
            closed=tuple(closed),
            counters=self.count(counters),
        )

    def count(self, counters: EngineCounters) -> EngineCounters:
        """`counters` with those that the ledger keeps."""
        return dataclasses.replace(
            counters,
            recomputed_tokens=self.recomputed_tokens,
            surplus_tokens=self.surplus_tokens,
            op_silent_steps=self.op_silent_steps,
            unattributed_rows=self.unattributed_rows,
        )

    def finish(self) -> StepBatch:
        """The held step as it stands, once the engine will say no more. Requests still open stay open."""
        pieces, batch = self._settle(np.full(len(self._handle), _NO_BOUND))
        self._held = None
        return dataclasses.replace(batch, segments_S=np.concatenate([batch.segments_S, *pieces]))

    def _begin(self, event: Opened) -> None:
        while event.slot >= len(self._handle):
            self._handle = np.concatenate([self._handle, np.full_like(self._handle, -1)])
            self._prompt = np.concatenate([self._prompt, np.zeros_like(self._prompt)])
            self._next = np.concatenate([self._next, np.zeros_like(self._next)])
        self._open[event.slot] = event
        self._handle[event.slot] = event.handle
        self._prompt[event.slot] = event.prompt_tokens
        self._next[event.slot] = -1 if event.resumed else event.cached

    def _bounds(self, raw: RawStep, events: Sequence[Opened | Closed]) -> npt.NDArray[np.int64]:
        """By slot: the first position of the held step that is not true."""
        bound = np.full(len(self._handle), _NO_BOUND)
        if self._drafts and self._held is not None:
            began = np.full(len(bound), _NO_BOUND)
            _at(began, self._held.requests_Q)
            _at(bound, raw.requests_Q)
            # At least one row of a request is accepted. One that goes on further back was preempted: its rows are true.
            bound[bound <= began] = _NO_BOUND
        for event in reversed(events):
            if isinstance(event, Closed) and event.slot in self._open:
                # Overwrites: a later request may have the slot in `raw`. The first closing is the one of the held step.
                bound[event.slot] = self._end(event)
        return bound

    def _settle(self, bound: npt.NDArray[np.int64]) -> tuple[list[npt.NDArray[Any]], StepBatch]:
        """The held step as a batch, and the gaps before it that no step covers."""
        raw = self._held
        if raw is None:
            return [], StepBatch(step=0, time_unix_nano=0)
        slot_Q = raw.requests_Q["slot"].astype(np.int64)
        start_Q = raw.requests_Q["start"].astype(np.int64)
        count_Q = raw.requests_Q["count"].astype(np.int64)
        known_Q = (slot_Q < len(self._handle)) & (self._handle[np.minimum(slot_Q, len(self._handle) - 1)] >= 0)
        slot_Q = np.where(known_Q, slot_Q, 0)
        from_Q = np.where(self._next[slot_Q] < 0, start_Q, self._next[slot_Q])
        to_Q = np.maximum(np.where(known_Q, bound[slot_Q], 0), from_Q)
        # An unknown request's rows are all "computed before": they belong to an account that is lost.
        from_Q = np.where(known_Q, from_Q, start_Q + count_Q)
        laid = lay_out(
            StepRows(
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
        )
        unattributed = int(count_Q[~known_Q].sum())
        self.unattributed_rows += unattributed
        self.recomputed_tokens += laid.recomputed - unattributed
        self.surplus_tokens += laid.beyond
        gaps = [
            span(int(self._handle[slot]), int(first), int(stop), int(self._prompt[slot]), Reason.RING_FULL)
            for slot, first, stop in zip(
                *(column[known_Q & (start_Q > from_Q)] for column in (slot_Q, from_Q, np.minimum(start_Q, to_Q))),
                strict=True,
            )
        ]
        reached_Q = np.maximum(np.minimum(start_Q + count_Q, to_Q), from_Q)
        self._next[slot_Q[known_Q]] = reached_Q[known_Q]
        return gaps, StepBatch(
            step=raw.step,
            time_unix_nano=raw.time_unix_nano,
            segments_S=laid.segments_S,
            fires_N=laid.fires_N,
            dense_RP=laid.dense_RP,
            norm_RH=laid.norm_RH,
        )

    def _reasons(self, raw: RawStep) -> npt.NDArray[np.uint8]:
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
            return int(_NO_BOUND)
        return request.prompt_tokens + max(0, closing.output_tokens - 1)

    def _total(self, closing: Closed) -> int:
        """Positions that the request's segments must cover."""
        if closing.output_tokens > 0:
            return self._end(closing)
        return min(max(int(self._next[closing.slot]), 0), self._end(closing))

    def _missing(self, request: Opened, closing: Closed) -> npt.NDArray[Any]:
        """Positions up to the end that no step covered: their steps found the ring full."""
        reached = int(self._next[closing.slot])
        stop = self._total(closing) if reached >= 0 else reached
        return span(request.handle, reached, stop, request.prompt_tokens, Reason.RING_FULL)

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


def _copied(raw: RawStep) -> RawStep:
    """The step with arrays of its own, since the engine will write over its slot."""
    return dataclasses.replace(
        raw,
        requests_Q=raw.requests_Q.copy(),
        fires_N=raw.fires_N.copy(),
        dense_TP=raw.dense_TP.copy(),
        norm_TH=raw.norm_TH.copy(),
        events=b"",
    )


def _at(first_position: npt.NDArray[np.int64], requests_Q: npt.NDArray[Any]) -> None:
    """Set, by slot, the position at which each request of a step begins."""
    known = requests_Q["slot"] < len(first_position)
    first_position[requests_Q["slot"][known]] = requests_Q["start"][known]


def _padded(values: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """`values` with zero rows up to `rows`; the added rows are never scored."""
    out = np.zeros((rows, values.shape[1]), values.dtype)
    out[: len(values)] = values
    return out
