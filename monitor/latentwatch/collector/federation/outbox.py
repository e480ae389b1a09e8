"""The sidecar's half of forwarding: what a gateway is told, cut into numbered reports that wait for its ack.

Shape legend: F features, H hook points, B+1 buckets.

What it promises:
- the reports' counts add up to what this collector counted, whatever the gateway does: while it is away no report is
  cut, and the next one is the difference to the last that was;
- a report that was cut is not changed, but for ids that are to be forgotten, so that its number stands for the same
  counts until it is acknowledged;
- memory is bounded by `Bounds`: beyond it rows of requests are given up and counted, those without an exceedance first.

No I/O, no clock, no thread: it is told what happens, so that a journal makes the same reports again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from latentwatch.aggregate.requests import RequestFeatures, slices
from latentwatch.arrays import Array, axes, check
from latentwatch.collector.requests import TrackedRequest
from latentwatch.collector.served_names import Names
from latentwatch.collector.state import CollectorState, EngineCountsState, ModelCounts, open_requests
from latentwatch.collector.step_listener import Ends, Eviction, Step, StepListener
from latentwatch.collector.totals import EngineTotals, ForwardView, ModelTotals
from latentwatch.errors import StreamRefused
from latentwatch.facts import EXCEEDANCE, FEATURE_STAT, RequestProgress
from latentwatch.names import Outcome
from latentwatch.transport import codec
from latentwatch.transport.report import TOKEN_SHAPE, EngineDelta, ModelDelta, ReplicaState, Report, RequestRow
from latentwatch.transport.sink import ReceivedReport

_WINDOW: Final = 8
"""Reports that wait for their ack before another one is cut: eight seconds, and the most memory that they take."""
_ROWS_BYTES: Final = 1 << 20
_COUNTS_BYTES: Final = 1 << 20
"""Of rows and of counts in one report. One model's counts may lie beyond: up to 16,000 features a message has room."""
_ROW_BYTES: Final = 900
"""A RequestRow beside its arrays, about."""


@dataclass(frozen=True)
class ReportState:
    """A report that waits for its ack."""

    number: int
    message: Array = field(metadata=axes("bytes", dtype=np.uint8))
    """As it is sent."""


@dataclass(frozen=True)
class UntoldState:
    """Exceedances of an open request that no row told of yet."""

    serial: int
    exceedances: Array = field(metadata=axes("n", dtype=EXCEEDANCE))


@dataclass(frozen=True)
class PeaksState:
    """The largest values of a model's features since the last report."""

    model_name: str
    peak_F: Array = field(metadata=axes("F", dtype=np.float32))


@dataclass(frozen=True)
class ToldState:
    """Counts as the last report told them."""

    peaks: list[PeaksState]
    engines: list[EngineCountsState]
    models: dict[str, ModelCounts]


@dataclass(frozen=True)
class OutboxState:
    """Everything that a ReportOutbox remembers."""

    boot_id: str
    number: int
    acknowledged: int
    shed_requests: int
    shed_exceedances: int
    reports: list[ReportState]
    rows: Array = field(metadata=axes("bytes", dtype=np.uint8))
    """Those that are in no report yet, as the message of one."""
    untold: list[UntoldState]
    told: ToldState


class ReportOutbox(StepListener):
    """Reports of one collector: it listens to what happens; whoever carries the reports reads `reports`."""

    def __init__(self, boot_id: str, state: CollectorState) -> None:
        """
        Args: boot_id: 32 hex digits, new for each life of the collector's state.   state: what is reported of.
        """
        self.boot_id = boot_id
        self.reports: deque[tuple[int, Report]] = deque()
        """Number and report, those without an ack, oldest first."""
        self._state = state
        self._number = self._acknowledged = 0
        self._plain: deque[RequestRow] = deque()
        self._flagged: deque[RequestRow] = deque()
        self._rows_bytes = 0
        self._untold: dict[int, tuple[TrackedRequest, list[Array]]] = {}
        """By serial, the open requests that exceeded a limit since their last row, with EXCEEDANCE."""
        self._untold_count = 0
        self._shed_requests = self._shed_exceedances = 0
        self._told = _Told(len(state.features))

    # -- what happens

    def names_gone(self, names: Names) -> None:
        """See StepListener."""
        self._told.let_go(names)

    def owed_models(self) -> set[str]:
        """See StepListener. What was counted since the last report goes into the next."""
        return self._told.owed(self._state)

    def step(self, step: Step) -> None:
        """See StepListener."""
        self._told.peak(step.model_name, step.view.peak_F)
        for i, slot in enumerate(step.exceeding_slots.tolist()):
            if self._untold_count >= self._state.bounds.exceedances:
                self._shed_exceedances += 1
                continue
            request = step.requests_K[slot]
            untold = self._untold.setdefault(request.collector_serial, (request, []))
            untold[1].append(step.exceedances[i : i + 1])
            self._untold_count += 1

    def ended(self, ends: Ends) -> None:
        """See StepListener."""
        for place, summary in enumerate(ends.requests):
            self._add(self._row(summary.request, summary.progress, ends.features, place))

    def evicted(self, eviction: Eviction) -> None:
        """See StepListener."""
        self._shed_exceedances += len(self._pop_untold(eviction.request))

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """Let go of the rows of requests with these ids. Reports that were cut keep them without ids."""
        for rows in (self._flagged, self._plain):
            kept = [row for row in rows if not is_gone(row.info.request_id)]
            self._shed_requests += len(rows) - len(kept)
            rows.clear()
            rows.extend(kept)
        self._rows_bytes = sum(map(_cost, (*self._flagged, *self._plain)))
        for i, (number, report) in enumerate(self.reports):
            if any(is_gone(row.info.request_id) for row in report.requests):
                rows_without = tuple(
                    replace(row, info=replace(row.info, request_id="", response_id="", traceparent=""))
                    if is_gone(row.info.request_id)
                    else row
                    for row in report.requests
                )
                self.reports[i] = (number, replace(report, requests=rows_without))

    # -- reports

    def tick(self, now: float) -> None:
        """Cut a report of what this collector's own engines did since the last one, and more of them while rows are
        left over; none while too many wait for their ack."""
        if not self._due:
            return
        state = self._state
        self._add_open(now)
        replicas = tuple(
            ReplicaState(boot.hello, boot.streams > 0, boot.last_seen_seconds, open_requests(boot), boot.counters)
            for boot in (replica.newest for replica in state.replicas.known.values())
            if not boot.hello.forwards
        )
        engines = tuple(self._told.engine_deltas(state.engine_totals()))
        parts = list(self._told.model_deltas(state.model_totals())) or [()]
        more = True
        while more:
            report = Report(
                time_unix_nano=int(now * 1e9),
                replicas=replicas,
                engines=engines,
                models=parts.pop(0) if parts else (),
                requests=self._some_rows(),
                shed_requests=self._shed_requests,
                shed_exceedances=self._shed_exceedances,
            )
            self._number += 1
            self.reports.append((self._number, report))
            engines = ()
            # Counts cannot wait: the next difference is to what they were.
            more = bool(parts) or (self._due and bool(self._flagged or self._plain))

    def acknowledged(self, number: int) -> None:
        """The gateway holds every report up to this one.

        A gateway that holds more than was cut knows reports that this host lost with its power; theirs are the numbers
        up to there, and the next report gets the one behind them.
        """
        while self.reports and self.reports[0][0] <= number:
            self.reports.popleft()
        self._number = max(self._number, number)
        self._acknowledged = max(self._acknowledged, number)

    def view(self) -> ForwardView:
        """How it goes."""
        return ForwardView(
            cut=self._number,
            acknowledged=self._acknowledged,
            waiting_reports=len(self.reports),
            waiting_rows=len(self._flagged) + len(self._plain),
            waiting_bytes=self._rows_bytes,
            capacity_bytes=self._state.bounds.forward_bytes,
            oldest_seconds=self.reports[0][1].time_unix_nano / 1e9 if self.reports else 0.0,
            shed_requests=self._shed_requests,
            shed_exceedances=self._shed_exceedances,
        )

    # -- the state

    def state(self) -> OutboxState:
        """Everything; copies."""
        return OutboxState(
            boot_id=self.boot_id,
            number=self._number,
            acknowledged=self._acknowledged,
            shed_requests=self._shed_requests,
            shed_exceedances=self._shed_exceedances,
            reports=[ReportState(number, _bytes(number, report)) for number, report in self.reports],
            rows=_bytes(1, Report(0, requests=(*self._flagged, *self._plain))),
            untold=[UntoldState(serial, np.concatenate(some)) for serial, (_, some) in self._untold.items()],
            told=self._told.state(),
        )

    def restore(self, state: OutboxState) -> None:
        """Go on from `state`, beside a collector's state that was restored before.

        Raises ValueError where it does not fit together.
        """
        self.boot_id, self._number, self._acknowledged = state.boot_id, state.number, state.acknowledged
        self._shed_requests, self._shed_exceedances = state.shed_requests, state.shed_exceedances
        self.reports.extend((report.number, _report(report.message)) for report in state.reports)
        for row in _report(state.rows).requests:
            self._append(row)
        slots = self._state.slots
        for untold in state.untold:
            count = len(untold.exceedances)
            if untold.serial not in slots.by_serial:
                # It ended while this collector ran without a gateway.
                self._shed_exceedances += count
                continue
            request = slots.request(slots.by_serial[untold.serial])
            self._untold[untold.serial] = (request, [untold.exceedances[i : i + 1] for i in range(count)])
            self._untold_count += count
        self._told.restore(state.told, self._state)

    # -- inside

    @property
    def _due(self) -> bool:
        """Whether another report may be cut."""
        return len(self.reports) < _WINDOW

    def _add_open(self, now: float) -> None:
        """A row of each open request that exceeded a limit since its last one."""
        state = self._state
        slots = np.array([state.slots.by_serial[serial] for serial in self._untold], np.int64)
        for some in slices(len(slots), len(state.features)):
            features = state.statistics.features_of(slots[some])
            for place, slot in enumerate(slots[some].tolist()):
                progress = RequestProgress(None, now, state.slots.accounted[slot].sum(axis=1))
                self._add(self._row(state.slots.request(slot), progress, features, place))

    def _pop_untold(self, request: TrackedRequest) -> Array:
        """The exceedances of a request that no row told of yet."""
        _, untold = self._untold.pop(request.collector_serial, (request, []))
        self._untold_count -= len(untold)
        return np.concatenate(untold) if untold else np.empty(0, EXCEEDANCE)

    def _row(
        self, request: TrackedRequest, progress: RequestProgress, features: RequestFeatures, place: int
    ) -> RequestRow:
        """Args: features: of several requests, this one at `place`."""
        seen = np.flatnonzero(features.max_position_nF[place] >= 0)
        rows = np.empty(len(seen), FEATURE_STAT)
        rows["index"] = seen
        for name, column_nF in features.columns().items():
            rows[name] = column_nF[place, seen]
        return RequestRow(request.collector_serial, request.info, progress, rows, self._pop_untold(request))

    def _add(self, row: RequestRow) -> None:
        self._append(row)
        while self._rows_bytes > self._state.bounds.forward_bytes:
            given_up = (self._plain or self._flagged).popleft()
            self._rows_bytes -= _cost(given_up)
            self._shed_requests += 1
            self._shed_exceedances += len(given_up.exceedances)

    def _append(self, row: RequestRow) -> None:
        (self._flagged if row.features["exceeded"].any() else self._plain).append(row)
        self._rows_bytes += _cost(row)

    def _some_rows(self) -> tuple[RequestRow, ...]:
        taken: list[RequestRow] = []
        size = 0
        for rows in (self._flagged, self._plain):
            while rows and (not taken or size + _cost(rows[0]) <= _ROWS_BYTES):
                size += _cost(rows[0])
                taken.append(rows.popleft())
        self._rows_bytes -= size
        return tuple(taken)


@dataclass
class _Told:
    """What the reports that were cut say of counts, so that the next one is the difference."""

    features: int
    peaks: dict[str, Array] = field(default_factory=dict)
    """Of each model, the largest values of its features since the last report."""
    engines: dict[tuple[str, str], EngineTotals] = field(default_factory=dict)
    models: dict[str, ModelTotals] = field(default_factory=dict)

    def peak(self, model_name: str, peak_F: Array) -> None:
        """A step of this model had these largest values."""
        before = self.peaks.get(model_name)
        self.peaks[model_name] = peak_F if before is None else np.maximum(before, peak_F)

    def let_go(self, names: Names) -> None:
        """They begin at zero when they come again."""
        for engine in names.engines:
            self.engines.pop(engine, None)
        for model_name in names.models:
            self.models.pop(model_name, None)
            self.peaks.pop(model_name, None)

    def owed(self, collector: CollectorState) -> set[str]:
        """Model names of which more is counted than was told."""
        models = {totals.model_name for totals in collector.model_totals() if self._differs(totals)}
        for totals in collector.engine_totals():
            told = self.engines.get((totals.model_name, totals.engine))
            if told is None or (totals.tokens != told.tokens).any() or totals.requests != told.requests:
                models.add(totals.model_name)
        return models

    def _differs(self, totals: ModelTotals) -> bool:
        told = self.models.get(totals.model_name)
        if told is None:
            return True
        now, then = _columns(totals), _columns(told)
        return any((now[name] != then[name]).any() for name in now)

    def engine_deltas(self, engines: Sequence[EngineTotals]) -> Iterable[EngineDelta]:
        """What changed."""
        for totals in engines:
            key = totals.model_name, totals.engine
            before = self.engines.get(key)
            self.engines[key] = totals
            tokens = totals.tokens - (before.tokens if before else np.zeros(TOKEN_SHAPE, np.int64))
            ended = tuple(totals.requests[o] - (before.requests[o] if before else 0) for o in Outcome)
            if before is None or tokens.any() or any(ended):
                yield EngineDelta(*key, tokens, ended)

    def model_deltas(self, models: Sequence[ModelTotals]) -> Iterable[tuple[ModelDelta, ...]]:
        """What changed, in parts that each fit into a report."""
        part: list[ModelDelta] = []
        size = 0
        for totals in models:
            before = self.models.get(totals.model_name)
            self.models[totals.model_name] = totals
            now, then = _columns(totals), _columns(before) if before else None
            changed = {name: column - then[name] if then else column for name, column in now.items()}
            if before is not None and not any(column.any() for column in changed.values()):
                continue
            peak_F = self.peaks.pop(totals.model_name, np.full(self.features, -np.inf, np.float32))
            part.append(ModelDelta(model_name=totals.model_name, peak_F=peak_F, **changed))
            # At most: a count takes no more than its eight bytes here, and most are 0 and take one.
            size += sum(column.nbytes for column in changed.values())
            if size > _COUNTS_BYTES:
                yield tuple(part)
                part, size = [], 0
        if part:
            yield tuple(part)

    def state(self) -> ToldState:
        """Everything; what was told is not changed again."""
        return ToldState(
            peaks=[PeaksState(name, peak_F) for name, peak_F in self.peaks.items()],
            engines=[
                EngineCountsState(*key, totals.tokens, [totals.requests[outcome] for outcome in Outcome])
                for key, totals in self.engines.items()
            ],
            models={
                name: ModelCounts(t.fired_F, t.requests_F, t.exceedances_F, t.statistic, t.norm)
                for name, t in self.models.items()
            },
        )

    def restore(self, state: ToldState, collector: CollectorState) -> None:
        """Go on from `state` beside the collector's. Raises ValueError where it is of other features."""
        for peaks in state.peaks:
            check(peaks, F=len(collector.features))
            self.peaks[peaks.model_name] = peaks.peak_F
        for of_engine in state.engines:
            of_engine.check()
            counts = dict(zip(Outcome, of_engine.requests, strict=True))
            key = of_engine.model_name, of_engine.engine
            self.engines[key] = EngineTotals(*key, of_engine.tokens, counts, 0)
        for name, counted in state.models.items():
            told = collector.new_model()
            told.restore(counted)
            self.models[name] = told.totals(name)


def _columns(totals: ModelTotals) -> dict[str, Array]:
    return {
        "fired_F": totals.fired_F,
        "requests_F": totals.requests_F,
        "exceedances_F": totals.exceedances_F,
        "statistic_FB": totals.statistic.counts_FB,
        "statistic_sum_F": totals.statistic.sum_F,
        "norm_HB": totals.norm.counts_FB,
        "norm_sum_H": totals.norm.sum_F,
    }


def _cost(row: RequestRow) -> int:
    return _ROW_BYTES + row.features.nbytes + row.exceedances.nbytes


def _bytes(number: int, report: Report) -> Array:
    return np.frombuffer(codec.encode_report(number, report), np.uint8)


def _report(data: Array) -> Report:
    try:
        received = codec.decode_request(data.tobytes())
    except StreamRefused as error:
        raise ValueError(f"a report in it cannot be read: {error}") from error
    if not isinstance(received, ReceivedReport):
        raise ValueError("it has something else where a report was stored")
    return received.report
