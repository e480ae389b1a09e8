"""The gateway's half of forwarding: requests that run elsewhere, of which only rows are known.

Shape legend: n requests, F features.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentwatch.aggregate.requests import RequestFeatures
from latentwatch.collector.requests import (
    ClosedRequest,
    HandleMap,
    OpenRequest,
    Roster,
    bounded,
    restored_summaries,
    summaries_state,
)
from latentwatch.names import TokenState
from latentwatch.step.batch import FEATURE_DTYPE
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import RequestRow, joined

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Key:
    forwarder: str
    boot_id: str
    number: int


class RemoteRequests:
    """Open requests that a report told of, each with its latest row; at most `bound`."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._keys: OrderedDict[_Key, int] = OrderedDict()
        self._rows: dict[int, ClosedRequest] = {}

    def request(self, hello: Hello, row: RequestRow, serial: int) -> OpenRequest:
        """The request of a row: the one of its earlier rows, or a new one with this serial number."""
        held = self._keys.get(_Key(hello.replica, hello.boot_id, row.number))
        if held is not None:
            request = self._rows[held].open
            request.request_id, request.prompt_tokens = bounded(row.request_id), row.prompt_tokens
            return request
        return OpenRequest(
            serial=serial,
            handle=row.number,
            handles=HandleMap(),
            replica=row.replica,
            model_name=row.model_name,
            engine=row.engine,
            opened_seconds=row.opened_seconds,
            opening_seen=row.opening_seen,
            request_id=bounded(row.request_id),
            adapter=bounded(row.adapter),
            traceparent=bounded(row.traceparent),
            prompt_tokens=row.prompt_tokens,
        )

    def keep(self, hello: Hello, latest: ClosedRequest) -> ClosedRequest | None:
        """Hold the latest row of a request that goes on. Returns one that goes beyond the bound for it."""
        key = _Key(hello.replica, hello.boot_id, latest.open.handle)
        self._keys[key] = latest.open.serial
        self._keys.move_to_end(key)
        self._rows[latest.open.serial] = latest
        if len(self._keys) <= self._bound:
            return None
        return self._rows.pop(self._keys.popitem(last=False)[1])

    def end(self, hello: Hello, number: int) -> None:
        """The request's last row came."""
        serial = self._keys.pop(_Key(hello.replica, hello.boot_id, number), None)
        if serial is not None:
            del self._rows[serial]

    def row(self, serial: int) -> ClosedRequest | None:
        """The latest row of an open request."""
        return self._rows.get(serial)

    def latest(self, count: int) -> list[int]:
        """Serial numbers, latest row first."""
        return list(reversed(self._keys.values()))[: max(0, count)]

    def restarted(self, hello: Hello) -> list[ClosedRequest]:
        """Let go of the requests of a collector's earlier boots."""
        return self._let_go(
            key for key in self._keys if key.forwarder == hello.replica and key.boot_id != hello.boot_id
        )

    def idle(self, before: float) -> list[ClosedRequest]:
        """Let go of those whose latest row is older."""
        return self._let_go(key for key, serial in self._keys.items() if self._rows[serial].closed_seconds < before)

    def _let_go(self, keys: Iterable[_Key]) -> list[ClosedRequest]:
        return [self._rows.pop(self._keys.pop(key)) for key in list(keys)]

    def state(self, roster: Roster) -> dict[str, Any]:
        """Everything, for `restore`. Openings go to the roster."""
        return {
            "keys": [[key.forwarder, key.boot_id, key.number] for key in self._keys],
            **summaries_state([self._rows[serial] for serial in self._keys.values()], roster),
        }

    def restore(self, state: dict[str, Any], roster: Roster) -> None:
        """Go on from `state`."""
        for key, row in zip(state["keys"], restored_summaries(state, roster), strict=True):
            self._keys[_Key(*key)] = row.open.serial
            self._rows[row.open.serial] = row


def features_of(rows: Sequence[RequestRow], features: int) -> RequestFeatures:
    """What n rows say, as a pipeline that saw their tokens would have it."""
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
    seen = joined((row.features for row in rows), FEATURE_DTYPE)
    at = place, seen["index"].astype(np.int64)
    for name, array_nF in made.columns().items():
        array_nF[at] = seen[name]
    return made


def was_seen(row: RequestRow) -> bool:
    """Whether any of its tokens has a score."""
    return bool(row.tokens[TokenState.SCORED] or row.tokens[TokenState.INHERITED])
