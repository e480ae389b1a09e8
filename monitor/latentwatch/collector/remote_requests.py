"""Requests that run at other collectors: a gateway's store of their rows, by look-up, until each ends or is given up.

Shape legend: n requests, F features.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from latentwatch.aggregate.requests import RequestFeatures
from latentwatch.client_ids import carried
from latentwatch.collector.requests import RequestSummary, Roster, SummariesState, TrackedRequest, bounded
from latentwatch.facts import FEATURE_STAT, RequestInfo
from latentwatch.names import Outcome
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import RequestRow, joined


@dataclass(frozen=True)
class RemoteKey:
    """What a report calls a request."""

    forwarder: str
    boot_id: str
    number: int


@dataclass(frozen=True)
class RemoteRequestsState:
    """The rows of a RemoteRequests, in the order in which they came."""

    keys: list[RemoteKey]
    updated_seconds: list[float]
    """When each row came, by this collector's clock."""
    summaries: SummariesState


class RemoteRequests:
    """Open requests that a report told of, each with its latest row; at most `bound`."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._serials: OrderedDict[RemoteKey, int] = OrderedDict()
        self._summaries: dict[int, RequestSummary] = {}
        self._updated: dict[int, float] = {}
        """When the latest row came. The times within a row are of another host's clock."""

    def request(self, hello: Hello, row: RequestRow, serial: int) -> TrackedRequest:
        """The request of a row: the one of its earlier rows, or a new one with this serial."""
        info, known = row.info, self._serials.get(RemoteKey(hello.replica, hello.boot_id, row.number))
        if known is not None:
            request = self._summaries[known].request
            request.info = replace(
                request.info,
                request_id=carried(info.request_id),
                response_id=carried(info.response_id),
                prompt_tokens=info.prompt_tokens,
            )
            return request
        info = replace(
            info,
            request_id=carried(info.request_id),
            response_id=carried(info.response_id),
            adapter=bounded(info.adapter),
            traceparent=bounded(info.traceparent),
        )
        return TrackedRequest(serial, info)

    def update(self, hello: Hello, number: int, latest: RequestSummary, now: float) -> RequestSummary | None:
        """Store the latest row of a request that goes on. Returns one that goes beyond the bound for it."""
        key = RemoteKey(hello.replica, hello.boot_id, number)
        self._serials[key] = latest.request.collector_serial
        self._serials.move_to_end(key)
        self._summaries[latest.request.collector_serial] = latest
        self._updated[latest.request.collector_serial] = now
        if len(self._serials) <= self._bound:
            return None
        return self._pop(next(iter(self._serials)))

    def end(self, hello: Hello, number: int) -> None:
        """The request's last row came."""
        serial = self._serials.pop(RemoteKey(hello.replica, hello.boot_id, number), None)
        if serial is not None:
            del self._summaries[serial], self._updated[serial]

    def row(self, serial: int) -> RequestSummary | None:
        """The latest row of an open request."""
        return self._summaries.get(serial)

    def infos(self) -> Iterator[RequestInfo]:
        """Who the open requests are."""
        return (summary.request.info for summary in self._summaries.values())

    def latest(self, count: int) -> list[int]:
        """Serials, latest row first."""
        return list(reversed(self._serials.values()))[: max(0, count)]

    def restarted(self, hello: Hello) -> list[RequestSummary]:
        """Let go of the requests of a collector's earlier boots."""
        return self._let_go(
            key for key in self._serials if key.forwarder == hello.replica and key.boot_id != hello.boot_id
        )

    def idle(self, before: float) -> list[RequestSummary]:
        """Let go of those whose latest row came earlier."""
        return self._let_go(key for key, serial in self._serials.items() if self._updated[serial] < before)

    def shift(self, seconds: float) -> None:
        """The clock jumped by so much: what was quiet before is as quiet now."""
        self._updated = {serial: updated + seconds for serial, updated in self._updated.items()}

    def _let_go(self, keys: Iterable[RemoteKey]) -> list[RequestSummary]:
        return [self._pop(key) for key in list(keys)]

    def _pop(self, key: RemoteKey) -> RequestSummary:
        """A request of which nothing more will be known here."""
        serial = self._serials.pop(key)
        summary = self._summaries.pop(serial)
        del self._updated[serial]
        return replace(summary, progress=replace(summary.progress, outcome=Outcome.LOST))

    def state(self, roster: Roster) -> RemoteRequestsState:
        """Every row. The requests go to the roster."""
        summaries = [self._summaries[serial] for serial in self._serials.values()]
        updated = [self._updated[serial] for serial in self._serials.values()]
        return RemoteRequestsState(list(self._serials), updated, SummariesState.of(summaries, roster))

    def restore(self, state: RemoteRequestsState, roster: Roster) -> None:
        """Go on from `state`."""
        summaries = state.summaries.summaries(roster)
        for key, updated, summary in zip(state.keys, state.updated_seconds, summaries, strict=True):
            serial = self._serials[key] = summary.request.collector_serial
            self._summaries[serial] = summary
            self._updated[serial] = updated


def features_of(rows: Sequence[RequestRow], features: int) -> RequestFeatures:
    """What n rows say, as a collector that saw their tokens would have it."""
    n = len(rows)
    made = RequestFeatures(
        max_nF=np.full((n, features), np.nan, np.float32),
        max_position_nF=np.full((n, features), -1, np.int64),
        statistic_nF=np.full((n, features), np.nan, np.float32),
        statistic_position_nF=np.full((n, features), -1, np.int64),
        fired_nF=np.zeros((n, features), np.int64),
        exceeded_nF=np.zeros((n, features), bool),
    )
    place = np.repeat(np.arange(n), [len(row.features) for row in rows])
    seen = joined((row.features for row in rows), FEATURE_STAT)
    at = place, seen["index"].astype(np.int64)
    for name, array_nF in made.columns().items():
        array_nF[at] = seen[name]
    return made
