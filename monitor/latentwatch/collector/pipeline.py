"""The collector's logic: batches in, plain values out. No I/O, no clock, no thread; one caller at a time.

Shape legend: S segments, F features, H hook points, n requests.

What it promises:
- a batch is taken whole, once per (replica, boot, sequence), or refused before it changes anything;
- for each request whose opening it saw, scored + inherited + unseen + dropped equals the engine's total when the
  request closes (invariant I1): what no message accounted for is counted as dropped{lost};
- the result does not depend on how the scheduler cut the steps;
- memory is bounded by `Bounds`, and whatever falls out of a bound is counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from latentwatch.aggregate.features import FeatureTable
from latentwatch.aggregate.histogram import LAG_EDGES, NORM_EDGES, Histograms, ScalarHistogram
from latentwatch.aggregate.requests import RequestFeatures, RequestStates, StepView
from latentwatch.aggregate.window import FeatureWindow, WindowRing
from latentwatch.collector import snapshot as views
from latentwatch.collector.config import Bounds
from latentwatch.collector.drift import Drift, DriftSettings
from latentwatch.collector.durability.checkpoint import State
from latentwatch.collector.evidence_buffer import EvidenceBuffer, Keep
from latentwatch.collector.exceedances import EVENT_DTYPE, ExceedanceRing
from latentwatch.collector.federation.outbox import ReportOutbox
from latentwatch.collector.federation.remote_requests import RemoteRequests, features_of, was_seen
from latentwatch.collector.pseudonyms import Pseudonyms
from latentwatch.collector.replicas import Boot, Replicas
from latentwatch.collector.requests import (
    ClosedRequest,
    FeatureSummary,
    HandleMap,
    OpenRequest,
    RequestIndex,
    Roster,
    Slots,
    bounded,
    summarise,
)
from latentwatch.drift.limits import with_limits
from latentwatch.errors import RefusalReason, StreamRefused
from latentwatch.evidence.records import Record
from latentwatch.names import Outcome, Phase, Reason, TokenState, response_id, trace_id
from latentwatch.step.batch import CROSSED_DTYPE, RequestClosed, RequestOpened, StepBatch
from latentwatch.step.checks import validate
from latentwatch.transport import report as reports
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import TOKEN_SHAPE, ReplicaState, Report, RequestRow
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport
from latentwatch.watchlist.file import Watchlist

Array = npt.NDArray[Any]

_OUTCOMES: Final[Mapping[Outcome, Literal["finished", "aborted", "lost"]]] = {
    Outcome.FINISHED: "finished",
    Outcome.ABORTED: "aborted",
    Outcome.LOST: "lost",
}
_TOTALS: Final = ("serial", "messages", "duplicates", "lost_sequences", "requests_evicted", "excess_tokens")
"""Plain counts of a Pipeline."""
_MODEL_COLUMNS: Final = ("fired_F", "requests_F", "exceedances_F")
_ROWS_AT_ONCE: Final = 512
"""Rows of a report that are unfolded at a time: at 1,024 features some 17 MiB."""
_REASON_SLUGS: Final = 64
"""Distinct refusal reasons shown; they are slugs of our own code, so more means someone is inventing them."""


@dataclass
class _Engine:
    """Counts of one (model_name, engine)."""

    tokens: Array = field(default_factory=lambda: np.zeros(TOKEN_SHAPE, np.int64))
    requests: Counter[Outcome] = field(default_factory=Counter)


@dataclass
class _Model:
    """Counts of one served model name."""

    fired_F: Array
    requests_F: Array
    exceedances_F: Array
    statistic: Histograms
    norm: Histograms
    latest: dict[int, views.Exemplar] = field(default_factory=dict)


class Pipeline:
    """A `transport.sink.Sink` that keeps the books and the statistics of every engine that streams here."""

    def __init__(self, watchlist: Watchlist, bounds: Bounds | None = None, drift: DriftSettings | None = None) -> None:
        """Raises BaselineRefused where drift is to be measured against a baseline of something else."""
        drift = drift or DriftSettings()
        self.drift = Drift(watchlist, drift)
        self.watchlist = with_limits(watchlist, drift.baseline)
        self.features = self.watchlist.features
        self.table = FeatureTable.of(self.features)
        self.bounds = bounds or Bounds()
        self._sparse_F = self.table.sparse_F
        self._slots = Slots(self.bounds.open_requests)
        # One slot more: rows of requests that found no slot are computed there and thrown away.
        self._scratch = self.bounds.open_requests
        self._states = RequestStates(self.table, self.bounds.open_requests + 1)
        self._index = RequestIndex(self.bounds.closed_requests, self.bounds.flagged_requests)
        self._events = ExceedanceRing(self.bounds.exceedances)
        self._windows = WindowRing(len(self.features), self.bounds.windows, self.bounds.window_seconds)
        self._replicas = Replicas(watchlist.sha256, self.bounds)
        self._engines: dict[tuple[str, str], _Engine] = {}
        self._models: dict[str, _Model] = {}
        self._serial = 0
        self._lag = ScalarHistogram(LAG_EDGES)
        self._refused: Counter[str] = Counter()
        self._messages = self._duplicates = self._lost_sequences = 0
        self._requests_evicted = self._excess_tokens = 0
        self._recorder: EvidenceBuffer | None = None
        self._elsewhere = RemoteRequests(self.bounds.open_requests)
        self.forward: ReportOutbox | None = None
        self._forward_state: State | None = None
        """Of a life that forwarded, where this one does not: what the gateway was told is not told again later."""
        self.pseudonyms: Pseudonyms | None = None
        """Under which ids are looked up; whoever calls `observe` and `merge` has replaced them."""

    def forward_from(self, boot_id: str) -> None:
        """Cut reports for a gateway from now on, in `forward`. Call it before `restore`.

        Args: boot_id: 32 hex digits, drawn anew; a state that is restored has the one that it began with.
        """
        self.forward = ReportOutbox(boot_id, len(self.features), self.bounds)

    def record_to(self, sinks: Sequence[Callable[[Sequence[Record]], None]], keep: Keep) -> None:
        """Hand evidence to every sink from now on; see recorder.EvidenceBuffer. They must neither block nor raise."""
        self._recorder = EvidenceBuffer(self.watchlist, self._scratch + 1, sinks, keep)

    # -- Sink

    def hello(self, hello: Hello, now: float) -> int:
        """Accept a stream; the highest sequence held for its boot. See transport.sink.Sink.

        A hello with a boot id that is new for its replica ends the requests of the earlier boots as LOST.
        """
        if hello.forwards and self.forward is not None:
            raise StreamRefused(
                f"collector {hello.replica}",
                found="this collector forwards to another one itself, and only what engines send here travels on",
                instead="ReportOutbox to the gateway itself.",
                reason=RefusalReason.FORWARDS_TWICE,
            )
        boot, over = self._replicas.admit(hello, now)
        if hello.forwards:
            for row in self._elsewhere.restarted(hello):
                self._index.close(row)
            return boot.high_sequence
        self._engine((hello.model_name, hello.engine))
        self._register_model(hello.model_name)
        for other in over:
            self._close_lost(other, now)
        return boot.high_sequence

    def observe(self, hello: Hello, received: ReceivedBatch, now: float) -> None:
        """Take one batch into the state, whole or not at all.

        Raises: StreamRefused: "malformed_batch", or "unknown_boot" for a stream that never said hello here.
        """
        sequence, batch = received.sequence, received.batch
        boot = self._replicas.boot(hello)
        if self._held(boot, sequence):
            return
        validate(batch, sparse_F=self._sparse_F, hook_points=len(self.watchlist.hooks))
        self._count(boot, sequence, batch.time_unix_nano, now)
        boot.counters = batch.counters
        self._ingest(boot, batch, now)

    def merge(self, hello: Hello, received: ReceivedReport, now: float) -> None:
        """Take what a collector counted since its last report, whole or not at all.

        Raises: StreamRefused: "malformed_batch", "unknown_boot", or as `hello` for the engines in it; "replica_twice"
                for an engine that streams here itself.
        """
        sequence, report = received.sequence, received.report
        boot = self._replicas.boot(hello)
        if self._held(boot, sequence):
            return
        reports.validate(
            report,
            features=len(self.features),
            hook_points=len(self.watchlist.hooks),
            statistic_buckets=self.table.edges_FB.shape[1] + 1,
            norm_buckets=len(NORM_EDGES) + 1,
        )
        self._replicas.check_report(hello, report)
        self._count(boot, sequence, report.time_unix_nano, now)
        boot.shed_requests, boot.shed_crossings = report.shed_requests, report.shed_crossings
        for other in self._replicas.merge_report(hello, report):
            self._close_lost(other, now)
        self._add_deltas(report, now)
        for first in range(0, len(report.requests), _ROWS_AT_ONCE):
            self._add_rows(hello, report.requests[first : first + _ROWS_AT_ONCE], now)

    def goodbye(self, hello: Hello, now: float) -> None:
        """The stream ended; its open requests wait for it to come back, up to Bounds.stream_gone_seconds."""
        self._replicas.disconnect(hello, now)

    def refused(self, reason: str) -> None:
        """Count a refused stream or message. The receiver calls this: it refuses some before they get here."""
        known = reason in self._refused or len(self._refused) < _REASON_SLUGS
        self._refused[reason if known else "other"] += 1

    def tick(self, now: float) -> None:
        """Close what nobody will close any more. Call it about once a second."""
        for boot in self._replicas.gone(now):
            self._close_lost(boot, now)
        idle = list(self._slots.idle_since(now - self.bounds.request_idle_seconds))
        for slot in idle:
            self._close(self._slots.request(slot).handles, {slot: None}, now)
        for row in self._elsewhere.idle(now - self.bounds.request_idle_seconds):
            self._index.close(row)
        self.drift.tick(now)
        if self.forward is not None and self.forward.due:
            self._report(self.forward, now)

    def acknowledged(self, number: int) -> None:
        """The gateway holds every report up to this one."""
        if self.forward is not None:
            self.forward.acknowledged(number)

    def commit(self) -> None:
        """Nothing: this state is kept in memory. `durable.DurableSink` keeps it on a disk."""

    def shift_clock(self, seconds: float) -> None:
        """The caller's clock jumped by so much without so much time having passed."""
        self._replicas.shift(seconds)
        self._slots.shift(seconds)

    def forget(self, name: str) -> None:
        """Let go of the closed requests with this engine request id, response id or trace id.

        Their summaries go, and their ids wherever they stand: at exceedances, exemplars and examples of drift. What
        they added to counts stays, and that some request went above a limit.
        """
        held = {request.serial: request for request in (*self._index.closed(), *self._events.requests())}
        gone = [
            request
            for request in held.values()
            if request.serial not in self._slots.by_serial
            and name in (request.request_id, response_id(request.request_id), trace_id(request.traceparent))
        ]
        names = {name, *(request.request_id for request in gone)}

        def is_gone(request_id: str) -> bool:
            return request_id in names or response_id(request_id) in names

        for model in self._models.values():
            model.latest = {f: exemplar for f, exemplar in model.latest.items() if not is_gone(exemplar.request_id)}
        self.drift.forget(is_gone)
        if self.forward is not None:
            self.forward.forget(is_gone)
        for request in gone:
            self._index.drop(request)
            request.request_id = request.traceparent = ""

    # -- the whole state, to go on from in another process

    def state(self) -> State:
        """Everything that the next batch or reading depends on, as values that later batches do not change."""
        slots, roster = self._slots.taken, Roster()
        state = {
            "replicas": self._replicas.state(),
            "slots": self._slots.state(roster),
            "features": self._states.state(slots),
            "index": self._index.state(roster),
            "events": self._events.state(roster),
            "windows": self._windows.state(),
            "drift": self.drift.state(),
            "engines": [
                [*key, engine.tokens.copy(), [engine.requests[outcome] for outcome in Outcome]]
                for key, engine in self._engines.items()
            ],
            "models": {name: _model_state(model) for name, model in self._models.items()},
            "lag": {"counts": list(self._lag.counts), "sum": self._lag.sum},
            "refused": dict(self._refused),
            "totals": {name: getattr(self, f"_{name}") for name in _TOTALS},
            "elsewhere": self._elsewhere.state(roster),
            "forward": self.forward.state() if self.forward else self._forward_state,
        }
        return state | {"requests": roster.state()}

    def restore(self, state: State) -> None:
        """Go on from what `state` gave, in a pipeline that has seen nothing, of the same watchlist and bounds."""
        roster = Roster.of(state["requests"])
        handles = self._replicas.restore(state["replicas"])
        self._slots.restore(state["slots"], roster, handles)
        self._states.restore(self._slots.taken, state["features"])
        self._index.restore(state["index"], roster)
        self._events.restore(state["events"], roster)
        self._windows.restore(state["windows"])
        self.drift.restore(state["drift"])
        for model_name, engine, tokens, requests in state["engines"]:
            self._engines[model_name, engine] = _Engine(tokens, Counter(dict(zip(Outcome, requests, strict=True))))
        for name, held in state["models"].items():
            _restore_model(self._model(name), held)
        self._lag.counts[:], self._lag.sum = state["lag"]["counts"], state["lag"]["sum"]
        self._refused.update(state["refused"])
        for name in _TOTALS:
            setattr(self, f"_{name}", state["totals"][name])
        self._elsewhere.restore(state["elsewhere"], roster)
        self._forward_state = state["forward"]
        if self.forward is not None and state["forward"] is not None:
            running = {serial: self._slots.request(slot) for serial, slot in self._slots.by_serial.items()}
            models = {name: self._model_totals(name) for name in self._models}
            self.forward.restore(state["forward"], running, models)
        parts = (state["slots"]["serials"], state["index"]["serial"], state["elsewhere"]["serial"])
        for serial in sorted(serial for serials in parts for serial in serials):
            self._index.named(serial, roster.request(serial).request_id)

    def disconnect_all(self) -> None:
        """The process that served these streams is gone; their engines say hello again."""
        self._replicas.disconnect_all()

    # -- reading

    def snapshot(self, now: float) -> views.Snapshot:
        """Every number that /metrics shows; later batches do not change it."""
        newest = {name: self._replicas.known[name].newest for name in sorted(self._replicas.known)}
        return views.Snapshot(
            now=now,
            engines=tuple(self._engine_totals(key) for key in sorted(self._engines)),
            models=tuple(self._model_totals(name) for name in sorted(self._models)),
            replicas=tuple(_replica_view(boot) for boot in newest.values() if not boot.hello.forwards),
            forwarders=tuple(_forwarder_view(boot) for boot in newest.values() if boot.hello.forwards),
            forward=self.forward.facts() if self.forward else None,
            drift=self.drift.views(),
            bounds=self.bounds,
            collector=views.CollectorTotals(
                messages=self._messages,
                duplicates=self._duplicates,
                lost_sequences=self._lost_sequences,
                streams_refused=dict(self._refused),
                exceedances_evicted=self._events.evicted,
                requests_evicted=self._requests_evicted,
                summaries_evicted=self._index.evicted,
                accounting_excess_tokens=self._excess_tokens,
                ingest_lag=views.LagView(self._lag.edges, tuple(self._lag.counts), self._lag.sum),
                open_requests=len(self._slots.by_serial),
            ),
        )

    def recent(self, now: float) -> tuple[float, FeatureWindow]:
        """The last windows over all models; see aggregate.window.WindowRing.recent."""
        return self._windows.recent(now)

    def exceedances(self, limit: int) -> list[views.Exceedance]:
        """The latest exceedances, newest first."""
        return [self._exceedance(event, request) for event, request in self._events.latest(limit)]

    def anomalies(self, limit: int) -> list[views.Anomaly]:
        """The same by request: the latest ones, each with everything that is held of it."""
        return [
            views.Anomaly.of([self._exceedance(event, request) for event, request in events])
            for events in self._events.of_requests(limit)
        ]

    def latest(self, limit: int) -> list[int]:
        """Numbers for `request`: open requests, newest first, then closed ones, latest end first."""
        opened = sorted(self._slots.by_serial, reverse=True)[:limit]
        opened += self._elsewhere.latest(limit - len(opened))
        return [*opened, *self._index.latest_closed(limit - len(opened))]

    def find(self, name: str) -> list[int]:
        """Numbers of the requests with this engine request id or response id, newest first; empty when none is held."""
        names = self.pseudonyms.candidates(name) if self.pseudonyms else (name,)
        return next((list(reversed(found)) for held in names if (found := self._index.find(held))), [])

    def request(self, serial: int) -> views.RequestView | None:
        """One request, by a number that `latest` or `find` gave; None when it was let go since."""
        going = self._elsewhere.row(serial)
        closed = self._index.closed_request(serial) or going
        if closed is None:
            slot = self._slots.by_serial.get(serial)
            if slot is None:
                return None
            request, tokens = self._slots.request(slot), self._slots.accounted[slot].sum(axis=1)
            features = self._states.features_of(np.array([slot]))
            (summary,) = summarise(features, self.table.limit_F, self.bounds.summary_features)
        else:
            request, tokens, summary = closed.open, closed.tokens, closed.features
        return views.RequestView(
            request_id=request.request_id,
            response_id=response_id(request.request_id),
            replica=request.replica,
            model_name=request.model_name,
            engine=request.engine,
            adapter=request.adapter,
            trace_id=trace_id(request.traceparent),
            outcome=_OUTCOMES[closed.outcome] if closed and not going else "open",
            opened_seconds=request.opened_seconds,
            closed_seconds=closed.closed_seconds if closed and not going else None,
            opening_seen=request.opening_seen,
            prompt_tokens=request.prompt_tokens,
            output_tokens=closed.output_tokens if closed else None,
            total_tokens=closed.total_tokens if closed else None,
            tokens={state.name.lower(): int(tokens[state]) for state in TokenState},
            exceeded_features=summary.exceeded,
            features=tuple(self._feature_of_request(row) for row in summary.rows.tolist()),
            features_left_out=summary.left_out,
        )

    # -- one message

    def _held(self, boot: Boot, sequence: int) -> bool:
        """Whether this came before; it is counted then."""
        held = sequence <= boot.high_sequence
        self._messages += held
        self._duplicates += held
        return held

    def _count(self, boot: Boot, sequence: int, time_unix_nano: int, now: float) -> None:
        """A message that will be taken."""
        self._messages += 1
        if boot.high_sequence:
            self._lost_sequences += sequence - boot.high_sequence - 1
        boot.high_sequence = sequence
        boot.last_seen_seconds = now
        self._lag.observe(max(0.0, now - time_unix_nano / 1e9))

    # -- one step

    def _ingest(self, boot: Boot, batch: StepBatch, now: float) -> None:
        engine, model = self._engine((boot.hello.model_name, boot.hello.engine)), self._model(boot.hello.model_name)
        segments = batch.segments_S
        engine.tokens += _token_counts(segments)
        slot_S = boot.handles.find(segments["handle"])
        if batch.opened or (slot_S < 0).any():
            self._open(boot, batch.opened, segments["handle"], now)
            slot_S = boot.handles.find(segments["handle"])
        placed = slot_S >= 0
        self._slots.account(segments[placed], slot_S[placed], now)
        view = self._states.update(batch, np.where(placed, slot_S, self._scratch))
        crossings = view.crossings[view.crossings["slot"] != self._scratch]
        if self._recorder:
            self._recorder.step(batch, view, crossings, self._slots.requests, now)
        if not placed.all():
            self._states.clear(np.array([self._scratch]))
            if self._recorder:
                self._recorder.clear(self._scratch)
        model.fired_F += view.fired_F
        if len(batch.norm_RH):
            # Without rows the columns may be absent too.
            model.norm.observe(batch.norm_RH)
        exceeded_F = np.bincount(crossings["feature"], minlength=len(self.features))
        model.exceedances_F += exceeded_F
        self._add_events(model, crossings, now)
        self._windows.add(_window(view, segments, exceeded_F), now)
        if self.forward is not None:
            self.forward.peak(boot.hello.model_name, view.peak_F)
        self._end(boot, batch.closed, now)

    def _open(self, boot: Boot, opened: tuple[RequestOpened, ...], handles_S: Array, now: float) -> None:
        """Give slots to the requests of a step; those that no message opened here are noted as such."""
        slots = boot.handles.find(np.array([event.handle for event in opened], np.int64)).tolist()
        fresh = {event.handle: event for event, slot in zip(opened, slots, strict=True) if slot < 0}
        for event, slot in zip(opened, slots, strict=True):
            if slot >= 0:
                self._apply_opening(self._slots.request(slot), event)
        unknown = handles_S[boot.handles.find(handles_S) < 0].tolist()
        for handle, request in self._admit(boot, list(dict.fromkeys((*fresh, *unknown))), now).items():
            if request is None:
                self._requests_evicted += handle in fresh
            elif handle in fresh:
                request.opening_seen = True
                self._apply_opening(request, fresh[handle])

    def _apply_opening(self, request: OpenRequest, event: RequestOpened) -> None:
        request.learn(event)
        self._index.named(request.serial, request.request_id)

    def _admit(self, boot: Boot, handles: list[int], now: float) -> dict[int, OpenRequest | None]:
        """Give new requests slots; None for those that found all taken by requests that run."""
        hello, admitted, slots = boot.hello, dict.fromkeys(handles), []
        for handle in handles:
            if self._slots.full() and not self._evict(now):
                break
            self._serial += 1
            request = OpenRequest(
                self._serial, handle, boot.handles, hello.replica, hello.model_name, hello.engine, now
            )
            slots.append(self._slots.claim(request, now))
            admitted[handle] = request
        self._states.clear(np.array(slots, np.int64))
        boot.handles.add(handles[: len(slots)], slots)
        return admitted

    def _evict(self, now: float) -> bool:
        """Free the slot of the request that was quiet longest; False when even that one runs."""
        slot, last_token = self._slots.quietest()
        if now - last_token < self.bounds.evict_after_seconds:
            return False
        request = self._slots.release(slot)
        request.handles.remove(np.array([slot]))
        if self._recorder:
            self._recorder.clear(slot)
        if self.forward is not None:
            self.forward.evicted(request)
        self._index.forget(request.serial, request.request_id)
        self._requests_evicted += 1
        return True

    def _add_events(self, model: _Model, crossings: Array, now: float) -> None:
        if not len(crossings):
            return
        crossed = np.empty(len(crossings), CROSSED_DTYPE)
        crossed["seconds"] = now
        for name in ("feature", "phase", "position", "value"):
            crossed[name] = crossings[name]
        requests = self._slots.requests[crossings["slot"]]
        self._list_exceedances(model, crossed, requests)
        if self.forward is not None:
            self.forward.crossed(crossed, requests)

    def _list_exceedances(self, model: _Model, crossed: Array, requests: Array) -> None:
        """List crossings (CROSSED_DTYPE) of these requests, all of one model, and keep each feature's latest."""
        events = np.zeros(len(crossed), EVENT_DTYPE)
        events["peak"] = np.nan
        for name in ("feature", "phase", "position", "value", "seconds"):
            events[name] = crossed[name]
        self._events.add(events, requests)
        features, from_end = np.unique(crossed["feature"][::-1], return_index=True)
        for feature, i in zip(features.tolist(), (len(crossed) - 1 - from_end).tolist(), strict=True):
            request = requests[i]
            model.latest[feature] = views.Exemplar(
                request.request_id,
                trace_id(request.traceparent),
                float(crossed["value"][i]),
                float(crossed["seconds"][i]),
            )

    # -- ends of requests

    def _end(self, boot: Boot, closed: tuple[RequestClosed, ...], now: float) -> None:
        if not closed:
            return
        slots = boot.handles.find(np.array([event.handle for event in closed], np.int64)).tolist()
        ends: dict[int, RequestClosed | None] = {s: event for s, event in zip(slots, closed, strict=True) if s >= 0}
        unknown = [event for slot, event in zip(slots, closed, strict=True) if slot < 0]
        self._engine((boot.hello.model_name, boot.hello.engine)).requests.update(event.outcome for event in unknown)
        self._close(boot.handles, ends, now)

    def _close_lost(self, boot: Boot, now: float) -> None:
        self._close(boot.handles, dict.fromkeys(boot.handles.slots.tolist()), now)

    def _close(self, handles: HandleMap, ends: dict[int, RequestClosed | None], now: float) -> None:
        """Close the requests in these slots, all of one boot; None where the engine never said how one ended."""
        if not ends:
            return
        slots = np.array(list(ends), np.int64)
        features = self._states.features_of(slots)
        self._count_statistics(slots, features, now)
        summaries = summarise(features, self.table.limit_F, self.bounds.summary_features)
        for i, (slot, event) in enumerate(ends.items()):
            if summaries[i].exceeded:
                self._events.settle(self._slots.request(slot).serial, features.statistic_nF[i])
            closed = self._close_one(slot, event, summaries[i], now)
            if self.forward is not None:
                self.forward.ended(closed, features, i)
        handles.remove(slots)

    def _count_statistics(self, slots: Array, features: RequestFeatures, now: float) -> None:
        """Add the per-request statistics of n closing requests of one model to its histograms and detectors."""
        model = self._models[self._slots.request(int(slots[0])).model_name]
        accounted = self._slots.accounted[slots]
        seen_n = accounted[:, [TokenState.SCORED, TokenState.INHERITED]].sum(axis=(1, 2)) > 0
        counted_nF = seen_n[:, None] & (self._sparse_F | ~np.isnan(features.statistic_nF))
        # A sparse feature's tokens without activation are zeros, and the maximum is over them too.
        statistic_nF = np.where(self._sparse_F, np.fmax(features.statistic_nF, 0), features.statistic_nF)
        model.statistic.observe(statistic_nF, counted_nF)
        model.requests_F += np.count_nonzero(features.fired_nF, axis=0)
        requests = [self._slots.request(slot) for slot in slots.tolist()]
        # Of a request that began before this collector only the end was seen: it would count as one with fewer fires.
        whole = [i for i, request in enumerate(requests) if seen_n[i] and request.opening_seen]
        if whole:
            self.drift.add([requests[i] for i in whole], features.of(whole), now)

    def _close_one(self, slot: int, event: RequestClosed | None, summary: FeatureSummary, now: float) -> ClosedRequest:
        accounted = self._slots.accounted[slot].copy()
        request = self._slots.release(slot)
        engine = self._engines[request.model_name, request.engine]
        outcome = Outcome.LOST if event is None else event.outcome
        engine.requests[outcome] += 1
        if event is not None:
            self._settle(request, event, accounted, engine, now)
        closed = ClosedRequest(
            open=request,
            outcome=outcome,
            closed_seconds=now,
            output_tokens=None if event is None else event.output_tokens,
            total_tokens=None if event is None else event.total_tokens,
            tokens=accounted.sum(axis=1),
            features=summary,
        )
        self._index.close(closed)
        if self._recorder:
            self._recorder.close(slot, closed)
        return closed

    def _settle(
        self, request: OpenRequest, event: RequestClosed, accounted: Array, engine: _Engine, now: float
    ) -> None:
        """Take over what the end says, and make the books balance: tokens that no message told of were lost."""
        if not request.request_id:
            request.request_id = bounded(event.request_id)
            self._index.named(request.serial, request.request_id)
        request.prompt_tokens = event.prompt_tokens
        missing = event.total_tokens - int(accounted.sum())
        if not request.opening_seen or missing == 0:
            return
        if missing < 0:
            self._excess_tokens -= missing
            return
        prompt_missing = min(event.prompt_tokens, event.total_tokens) - int(accounted[:, Phase.PROMPT].sum())
        prompt_missing = min(max(prompt_missing, 0), missing)
        lost = np.zeros(len(Phase) + 1, np.int64)
        lost[Phase.PROMPT], lost[Phase.OUTPUT] = prompt_missing, missing - prompt_missing
        accounted[TokenState.DROPPED] += lost
        engine.tokens[TokenState.DROPPED, Reason.LOST] += lost
        window = FeatureWindow.empty(len(self.features))
        window.tokens_by_state[TokenState.DROPPED] = missing
        self._windows.add(window, now)

    # -- reports, to a gateway and from a sidecar

    def _report(self, forward: ReportOutbox, now: float) -> None:
        """Cut a report of what this collector's own engines did since the last one."""
        slots = np.array([self._slots.by_serial[serial] for serial in forward.open_crossed], np.int64)
        features = self._states.features_of(slots)
        for i, slot in enumerate(slots.tolist()):
            tokens = self._slots.accounted[slot].sum(axis=1)
            forward.still_open(self._slots.request(slot), features, i, tokens, now)
        replicas = [
            ReplicaState(boot.hello, boot.streams > 0, boot.last_seen_seconds, _open_requests(boot), boot.counters)
            for boot in (replica.newest for replica in self._replicas.known.values())
            if not boot.hello.forwards
        ]
        engines = [self._engine_totals(key) for key in sorted(self._engines)]
        forward.cut(replicas, engines, [self._model_totals(name) for name in sorted(self._models)], now)

    def _add_deltas(self, report: Report, now: float) -> None:
        window = FeatureWindow.empty(len(self.features))
        for counted in report.engines:
            engine = self._engine((counted.model_name, counted.engine))
            engine.tokens += counted.tokens
            engine.requests.update(dict(zip(Outcome, counted.requests, strict=True)))
            window.tokens_by_state[:] += counted.tokens.sum(axis=(1, 2))
        for delta in report.models:
            model = self._register_model(delta.model_name)
            model.fired_F += delta.fired_F
            model.requests_F += delta.requests_F
            model.exceedances_F += delta.exceedances_F
            model.statistic.counts_FB += delta.statistic_FB
            model.statistic.sum_F += delta.statistic_sum_F
            model.norm.counts_FB += delta.norm_HB
            model.norm.sum_F += delta.norm_sum_H
            window.fired_F[:] += delta.fired_F
            window.exceedances_F[:] += delta.exceedances_F
            np.maximum(window.peak_F, delta.peak_F, out=window.peak_F)
        self._windows.add(window, now)

    def _add_rows(self, hello: Hello, rows: Sequence[RequestRow], now: float) -> None:
        """Take n requests of a report: for look-up, evidence and drift. Their counts came with the deltas."""
        features = features_of(rows, len(self.features))
        summaries = summarise(features, self.table.limit_F, self.bounds.summary_features)
        of_drift: dict[tuple[str, str], list[int]] = {}
        requests = []
        for i, row in enumerate(rows):
            request = self._elsewhere.request(hello, row, self._serial + 1)
            self._serial = max(self._serial, request.serial)
            self._index.named(request.serial, request.request_id)
            requests.append(request)
            if len(row.crossings):
                self._list_exceedances(
                    self._register_model(row.model_name),
                    row.crossings,
                    np.array([request] * len(row.crossings), object),
                )
            if summaries[i].exceeded:
                self._events.settle(request.serial, features.statistic_nF[i])
            latest = ClosedRequest(
                open=request,
                outcome=row.outcome or Outcome.LOST,
                closed_seconds=row.closed_seconds,
                output_tokens=row.output_tokens,
                total_tokens=row.total_tokens,
                tokens=row.tokens,
                features=summaries[i],
            )
            if row.outcome is None:
                beyond = self._elsewhere.keep(hello, latest)
            else:
                self._elsewhere.end(hello, row.number)
                beyond = latest
                if row.opening_seen and was_seen(row):
                    of_drift.setdefault((row.model_name, row.replica), []).append(i)
            if beyond is not None:
                self._index.close(beyond)
            if self._recorder:
                self._recorder.elsewhere(row.crossings, latest, ended=row.outcome is not None)
        for (model_name, _), places in of_drift.items():
            self._register_model(model_name)
            self.drift.add([requests[i] for i in places], features.of(places), now)

    # -- plain values

    def _engine(self, key: tuple[str, str]) -> _Engine:
        return self._engines.setdefault(key, _Engine())

    def _register_model(self, name: str) -> _Model:
        """A model of which something is said: it has series from now on."""
        self.drift.meet(name)
        return self._model(name)

    def _model(self, name: str) -> _Model:
        if name not in self._models:
            F, H = len(self.features), len(self.watchlist.hooks)
            self._models[name] = _Model(
                fired_F=np.zeros(F, np.int64),
                requests_F=np.zeros(F, np.int64),
                exceedances_F=np.zeros(F, np.int64),
                statistic=Histograms.empty(self.table.edges_FB),
                norm=Histograms.empty(np.tile(NORM_EDGES, (H, 1))),
            )
        return self._models[name]

    def _engine_totals(self, key: tuple[str, str]) -> views.EngineTotals:
        engine = self._engines[key]
        boots = (boot for replica in self._replicas.known.values() for boot in replica.boots.values())
        return views.EngineTotals(
            model_name=key[0],
            engine=key[1],
            tokens=engine.tokens.copy(),
            requests={outcome: engine.requests[outcome] for outcome in Outcome},
            open_requests=sum(_open_requests(b) for b in boots if (b.hello.model_name, b.hello.engine) == key),
        )

    def _model_totals(self, name: str) -> views.ModelTotals:
        model = self._models[name]
        return views.ModelTotals(
            model_name=name,
            fired_F=model.fired_F.copy(),
            requests_F=model.requests_F.copy(),
            exceedances_F=model.exceedances_F.copy(),
            statistic=model.statistic.copy(),
            norm=model.norm.copy(),
            latest=dict(model.latest),
        )

    def _exceedance(self, event: Array, request: OpenRequest) -> views.Exceedance:
        feature = self.features[int(event["feature"])]
        peak = float(event["peak"])
        slot = self._slots.by_serial.get(request.serial)
        if slot is not None:
            peak = self._states.statistic(slot, int(event["feature"]))
        return views.Exceedance(
            seconds=float(event["seconds"]),
            request_id=request.request_id,
            response_id=response_id(request.request_id),
            model_name=request.model_name,
            feature=feature.id,
            label=feature.label,
            severity=feature.severity,
            phase="prompt" if event["phase"] == Phase.PROMPT else "output",
            position=int(event["position"]),
            value=float(event["value"]),
            limit=float(self.table.limit_F[int(event["feature"])]),
            # An evicted request leaves no final peak; the crossing is then the most that is known.
            peak=float(event["value"]) if math.isnan(peak) else peak,
            trace_id=trace_id(request.traceparent),
            tail_probability=self.drift.tail_probability(int(event["feature"]), float(event["value"])),
        )

    def _feature_of_request(self, row: tuple[Any, ...]) -> views.FeatureOfRequest:
        index, largest, position, statistic, statistic_position, fired, exceeded = row
        feature = self.features[index]
        return views.FeatureOfRequest(
            feature=feature.id,
            label=feature.label,
            severity=feature.severity,
            units=feature.units,
            max=largest,
            position=position,
            fired_tokens=fired,
            statistic=statistic if statistic_position >= 0 else None,
            statistic_position=statistic_position if statistic_position >= 0 else None,
            limit=feature.limit.value if feature.limit else None,
            exceeded=exceeded,
        )


def _open_requests(boot: Boot) -> int:
    return len(boot.handles) + boot.remote_open_requests


def _replica_view(boot: Boot) -> views.ReplicaView:
    hello = boot.hello
    return views.ReplicaView(
        replica=hello.replica,
        model_name=hello.model_name,
        engine=hello.engine,
        boot_id=hello.boot_id,
        armed=hello.armed,
        not_armed_reason=hello.not_armed_reason,
        not_armed_text=hello.not_armed_text,
        plugin_version=hello.plugin_version,
        engine_version=hello.engine_version,
        connected=boot.streams > 0,
        last_seen_seconds=boot.last_seen_seconds,
        open_requests=_open_requests(boot),
        counters=boot.counters,
    )


def _forwarder_view(boot: Boot) -> views.ForwarderView:
    return views.ForwarderView(
        collector=boot.hello.replica,
        connected=boot.streams > 0,
        last_seen_seconds=boot.last_seen_seconds,
        shed_requests=boot.shed_requests,
        shed_crossings=boot.shed_crossings,
    )


def _model_state(model: _Model) -> State:
    return {name: getattr(model, name).copy() for name in _MODEL_COLUMNS} | {
        "statistic": model.statistic.state(),
        "norm": model.norm.state(),
        "latest": [[feature, *astuple(exemplar)] for feature, exemplar in model.latest.items()],
    }


def _restore_model(model: _Model, state: State) -> None:
    for name in _MODEL_COLUMNS:
        getattr(model, name)[:] = state[name]
    model.statistic.restore(state["statistic"])
    model.norm.restore(state["norm"])
    model.latest.update((feature, views.Exemplar(*exemplar)) for feature, *exemplar in state["latest"])


def _token_counts(segments_S: Array) -> Array:
    """Tokens by state, reason and phase, int64 of TOKEN_SHAPE."""
    key = np.ravel_multi_index((segments_S["state"], segments_S["reason"], segments_S["phase"]), TOKEN_SHAPE)
    counts = np.bincount(key, weights=segments_S["count"], minlength=int(np.prod(TOKEN_SHAPE)))
    return counts.astype(np.int64).reshape(TOKEN_SHAPE)


def _window(view: StepView, segments_S: Array, exceeded_F: Array) -> FeatureWindow:
    tokens = np.bincount(segments_S["state"], weights=segments_S["count"], minlength=len(TokenState) + 1)
    return FeatureWindow(tokens.astype(np.int64), view.fired_F, view.peak_F, exceeded_F)
