"""What is read of a collector's state: numbers for /metrics, exceedances, requests. Nothing here changes it.

Shape legend: n requests, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from latentwatch.aggregate.window import FeatureWindow
from latentwatch.collector import snapshot as views
from latentwatch.collector.drift import Drift
from latentwatch.collector.federation.outbox import ReportOutbox
from latentwatch.collector.pseudonyms import Pseudonyms
from latentwatch.collector.replicas import Boot
from latentwatch.collector.requests import OpenRequest, summarise
from latentwatch.collector.state import CollectorState, open_requests
from latentwatch.names import Outcome, Phase, TokenState, response_id, trace_id

Array = npt.NDArray[Any]

_OUTCOMES: Final[Mapping[Outcome, Literal["finished", "aborted", "lost"]]] = {
    Outcome.FINISHED: "finished",
    Outcome.ABORTED: "aborted",
    Outcome.LOST: "lost",
}


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

    def snapshot(self, now: float) -> views.Snapshot:
        """Every number that /metrics shows."""
        state = self._state
        newest = {name: state.replicas.known[name].newest for name in sorted(state.replicas.known)}
        return views.Snapshot(
            now=now,
            engines=state.engine_totals(),
            models=state.model_totals(),
            replicas=tuple(_replica_view(boot) for boot in newest.values() if not boot.hello.forwards),
            forwarders=tuple(_forwarder_view(boot) for boot in newest.values() if boot.hello.forwards),
            forward=self._outbox.view() if self._outbox else None,
            drift=self.drift.views(),
            bounds=state.bounds,
            collector=views.CollectorTotals(
                messages=state.totals.messages,
                duplicates=state.totals.duplicates,
                lost_sequences=state.totals.lost_sequences,
                streams_refused=dict(state.refused),
                exceedances_evicted=state.exceedances.evicted,
                requests_evicted=state.totals.requests_evicted,
                summaries_evicted=state.index.evicted,
                accounting_excess_tokens=state.totals.excess_tokens,
                ingest_lag=views.LagView(state.lag.edges, tuple(state.lag.counts), state.lag.sum),
                open_requests=len(state.slots.by_serial),
            ),
        )

    def recent(self, now: float) -> tuple[float, FeatureWindow]:
        """The last windows over all models; see aggregate.window.WindowRing.recent."""
        return self._state.windows.recent(now)

    def exceedances(self, limit: int) -> list[views.Exceedance]:
        """The latest exceedances, newest first."""
        return [self._exceedance(event, request) for event, request in self._state.exceedances.latest(limit)]

    def anomalies(self, limit: int) -> list[views.Anomaly]:
        """The same by request: the latest ones, each with everything that is held of it."""
        return [
            views.Anomaly.of([self._exceedance(event, request) for event, request in events])
            for events in self._state.exceedances.of_requests(limit)
        ]

    def latest(self, limit: int) -> list[int]:
        """Numbers for `request`: open requests, newest first, then closed ones, latest end first."""
        state = self._state
        opened = sorted(state.slots.by_serial, reverse=True)[:limit]
        opened += state.remote.latest(limit - len(opened))
        return [*opened, *state.index.latest_closed(limit - len(opened))]

    def find(self, name: str) -> list[int]:
        """Numbers of the requests with this engine request id or response id, newest first; empty when none is held."""
        names = self._pseudonyms.candidates(name) if self._pseudonyms else (name,)
        return next((list(reversed(found)) for id in names if (found := self._state.index.find(id))), [])

    def request(self, serial: int) -> views.RequestView | None:
        """One request, by a number that `latest` or `find` gave; None when it was let go since."""
        state = self._state
        going = state.remote.row(serial)
        closed = state.index.closed_request(serial) or going
        if closed is None:
            slot = state.slots.by_serial.get(serial)
            if slot is None:
                return None
            request, tokens = state.slots.request(slot), state.slots.accounted[slot].sum(axis=1)
            features = state.statistics.features_of(np.array([slot]))
            (summary,) = summarise(features, state.table.limit_F, state.bounds.summary_features)
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
            tokens={token_state.name.lower(): int(tokens[token_state]) for token_state in TokenState},
            exceeded_features=summary.exceeded,
            features=tuple(self._feature_of_request(row) for row in summary.rows.tolist()),
            features_left_out=summary.left_out,
        )

    def _exceedance(self, event: Array, request: OpenRequest) -> views.Exceedance:
        state, index = self._state, int(event["feature"])
        feature = self.features[index]
        peak = float(event["peak"])
        slot = state.slots.by_serial.get(request.serial)
        if slot is not None:
            peak = state.statistics.statistic(slot, index)
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
            limit=float(state.table.limit_F[index]),
            # An evicted request leaves no final peak; the crossing is then the most that is known.
            peak=float(event["value"]) if math.isnan(peak) else peak,
            trace_id=trace_id(request.traceparent),
            tail_probability=self.drift.tail_probability(index, float(event["value"])),
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
        open_requests=open_requests(boot),
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
