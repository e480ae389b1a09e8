"""What happens when a hello, a batch, a report or a goodbye arrives. No I/O, no clock, no thread; one caller at a time.

Shape legend: S segments, F features, H hook points, n requests.

What it promises:
- a batch is taken whole, once per (replica, boot, sequence), or refused before it changes anything;
- for each request whose opening it saw, scored + inherited + unseen + dropped equals the engine's total when the
  request closes (invariant I1): what no message accounted for is counted as dropped{lost};
- the result does not depend on how the scheduler cut the steps;
- memory is bounded by `Bounds`, and whatever falls out of a bound is counted.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np

from latentwatch.aggregate.requests import StepView
from latentwatch.aggregate.window import FeatureWindow
from latentwatch.arrays import Array
from latentwatch.client_ids import carried
from latentwatch.collector.closing import Closing
from latentwatch.collector.federation.merge import ReportMerge
from latentwatch.collector.name_places import NamePlaces
from latentwatch.collector.replicas import Boot
from latentwatch.collector.requests import TrackedRequest, bounded
from latentwatch.collector.state import CollectorState
from latentwatch.collector.step_listener import Eviction, Step, StepListener
from latentwatch.errors import RefusalReason, StreamRefused
from latentwatch.facts import RequestInfo
from latentwatch.names import TokenState
from latentwatch.step.batch import UNANNOUNCED, RequestOpened, StepBatch
from latentwatch.step.checks import validate
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import TOKEN_SHAPE
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport

_REASON_SLUGS: Final = 64
"""Distinct refusal reasons shown; they are slugs of our own code, so more means someone is inventing them."""


class Ingest:
    """A `transport.sink.Sink` that keeps the books and the statistics of every engine that streams here."""

    def __init__(self, state: CollectorState, listeners: Sequence[StepListener], *, forwards: bool) -> None:
        """Args: forwards: to another collector, so that no third one may forward to this one."""
        self._state = state
        self._listeners = tuple(listeners)
        self._forwards = forwards
        self._closing = Closing(state, self._listeners)
        self._places = NamePlaces(state, self._listeners)
        self._reports = ReportMerge(state, self._listeners, self._places)

    # -- Sink

    def hello(self, hello: Hello, now: float) -> int:
        """Accept a stream; the highest sequence held for its boot. See transport.sink.Sink.

        A hello with a boot id that is new for its replica ends the requests of the earlier boots as LOST.
        """
        if hello.forwards and self._forwards:
            raise StreamRefused(
                f"collector {hello.replica}",
                found="this collector forwards to another one itself, and only what engines send here travels on",
                instead="Forward to the gateway itself.",
                reason=RefusalReason.FORWARDS_TWICE,
            )
        state = self._state
        admitted = state.replicas.admit(hello, now, functools.partial(self._places.in_use, now))
        boot = admitted.boot
        self._lose(admitted.over, now)
        self._places.let_go(admitted.gone)
        if hello.forwards:
            for row in state.remote.restarted(hello):
                state.index.close(row)
            return boot.high_sequence
        state.engine((hello.model_name, hello.engine))
        state.model(hello.model_name)
        for listener in self._listeners:
            listener.model_seen(hello.model_name)
        return boot.high_sequence

    def observe(self, hello: Hello, received: ReceivedBatch, now: float) -> None:
        """Take one batch into the state, whole or not at all.

        Raises: StreamRefused: "malformed_batch", "scores_unarmed", or "unknown_boot" for a stream that never said hello
                here.
        """
        state, sequence, batch = self._state, received.sequence, received.batch
        boot = state.replicas.boot(hello)
        if self._is_duplicate(boot, sequence):
            return
        validate(batch, sparse_F=state.table.sparse_F, hook_points=len(state.watchlist.hooks), armed=hello.armed)
        self._count(boot, sequence, batch.time_unix_nano, now)
        boot.counters = batch.counters
        self._merge_step(boot, batch, now)

    def merge(self, hello: Hello, received: ReceivedReport, now: float) -> None:
        """Take what a collector counted since its last report, whole or not at all.

        Raises: StreamRefused: "malformed_batch", "unknown_boot", or as `hello` for the engines in it; "replica_twice"
                for an engine that streams here itself.
        """
        sequence, report = received.sequence, received.report
        boot = self._state.replicas.boot(hello)
        if self._is_duplicate(boot, sequence):
            return
        room = self._reports.check(hello, report, now)
        self._count(boot, sequence, report.time_unix_nano, now)
        self._lose(self._reports.merge_replicas(hello, boot, report, room, now), now)
        self._places.let_go(room.names)
        self._reports.merge_counts(hello, report, now)

    def goodbye(self, hello: Hello, now: float) -> None:
        """The stream ended; its open requests wait for it to come back, up to Bounds.stream_gone_seconds."""
        self._state.replicas.disconnect(hello, now)

    def commit(self) -> None:
        """Nothing: this state is kept in memory. `durability.journal.DurableSink` keeps it on a disk."""

    # -- the rest of what changes the state

    def refused(self, reason: str) -> None:
        """Count a refused stream or message. The receiver calls this: it refuses some before they get here."""
        refused = self._state.refused
        known = reason in refused or len(refused) < _REASON_SLUGS
        refused[reason if known else "other"] += 1

    def tick(self, now: float) -> None:
        """Close what nobody will close any more. Call it about once a second."""
        state = self._state
        self._lose(state.replicas.gone(now), now)
        self._closing.expire(state.slots.idle_since(now - state.bounds.request_idle_seconds), now)
        for row in state.remote.idle(now - state.bounds.request_idle_seconds):
            state.index.close(row)
        for listener in self._listeners:
            listener.tick(now)
        self._places.expire(now)

    def acknowledged(self, number: int) -> None:
        """The gateway holds every report up to this one."""
        for listener in self._listeners:
            listener.acknowledged(number)

    def shift_clock(self, seconds: float) -> None:
        """The caller's clock jumped by so much without so much time having passed."""
        self._state.replicas.shift(seconds)
        self._state.slots.shift(seconds)
        self._state.remote.shift(seconds)

    def disconnect_all(self) -> None:
        """The process that served these streams is gone; their engines say hello again."""
        self._state.replicas.disconnect_all()

    # -- one message

    def _is_duplicate(self, boot: Boot, sequence: int) -> bool:
        """Whether this came before; it is counted then."""
        known = sequence <= boot.high_sequence
        self._state.totals.messages += known
        self._state.totals.duplicates += known
        return known

    def _count(self, boot: Boot, sequence: int, time_unix_nano: int, now: float) -> None:
        """A message that will be taken."""
        totals = self._state.totals
        totals.messages += 1
        if boot.high_sequence:
            totals.lost_sequences += sequence - boot.high_sequence - 1
        boot.high_sequence = sequence
        boot.last_seen_seconds = now
        boot.clock.observe(time_unix_nano / 1e9, now)
        self._state.lag.observe(max(0.0, now - time_unix_nano / 1e9))

    def _lose(self, boots: Sequence[Boot], now: float) -> None:
        for boot in boots:
            self._closing.expire(boot.handles.slots.tolist(), now)

    # -- one step

    def _merge_step(self, boot: Boot, batch: StepBatch, now: float) -> None:
        state, name = self._state, boot.hello.model_name
        engine, model = state.engine((name, boot.hello.engine)), state.model(name)
        segments = batch.segments_S
        engine.tokens += _token_counts(segments)
        slot_S = boot.handles.find(segments["handle"])
        if batch.opened or (slot_S < 0).any():
            handles_S = segments["handle"]
            self._open(boot, batch.opened, handles_S[handles_S != UNANNOUNCED], now)
            slot_S = boot.handles.find(segments["handle"])
        placed = slot_S >= 0
        state.slots.account(segments[placed], slot_S[placed], now)
        view = state.statistics.update(batch, np.where(placed, slot_S, state.scratch), now)
        exceedances, slots = view.exceedances, view.exceeding_slots
        if not placed.all():
            tracked = slots != state.scratch
            exceedances, slots = exceedances[tracked], slots[tracked]
        step = Step(name, batch, view, exceedances, slots, state.slots.requests, now)
        for listener in self._listeners:
            listener.step(step)
        if not placed.all():
            state.statistics.clear(np.array([state.scratch]))
        model.fired_F += view.fired_F
        if len(batch.norm_RH):
            # Without rows the columns may be absent too.
            model.norm.observe(batch.norm_RH)
        exceeded_F = np.bincount(exceedances["feature"], minlength=len(state.features))
        model.exceedances_F += exceeded_F
        if len(exceedances):
            state.list_exceedances(model, exceedances, state.slots.requests[slots])
        state.windows.add(_window(view, segments, exceeded_F), now)
        self._closing.end(boot, batch.closed, now)

    def _open(self, boot: Boot, opened: tuple[RequestOpened, ...], handles_S: Array, now: float) -> None:
        """Give slots to the requests of a step; those that no message opened here are noted as such."""
        state = self._state
        slots = boot.handles.find(np.array([event.handle for event in opened], np.int64)).tolist()
        new: dict[int, RequestInfo] = {}
        for event, slot in zip(opened, slots, strict=True):
            if slot < 0:
                new[event.handle] = _opened(boot.hello, event, now)
                continue
            request = state.slots.request(slot)
            state.index.forget(request)
            opened_seconds, opening_seen = request.info.opened_seconds, request.info.opening_seen
            request.info = _opened(boot.hello, event, opened_seconds, opening_seen=opening_seen)
            state.index.add(request)
        unannounced = dict.fromkeys(handles_S[boot.handles.find(handles_S) < 0].tolist())
        # More than there are slots would find none.
        for handle in itertools.islice(unannounced, state.bounds.open_requests + len(new)):
            if handle not in new:
                new[handle] = RequestInfo("", boot.hello.replica, boot.hello.model_name, boot.hello.engine, now)
        self._admit(boot, new, now)

    def _admit(self, boot: Boot, new: dict[int, RequestInfo], now: float) -> None:
        """Give new requests slots. Args: new: by handle; the later ones get none where all are taken by running ones.

        One that gets no slot is counted where its opening was seen: without, its every step would count it again.
        """
        state, slots = self._state, list[int]()
        for info in new.values():
            if state.slots.full() and not self._evict(now):
                break
            state.last_serial += 1
            request = TrackedRequest(state.last_serial, info, boot.handles)
            slots.append(state.slots.claim(request, now))
            state.index.add(request)
        handles = list(new)
        state.totals.requests_evicted += sum(new[handle].opening_seen for handle in handles[len(slots) :])
        state.statistics.clear(np.array(slots, np.int64))
        boot.handles.add(handles[: len(slots)], slots)

    def _evict(self, now: float) -> bool:
        """Free the slot of the request that was quiet longest; False when even that one runs."""
        state = self._state
        slot, last_token = state.slots.quietest()
        if now - last_token < state.bounds.evict_after_seconds:
            return False
        request = state.slots.release(slot)
        if request.handles is not None:
            request.handles.remove(np.array([slot]))
        eviction = Eviction(slot, request)
        for listener in self._listeners:
            listener.evicted(eviction)
        state.index.forget(request)
        state.totals.requests_evicted += 1
        return True


def _opened(hello: Hello, event: RequestOpened, opened_seconds: float, *, opening_seen: bool = True) -> RequestInfo:
    """Who a request is, from what its engine said at the opening. Client text is cut."""
    return RequestInfo(
        carried(event.request_id),
        hello.replica,
        hello.model_name,
        hello.engine,
        opened_seconds,
        opening_seen,
        bounded(event.adapter),
        bounded(event.traceparent),
        event.prompt_tokens,
        carried(event.response_id),
    )


def _token_counts(segments_S: Array) -> Array:
    """Tokens by state, reason and phase, int64 of TOKEN_SHAPE."""
    key = np.ravel_multi_index((segments_S["state"], segments_S["reason"], segments_S["phase"]), TOKEN_SHAPE)
    counts = np.bincount(key, weights=segments_S["count"], minlength=int(np.prod(TOKEN_SHAPE)))
    return counts.astype(np.int64).reshape(TOKEN_SHAPE)


def _window(view: StepView, segments_S: Array, exceeded_F: Array) -> FeatureWindow:
    tokens = np.bincount(segments_S["state"], weights=segments_S["count"], minlength=len(TokenState) + 1)
    return FeatureWindow(tokens.astype(np.int64), view.fired_F, view.peak_F, exceeded_F)
