"""What is read of a collector's state: numbers for /metrics, exceedances, requests. Nothing here changes it.

Shape legend: n requests, F features.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from latentwatch.aggregate.window import FeatureWindow
from latentwatch.arrays import Array
from latentwatch.client_ids import IdKind, meanings
from latentwatch.collector.drift import Drift
from latentwatch.collector.exceedances import Listed
from latentwatch.collector.federation.outbox import ReportOutbox
from latentwatch.collector.pseudonyms import Pseudonyms
from latentwatch.collector.replicas import Boot
from latentwatch.collector.requests import summarise
from latentwatch.collector.snapshot import (
    Anomaly,
    CollectorTotals,
    ForwarderView,
    LagView,
    ReplicaView,
    RequestView,
    Snapshot,
)
from latentwatch.collector.state import CollectorState, open_requests
from latentwatch.evidence.archive import Wanted
from latentwatch.facts import ExceedanceView, RequestProgress, shown_exceedance, shown_features, shown_request
from latentwatch.names import ModelMatch, Severity


class Lookup:
    """Reads a state. Later batches do not change what was read."""

    def __init__(
        self, state: CollectorState, drift: Drift, outbox: ReportOutbox | None, pseudonyms: Pseudonyms | None
    ) -> None:
        """Args: pseudonyms: under which ids are looked up; whoever calls the sink has replaced them."""
        self._state = state
        self._outbox = outbox
        self._pseudonyms = pseudonyms
        self.drift = drift
        self.watchlist, self.features, self.bounds = state.watchlist, state.features, state.bounds
        self._limits = [feature.limit.value if feature.limit else None for feature in self.features]

    def snapshot(self, now: float) -> Snapshot:
        """Every number that /metrics shows."""
        state = self._state
        newest = {name: state.replicas.known[name].newest for name in sorted(state.replicas.known)}
        return Snapshot(
            now=now,
            engines=state.engine_totals(),
            models=state.model_totals(),
            replicas=tuple(_replica_view(boot) for boot in newest.values() if not boot.hello.forwards),
            forwarders=tuple(_forwarder_view(boot) for boot in newest.values() if boot.hello.forwards),
            forward=self._outbox.view() if self._outbox else None,
            drift=self.drift.views(),
            bounds=state.bounds,
            collector=CollectorTotals(
                messages=state.totals.messages,
                duplicates=state.totals.duplicates,
                lost_sequences=state.totals.lost_sequences,
                streams_refused=dict(state.refused),
                exceedances_evicted=state.exceedances.evicted,
                requests_evicted=state.totals.requests_evicted,
                summaries_evicted=state.index.evicted,
                accounting_excess_tokens=state.totals.excess_tokens,
                ingest_lag=LagView(state.lag.edges, tuple(state.lag.counts), state.lag.sum),
                open_requests=len(state.slots.by_serial),
            ),
        )

    def recent(self, now: float) -> tuple[float, FeatureWindow]:
        """The last windows over all models; see aggregate.window.WindowRing.recent."""
        return self._state.windows.recent(now)

    def model_names(self) -> list[str]:
        """Served model names that are counted, in order."""
        return sorted(self._state.models)

    def exceedances(self, limit: int, wanted: Wanted | None = None) -> list[ExceedanceView]:
        """The latest exceedances of this kind, newest first."""
        if wanted is None:
            found = self._state.exceedances.latest(limit)
        else:
            every = self._state.exceedances.latest(self.bounds.exceedances, lambda rows: self._wanted(rows, wanted))
            of_model = (one for one in every if wanted.model_name in (None, one.request.info.model_name))
            found = itertools.islice(of_model, limit)
        return [self._exceedance(listed) for listed in found]

    def _wanted(self, exceedances: Array, wanted: Wanted) -> Array:
        features = [
            i
            for i, feature in enumerate(self.features)
            if wanted.feature in (None, feature.id) and wanted.severity in (None, feature.severity)
        ]
        seconds = exceedances["seconds"]
        since = -math.inf if wanted.since_seconds is None else wanted.since_seconds
        until = math.inf if wanted.until_seconds is None else wanted.until_seconds
        found: Array = np.isin(exceedances["feature"], features) & (seconds >= since) & (seconds <= until)
        return found

    def anomalies(self, limit: int) -> list[Anomaly]:
        """The same by request: the latest ones, each with everything that is known of it."""
        return [
            Anomaly.of([self._exceedance(listed) for listed in of_request])
            for of_request in self._state.exceedances.of_requests(limit)
        ]

    def requests_over(self, since: float, severity: Severity) -> int:
        """Requests that went above a limit of this severity since then, of the exceedances that are still listed."""
        features = np.flatnonzero([feature.severity is severity for feature in self.features])
        return self._state.exceedances.requests_since(since, features)

    def latest_exceeding(self, model_name: str, feature_id: str) -> str:
        """Request id of the newest exceedance of a feature by a model; empty where none is known, or it was deleted."""
        counts = self._state.models.get(model_name)
        if counts is None:
            return ""
        found = (latest for index, latest in counts.latest.items() if self.features[index].id == feature_id)
        return next((latest.request_id for latest in found), "")

    def latest(self, limit: int) -> list[int]:
        """Numbers for `request`: open requests, newest first, then closed ones, latest end first."""
        state = self._state
        opened = sorted(state.slots.by_serial, reverse=True)[:limit]
        opened += state.remote.latest(limit - len(opened))
        return [*opened, *state.index.latest_closed(limit - len(opened))]

    def find(self, name: str, kind: IdKind | None = None) -> list[int]:
        """Numbers of the requests that have this id, newest first; empty when none is held. Args: kind: None: any."""
        meant = self._pseudonyms.meanings(name) if self._pseudonyms else meanings(name)
        found = self._state.index.find({each: ids for each, ids in meant.items() if kind in (None, each)})
        return sorted(found, reverse=True)

    def request(self, serial: int) -> RequestView | None:
        """One request, by a number that `latest` or `find` gave; None when it was let go since."""
        state = self._state
        known = state.index.closed_request(serial) or state.remote.row(serial)
        if known is not None:
            info, progress, summary = known.request.info, known.progress, known.features
        elif (slot := state.slots.by_serial.get(serial)) is not None:
            info = state.slots.request(slot).info
            progress = RequestProgress(None, 0.0, state.slots.accounted[slot].sum(axis=1))
            features = state.statistics.features_of(np.array([slot]))
            (summary,) = summarise(features, state.table.limit_F, state.bounds.summary_features)
        else:
            return None
        return RequestView(
            **shown_request(info, progress),
            exceeded_features=summary.exceeded,
            features=shown_features(summary, self.features, self._limits),
            features_left_out=summary.left_out,
        )

    def _exceedance(self, listed: Listed) -> ExceedanceView:
        state, exceedance, info = self._state, listed.exceedance, listed.request.info
        slot = state.slots.by_serial.get(listed.request.collector_serial)
        peak = listed.peak if slot is None else state.statistics.statistic(slot, exceedance.feature)
        shown = shown_exceedance(
            exceedance,
            self.features[exceedance.feature],
            float(state.table.limit_F[exceedance.feature]),
            info,
        )
        return ExceedanceView(
            **shown,
            # An evicted request leaves no final peak; the exceedance is then the most that is known.
            peak=exceedance.value if math.isnan(peak) else peak,
            tail_probability=self.drift.tail_probability(exceedance.feature, exceedance.value),
        )


def _replica_view(boot: Boot) -> ReplicaView:
    hello = boot.hello
    return ReplicaView(
        replica=hello.replica,
        model_name=hello.model_name,
        engine=hello.engine,
        boot_id=hello.boot_id,
        armed=hello.armed,
        not_armed_reason=hello.not_armed_reason,
        not_armed_text=hello.not_armed_text,
        plugin_version=hello.plugin_version,
        engine_version=hello.engine_version,
        model_match=hello.model_match or ModelMatch.UNKNOWN,
        model_text=hello.model_text,
        connected=boot.streams > 0,
        last_seen_seconds=boot.last_seen_seconds,
        open_requests=open_requests(boot),
        counters=boot.counters,
        clock_ahead_seconds=boot.clock.seconds,
    )


def _forwarder_view(boot: Boot) -> ForwarderView:
    return ForwarderView(
        collector=boot.hello.replica,
        connected=boot.streams > 0,
        last_seen_seconds=boot.last_seen_seconds,
        shed_requests=boot.shed_requests,
        shed_exceedances=boot.shed_exceedances,
        clock_ahead_seconds=boot.clock.seconds,
    )
