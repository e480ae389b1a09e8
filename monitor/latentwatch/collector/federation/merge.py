"""The gateway's half of reports: what a sidecar counted is added, and its requests can be looked up here.

Shape legend: n requests, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from latentwatch.aggregate.histogram import NORM_EDGES, Histograms
from latentwatch.aggregate.requests import slices
from latentwatch.aggregate.window import FeatureWindow
from latentwatch.arrays import Array
from latentwatch.collector.name_places import NamePlaces
from latentwatch.collector.remote_requests import features_of
from latentwatch.collector.replicas import Boot, Room
from latentwatch.collector.requests import RequestSummary, summarise
from latentwatch.collector.state import CollectorState, ModelCounts
from latentwatch.collector.step_listener import RemoteRows, StepListener
from latentwatch.facts import FeatureSummary, is_whole
from latentwatch.names import Outcome
from latentwatch.transport import report as reports
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import ModelDelta, Report, RequestRow


class ReportMerge:
    """Merges reports into a state."""

    def __init__(self, state: CollectorState, listeners: Sequence[StepListener], places: NamePlaces) -> None:
        self._state = state
        self._listeners = listeners
        self._places = places

    def check(self, forwarder: Hello, report: Report, now: float) -> Room:
        """Refuse a report that does not fit, before it changes anything; what has to make room for it.

        Raises StreamRefused, as Ingest.merge says.
        """
        state = self._state
        reports.validate(
            report,
            features=len(state.features),
            hook_points=len(state.watchlist.hooks),
            statistic_buckets=state.table.edges_FB.shape[1] + 1,
            norm_buckets=len(NORM_EDGES) + 1,
        )
        return state.replicas.check_report(forwarder, report, now, functools.partial(self._places.in_use, now))

    def merge_replicas(self, forwarder: Hello, boot: Boot, report: Report, room: Room, now: float) -> list[Boot]:
        """Take what a checked report says of engines. Args: boot: the forwarder's.

        Returns the boots of engines that it shows to be over, or that make room for it.
        """
        boot.shed_requests, boot.shed_exceedances = report.shed_requests, report.shed_exceedances
        return self._state.replicas.merge_report(forwarder, report, room, now)

    def merge_counts(self, forwarder: Hello, report: Report, now: float) -> None:
        """Take what a checked report counted."""
        self._add_deltas(report, now)
        for some in slices(len(report.requests), len(self._state.features)):
            self._add_rows(forwarder, report.requests[some], now)

    def _add_deltas(self, report: Report, now: float) -> None:
        state, window = self._state, FeatureWindow.empty(len(self._state.features))
        for counted in report.engines:
            engine = state.engine((counted.model_name, counted.engine))
            engine.tokens += counted.tokens
            engine.requests.update(dict(zip(Outcome, counted.requests, strict=True)))
            window.tokens_by_state[:] += counted.tokens.sum(axis=(1, 2))
        for delta in report.models:
            _add(self._register_model(delta.model_name), delta)
            window = window.merge(
                FeatureWindow(np.zeros_like(window.tokens_by_state), delta.fired_F, delta.peak_F, delta.exceedances_F)
            )
        state.windows.add(window, now)

    def _add_rows(self, forwarder: Hello, rows: Sequence[RequestRow], now: float) -> None:
        """Take n requests of a report: for look-up, evidence and drift. Their counts came with the deltas."""
        state = self._state
        features = features_of(rows, len(state.features))
        summaries = summarise(features, state.table.limit_F, state.bounds.summary_features)
        requests = [
            self._add_row(forwarder, row, summaries[i], features.statistic_nF[i], now) for i, row in enumerate(rows)
        ]
        whole = [i for i, row in enumerate(rows) if is_whole(row.info, row.progress)]
        self._tell(RemoteRows(rows, requests, features, whole, now))

    def _add_row(
        self, forwarder: Hello, row: RequestRow, features: FeatureSummary, statistic_F: Array, now: float
    ) -> RequestSummary:
        state = self._state
        request = state.remote.request(forwarder, row, state.last_serial + 1)
        serial = request.collector_serial
        state.last_serial = max(state.last_serial, serial)
        state.index.add(request)
        model = self._register_model(row.info.model_name)
        if len(row.exceedances):
            state.list_exceedances(model, row.exceedances, np.array([request] * len(row.exceedances), object))
        if features.exceeded:
            state.exceedances.settle(serial, statistic_F)
        latest = RequestSummary(request, row.progress, features)
        beyond: RequestSummary | None = latest
        if row.progress.outcome is None:
            beyond = state.remote.update(forwarder, row.number, latest, now)
        else:
            state.remote.end(forwarder, row.number)
        if beyond is not None:
            state.index.close(beyond)
        return latest

    def _register_model(self, name: str) -> ModelCounts:
        """A model of which something is said: it has series from now on."""
        for listener in self._listeners:
            listener.model_seen(name)
        return self._state.model(name)

    def _tell(self, remote: RemoteRows) -> None:
        for listener in self._listeners:
            listener.remote(remote)


def _add(model: ModelCounts, delta: ModelDelta) -> None:
    model.fired_F += delta.fired_F
    model.requests_F += delta.requests_F
    model.exceedances_F += delta.exceedances_F
    statistic, norm = model.statistic, model.norm
    model.statistic = statistic.merge(Histograms(statistic.edges_FB, delta.statistic_FB, delta.statistic_sum_F))
    model.norm = norm.merge(Histograms(norm.edges_FB, delta.norm_HB, delta.norm_sum_H))
