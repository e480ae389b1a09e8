"""The sidecar's half of forwarding: what a gateway is told, cut into numbered reports that wait for its ack.

Shape legend: F features, H hook points, B+1 buckets.

What it promises:
- the reports' counts add up to what this collector counted, whatever the gateway does: while it is away no report is
  cut, and the next one is the difference to the last that was;
- a report that was cut is not changed, but for ids that are to be forgotten, so that its number stands for the same
  counts until it is acknowledged;
- memory is bounded by `Bounds`: beyond it rows of requests are given up and counted, those without an exceedance first.

No I/O, no clock, no thread: the pipeline calls it, so that a journal makes the same reports again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from latentwatch.aggregate.requests import RequestFeatures
from latentwatch.collector.config import Bounds
from latentwatch.collector.durability.checkpoint import State
from latentwatch.collector.requests import ClosedRequest, OpenRequest
from latentwatch.collector.snapshot import EngineTotals, ForwardView, ModelTotals
from latentwatch.names import Outcome
from latentwatch.step.batch import CROSSED_DTYPE, FEATURE_DTYPE
from latentwatch.transport import codec
from latentwatch.transport.report import TOKEN_SHAPE, EngineDelta, ModelDelta, ReplicaState, Report, RequestRow
from latentwatch.transport.sink import ReceivedReport

Array = npt.NDArray[Any]

_WINDOW: Final = 8
"""Reports that wait for their ack before another one is cut: eight seconds, and the most memory that they take."""
_ROWS_BYTES: Final = 1 << 20
_COUNTS_BYTES: Final = 1 << 20
"""Of rows and of counts in one report. One model's counts may lie beyond: up to 16,000 features a message has room."""
_ROW_BYTES: Final = 900
"""A RequestRow beside its arrays, about."""


class ReportOutbox:
    """Reports of one collector. The pipeline tells it what happens; whoever carries the reports reads `reports`."""

    def __init__(self, boot_id: str, features: int, bounds: Bounds) -> None:
        """
        Args: boot_id: 32 hex digits, new for each life of the collector's state.
        """
        self.boot_id = boot_id
        self.reports: deque[tuple[int, Report]] = deque()
        """Number and report, those without an ack, oldest first."""
        self._bounds = bounds
        self._number = self._held = 0
        self._plain: deque[RequestRow] = deque()
        self._flagged: deque[RequestRow] = deque()
        self._rows_bytes = 0
        self._crossed: dict[int, tuple[OpenRequest, list[Array]]] = {}
        self._crossings = 0
        self._shed_requests = self._shed_crossings = 0
        self._peaks: dict[str, Array] = {}
        self._no_peak = np.full(features, -np.inf, np.float32)
        self._engines: dict[tuple[str, str], EngineTotals] = {}
        self._models: dict[str, ModelTotals] = {}

    # -- what happens

    def peak(self, model_name: str, peak_F: Array) -> None:
        """A step of this model had these largest values."""
        held = self._peaks.get(model_name)
        self._peaks[model_name] = peak_F if held is None else np.maximum(held, peak_F)

    def crossed(self, events: Array, requests: Iterable[OpenRequest]) -> None:
        """Requests went above limits. Args: events: CROSSED_DTYPE, one for each request."""
        for i, request in enumerate(requests):
            if self._crossings >= self._bounds.exceedances:
                self._shed_crossings += 1
                continue
            self._crossed.setdefault(request.serial, (request, []))[1].append(events[i : i + 1])
            self._crossings += 1

    def ended(self, closed: ClosedRequest, features: RequestFeatures, place: int) -> None:
        """A request ended. Args: features: of several requests, this one at `place`."""
        self._keep(
            _row(closed.open, features, place, closed.tokens, closed, closed.closed_seconds, self._take(closed.open))
        )

    def evicted(self, request: OpenRequest) -> None:
        """A running request was let go: nothing more will be known of it."""
        self._shed_crossings += len(self._take(request))

    @property
    def open_crossed(self) -> list[int]:
        """Serial numbers of the open requests that crossed a limit since their last row; `still_open` takes them."""
        return list(self._crossed)

    def still_open(
        self, request: OpenRequest, features: RequestFeatures, place: int, tokens: Array, now: float
    ) -> None:
        """A request that crossed a limit goes on."""
        self._keep(_row(request, features, place, tokens, None, now, self._take(request)))

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """Let go of the rows of requests with these ids. Reports that were cut keep them without ids."""
        for rows in (self._flagged, self._plain):
            kept = [row for row in rows if not is_gone(row.request_id)]
            self._shed_requests += len(rows) - len(kept)
            rows.clear()
            rows.extend(kept)
        self._rows_bytes = sum(map(_cost, (*self._flagged, *self._plain)))
        for i, (number, report) in enumerate(self.reports):
            if any(is_gone(row.request_id) for row in report.requests):
                rows_without = tuple(
                    replace(row, request_id="", traceparent="") if is_gone(row.request_id) else row
                    for row in report.requests
                )
                self.reports[i] = (number, replace(report, requests=rows_without))

    # -- reports

    @property
    def due(self) -> bool:
        """Whether another report may be cut."""
        return len(self.reports) < _WINDOW

    def cut(
        self,
        replicas: Sequence[ReplicaState],
        engines: Sequence[EngineTotals],
        models: Sequence[ModelTotals],
        now: float,
    ) -> None:
        """Cut a report of everything since the last one, and more of them while rows are left over."""
        engine_deltas, parts = tuple(self._engine_deltas(engines)), list(self._model_deltas(models)) or [()]
        more = True
        while more:
            report = Report(
                time_unix_nano=int(now * 1e9),
                replicas=tuple(replicas),
                engines=engine_deltas,
                models=parts.pop(0) if parts else (),
                requests=self._some_rows(),
                shed_requests=self._shed_requests,
                shed_crossings=self._shed_crossings,
            )
            self._number += 1
            self.reports.append((self._number, report))
            engine_deltas = ()
            # Counts cannot wait: the next difference is to what they were.
            more = bool(parts) or (self.due and bool(self._flagged or self._plain))

    def acknowledged(self, number: int) -> None:
        """The gateway holds every report up to this one.

        A gateway that holds more than was cut knows reports that this host lost with its power; theirs are the numbers
        up to there, and the next report gets the one behind them.
        """
        while self.reports and self.reports[0][0] <= number:
            self.reports.popleft()
        self._number = max(self._number, number)
        self._held = max(self._held, number)

    def facts(self) -> ForwardView:
        """How it goes."""
        return ForwardView(
            cut=self._number,
            held=self._held,
            waiting_reports=len(self.reports),
            waiting_rows=len(self._flagged) + len(self._plain),
            waiting_bytes=self._rows_bytes,
            capacity_bytes=self._bounds.forward_bytes,
            oldest_seconds=self.reports[0][1].time_unix_nano / 1e9 if self.reports else 0.0,
            shed_requests=self._shed_requests,
            shed_crossings=self._shed_crossings,
        )

    # -- the state

    def state(self) -> State:
        """Everything, for `restore`; copies."""
        return {
            "boot_id": self.boot_id,
            "number": self._number,
            "held": self._held,
            "shed": [self._shed_requests, self._shed_crossings],
            "reports": [[number, _bytes(number, report)] for number, report in self.reports],
            "rows": _bytes(1, Report(0, requests=(*self._flagged, *self._plain))),
            "crossed": [[serial, np.concatenate(events)] for serial, (_, events) in self._crossed.items()],
            "peaks": dict(self._peaks),
            "engines": [
                [*key, totals.tokens, [totals.requests[o] for o in Outcome]] for key, totals in self._engines.items()
            ],
            "models": {name: _columns(totals) for name, totals in self._models.items()},
        }

    def restore(self, state: State, requests: dict[int, OpenRequest], models: dict[str, ModelTotals]) -> None:
        """Go on from `state`. Args: requests: those open, by serial. models: totals of every model, of any counts."""
        self.boot_id, self._number, self._held = state["boot_id"], state["number"], state["held"]
        self._shed_requests, self._shed_crossings = state["shed"]
        self.reports.extend((number, _report(data)) for number, data in state["reports"])
        for row in _report(state["rows"]).requests:
            self._append(row)
        for serial, events in state["crossed"]:
            if serial not in requests:
                # It ended while this collector ran without a gateway.
                self._shed_crossings += len(events)
                continue
            self._crossed[serial] = (requests[serial], [events[i : i + 1] for i in range(len(events))])
            self._crossings += len(events)
        self._peaks.update(state["peaks"])
        for model_name, engine, tokens, ended in state["engines"]:
            counts = dict(zip(Outcome, ended, strict=True))
            self._engines[model_name, engine] = EngineTotals(model_name, engine, tokens, counts, 0)
        for name, columns in state["models"].items():
            self._models[name] = _with_columns(models[name], columns)

    # -- inside

    def _take(self, request: OpenRequest) -> Array:
        """The crossings of a request that no row told of yet."""
        _, events = self._crossed.pop(request.serial, (request, []))
        self._crossings -= len(events)
        return np.concatenate(events) if events else np.empty(0, CROSSED_DTYPE)

    def _keep(self, row: RequestRow) -> None:
        self._append(row)
        while self._rows_bytes > self._bounds.forward_bytes:
            given_up = (self._plain or self._flagged).popleft()
            self._rows_bytes -= _cost(given_up)
            self._shed_requests += 1
            self._shed_crossings += len(given_up.crossings)

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

    def _engine_deltas(self, engines: Sequence[EngineTotals]) -> Iterable[EngineDelta]:
        for totals in engines:
            key = totals.model_name, totals.engine
            before = self._engines.get(key)
            self._engines[key] = totals
            tokens = totals.tokens - (before.tokens if before else np.zeros(TOKEN_SHAPE, np.int64))
            ended = tuple(totals.requests[o] - (before.requests[o] if before else 0) for o in Outcome)
            if before is None or tokens.any() or any(ended):
                yield EngineDelta(*key, tokens, ended)

    def _model_deltas(self, models: Sequence[ModelTotals]) -> Iterable[tuple[ModelDelta, ...]]:
        """What changed, in parts that each fit into a report."""
        part: list[ModelDelta] = []
        size = 0
        for totals in models:
            before = self._models.get(totals.model_name)
            self._models[totals.model_name] = totals
            now, then = _columns(totals), _columns(before) if before else None
            changed = {name: column - then[name] if then else column for name, column in now.items()}
            if before is not None and not any(column.any() for column in changed.values()):
                continue
            peak_F = self._peaks.pop(totals.model_name, self._no_peak)
            part.append(ModelDelta(model_name=totals.model_name, peak_F=peak_F, **changed))
            # At most: a count takes no more than its eight bytes here, and most are 0 and take one.
            size += sum(column.nbytes for column in changed.values())
            if size > _COUNTS_BYTES:
                yield tuple(part)
                part, size = [], 0
        if part:
            yield tuple(part)


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


def _with_columns(totals: ModelTotals, columns: dict[str, Array]) -> ModelTotals:
    return replace(
        totals,
        fired_F=columns["fired_F"],
        requests_F=columns["requests_F"],
        exceedances_F=columns["exceedances_F"],
        statistic=replace(totals.statistic, counts_FB=columns["statistic_FB"], sum_F=columns["statistic_sum_F"]),
        norm=replace(totals.norm, counts_FB=columns["norm_HB"], sum_F=columns["norm_sum_H"]),
    )


def _row(
    request: OpenRequest,
    features: RequestFeatures,
    place: int,
    tokens: Array,
    closed: ClosedRequest | None,
    seconds: float,
    crossings: Array,
) -> RequestRow:
    seen = np.flatnonzero(features.max_position_nF[place] >= 0)
    rows = np.empty(len(seen), FEATURE_DTYPE)
    rows["index"] = seen
    for name, column_nF in features.columns().items():
        rows[name] = column_nF[place, seen]
    return RequestRow(
        number=request.serial,
        replica=request.replica,
        model_name=request.model_name,
        engine=request.engine,
        request_id=request.request_id,
        adapter=request.adapter,
        traceparent=request.traceparent,
        opened_seconds=request.opened_seconds,
        opening_seen=request.opening_seen,
        outcome=closed.outcome if closed else None,
        closed_seconds=seconds,
        prompt_tokens=request.prompt_tokens,
        output_tokens=closed.output_tokens if closed else None,
        total_tokens=closed.total_tokens if closed else None,
        tokens=tokens,
        features=rows,
        crossings=crossings,
    )


def _cost(row: RequestRow) -> int:
    return _ROW_BYTES + row.features.nbytes + row.crossings.nbytes


def _bytes(number: int, report: Report) -> Array:
    return np.frombuffer(codec.encode_report(number, report), np.uint8)


def _report(data: Array) -> Report:
    received = codec.decode_request(data.tobytes())
    if not isinstance(received, ReceivedReport):
        raise ValueError("a state holds something else where a report was kept")
    return received.report
