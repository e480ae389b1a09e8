"""Open and closed requests: which slot each handle has, what is accounted to it, and what remains after its end.

Shape legend: K slots of open requests, S segments, F features.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from latentwatch.aggregate.requests import RequestFeatures
from latentwatch.collector.snapshot import rank
from latentwatch.names import Outcome, Phase, TokenState, response_id
from latentwatch.step.batch import FEATURE_DTYPE, RequestOpened

Array = npt.NDArray[Any]

MAX_ID_CHARACTERS: Final = 256
"""Of a request id, adapter or traceparent. vLLM's own ids are below 60; the rest is the client's X-Request-Id."""
_NO_SLOT: Final = -1


class HandleMap:
    """Handles of one boot's open requests to slots, looked up for a whole step at once."""

    def __init__(self) -> None:
        self._handles = np.empty(0, np.int64)
        self._slots = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def slots(self) -> Array:
        """Slots of all open requests, a copy."""
        return self._slots.copy()

    def find(self, handles: Array) -> Array:
        """Slot of each handle, -1 where it is not open."""
        at = np.searchsorted(self._handles, handles)
        slots = np.full(len(handles), _NO_SLOT, np.int64)
        inside = np.flatnonzero(at < len(self._handles))
        known = inside[self._handles[at[inside]] == handles[inside]]
        slots[known] = self._slots[at[known]]
        return slots

    def add(self, handles: Sequence[int], slots: Sequence[int]) -> None:
        """Note handles that are not held yet."""
        all_handles = np.concatenate((self._handles, np.array(handles, np.int64)))
        order = np.argsort(all_handles, kind="stable")
        self._handles = all_handles[order]
        self._slots = np.concatenate((self._slots, np.array(slots, np.int64)))[order]

    def remove(self, slots: Array) -> None:
        """Forget the handles that have these slots."""
        kept = ~np.isin(self._slots, slots)
        self._handles, self._slots = self._handles[kept], self._slots[kept]

    def state(self) -> dict[str, Array]:
        """The handles and their slots, for `restore`. The arrays are never written again."""
        return {"handles": self._handles, "slots": self._slots}

    def restore(self, state: dict[str, Array]) -> None:
        """Go on from `state`."""
        self._handles, self._slots = state["handles"], state["slots"]


@dataclass
class OpenRequest:
    """What is known of an open request beside its statistics."""

    serial: int
    handle: int
    handles: HandleMap
    """Of the boot that it runs in."""
    replica: str
    model_name: str
    engine: str
    opened_seconds: float
    opening_seen: bool = False
    request_id: str = ""
    adapter: str = ""
    traceparent: str = ""
    prompt_tokens: int | None = None

    def learn(self, opened: RequestOpened) -> None:
        """Take over what the engine said at the opening. Client text is cut to MAX_ID_CHARACTERS."""
        self.request_id = bounded(opened.request_id)
        self.adapter = bounded(opened.adapter)
        self.traceparent = bounded(opened.traceparent)
        self.prompt_tokens = opened.prompt_tokens


class Roster:
    """Requests by serial number while a state is taken or put back: many parts of it point to one request."""

    _FIELDS: Final = tuple(field.name for field in fields(OpenRequest) if field.name != "handles")

    def __init__(self) -> None:
        self._requests: dict[int, OpenRequest] = {}

    def add(self, *requests: OpenRequest) -> None:
        """Note requests that a state points to."""
        self._requests.update((request.serial, request) for request in requests)

    def request(self, serial: int) -> OpenRequest:
        """The request with this number. Raises KeyError."""
        return self._requests[serial]

    def state(self) -> list[list[Any]]:
        """Every request noted, a row each; whose handles it belongs to is the boots' to say."""
        return [[getattr(request, name) for name in self._FIELDS] for request in self._requests.values()]

    @classmethod
    def of(cls, state: list[list[Any]]) -> Roster:
        """The requests of `state`, each with handles of its own until `Slots.restore` gives it its boot's."""
        roster = cls()
        for row in state:
            roster.add(OpenRequest(handles=HandleMap(), **dict(zip(cls._FIELDS, row, strict=True))))
        return roster


@dataclass(frozen=True)
class FeatureSummary:
    """The features of one request that showed anything, at most Bounds.summary_features, the most abnormal first."""

    rows: Array
    """FEATURE_DTYPE."""
    exceeded: int
    """Features above their limit, those left out included."""
    left_out: int


def summarise(features: RequestFeatures, limit_F: Array, most: int) -> list[FeatureSummary]:
    """Summaries of n requests."""
    n, F = features.max_nF.shape
    seen_nF = features.max_position_nF >= 0
    kept_nk = rank(features.statistic_nF, limit_F, features.exceeded_nF, seen_nF)[:, :most]
    rows_nk = np.empty(kept_nk.shape, FEATURE_DTYPE)
    rows_nk["index"] = kept_nk
    for name, column_nF in features.columns().items():
        rows_nk[name] = np.take_along_axis(column_nF, kept_nk, axis=1)
    shown_n = seen_nF.sum(axis=1).tolist()
    exceeded_n = features.exceeded_nF.sum(axis=1).tolist()
    return [
        FeatureSummary(rows_nk[i, : shown_n[i]].copy(), exceeded_n[i], max(0, shown_n[i] - min(most, F)))
        for i in range(n)
    ]


@dataclass(frozen=True)
class ClosedRequest:
    """A request that ended."""

    open: OpenRequest
    outcome: Outcome
    closed_seconds: float
    output_tokens: int | None
    total_tokens: int | None
    tokens: Array
    """Accounted tokens by TokenState value."""
    features: FeatureSummary


def summaries_state(closed: Sequence[ClosedRequest], roster: Roster) -> dict[str, Any]:
    """Summaries as columns, for `restored_summaries`; copies. Their openings go to the roster."""
    roster.add(*(request.open for request in closed))
    return {
        "serial": [request.open.serial for request in closed],
        "outcome": [int(request.outcome) for request in closed],
        "closed_seconds": [request.closed_seconds for request in closed],
        "output_tokens": [request.output_tokens for request in closed],
        "total_tokens": [request.total_tokens for request in closed],
        "tokens": np.array([request.tokens for request in closed], np.int64),
        "exceeded": [request.features.exceeded for request in closed],
        "left_out": [request.features.left_out for request in closed],
        "features": [len(request.features.rows) for request in closed],
        "rows": np.concatenate([np.empty(0, FEATURE_DTYPE), *(request.features.rows for request in closed)]),
    }


def restored_summaries(state: dict[str, Any], roster: Roster) -> Iterator[ClosedRequest]:
    """The summaries of `summaries_state`, of requests that the roster knows."""
    ends = np.cumsum(state["features"], dtype=np.int64).tolist()
    for i, serial in enumerate(state["serial"]):
        rows = state["rows"][ends[i] - state["features"][i] : ends[i]].copy()
        yield ClosedRequest(
            open=roster.request(serial),
            outcome=Outcome(state["outcome"][i]),
            closed_seconds=state["closed_seconds"][i],
            output_tokens=state["output_tokens"][i],
            total_tokens=state["total_tokens"][i],
            tokens=state["tokens"][i],
            features=FeatureSummary(rows, state["exceeded"][i], state["left_out"][i]),
        )


class RequestIndex:
    """Requests by either of their ids, and the closed ones in the order of their end.

    Beyond `closed_bound` the oldest summary goes; one with an exceedance then stays among the last
    `flagged_bound` such.
    """

    def __init__(self, closed_bound: int, flagged_bound: int) -> None:
        self._closed_bound, self._flagged_bound = closed_bound, flagged_bound
        self._serials: dict[str, dict[int, None]] = {}
        self._closed: OrderedDict[int, ClosedRequest] = OrderedDict()
        self._flagged: OrderedDict[int, ClosedRequest] = OrderedDict()
        self.evicted = 0

    def named(self, serial: int, request_id: str) -> None:
        """Make a request findable by the engine's id and by the response id."""
        for name in {request_id, response_id(request_id)} - {""}:
            self._serials.setdefault(name, {})[serial] = None

    def forget(self, serial: int, request_id: str) -> None:
        """Undo `named`."""
        for name in {request_id, response_id(request_id)} - {""}:
            serials = self._serials.get(name, {})
            serials.pop(serial, None)
            if not serials:
                self._serials.pop(name, None)

    def closed(self) -> Iterator[OpenRequest]:
        """Every closed request that is held."""
        return (request.open for request in itertools.chain(self._closed.values(), self._flagged.values()))

    def drop(self, request: OpenRequest) -> None:
        """Let go of a closed request before its time."""
        self.forget(request.serial, request.request_id)
        self._closed.pop(request.serial, None)
        self._flagged.pop(request.serial, None)

    def find(self, name: str) -> tuple[int, ...]:
        """Serial numbers of the requests with this id, oldest first."""
        return tuple(self._serials.get(bounded(name), ()))

    def closed_request(self, serial: int) -> ClosedRequest | None:
        """The summary of a closed request, None when it is open or gone."""
        return self._closed.get(serial) or self._flagged.get(serial)

    def latest_closed(self, count: int) -> list[int]:
        """Serial numbers of the requests that ended last, latest first."""
        return list(itertools.islice(itertools.chain(reversed(self._closed), reversed(self._flagged)), max(0, count)))

    def state(self, roster: Roster) -> dict[str, Any]:
        """The closed requests, oldest first, for `restore`; copies. Their openings go to the roster."""
        closed = [*self._flagged.values(), *self._closed.values()]
        return {"evicted": self.evicted, "flagged": len(self._flagged), **summaries_state(closed, roster)}

    def restore(self, state: dict[str, Any], roster: Roster) -> None:
        """Go on from `state`, with the requests that the roster knows; the caller names them."""
        self.evicted = state["evicted"]
        for i, closed in enumerate(restored_summaries(state, roster)):
            (self._flagged if i < state["flagged"] else self._closed)[closed.open.serial] = closed

    def close(self, request: ClosedRequest) -> None:
        """Keep a closed request, and let go of the oldest one beyond the bounds."""
        self._closed[request.open.serial] = request
        if len(self._closed) <= self._closed_bound:
            return
        serial, oldest = self._closed.popitem(last=False)
        if oldest.features.exceeded:
            self._flagged[serial] = oldest
            if len(self._flagged) <= self._flagged_bound:
                return
            serial, oldest = self._flagged.popitem(last=False)
        self.forget(serial, oldest.open.request_id)
        self.evicted += 1


class Slots:
    """K slots: who sits where, what is accounted to each, and which one to give up when all are taken."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._touched = np.zeros(count)
        self.requests = np.empty(count, object)
        """OpenRequest by slot, None where it is free."""
        self.accounted = np.zeros((count, len(TokenState) + 1, len(Phase) + 1), np.int64)
        self.by_serial: dict[int, int] = {}

    def request(self, slot: int) -> OpenRequest:
        """Who sits there; the slot must be taken."""
        return cast(OpenRequest, self.requests[slot])

    def full(self) -> bool:
        """Whether the next claim needs a slot to be given up first."""
        return not self._free

    def quietest(self) -> tuple[int, float]:
        """When all slots are taken: the one that has gone longest without a token, and the time of that token."""
        slot = int(np.argmin(self._touched))
        return slot, float(self._touched[slot])

    def claim(self, request: OpenRequest, now: float) -> int:
        """Give a request a slot. There must be a free one."""
        slot = self._free.pop()
        self.requests[slot] = request
        self.by_serial[request.serial] = slot
        self.accounted[slot] = 0
        self._touched[slot] = now
        return slot

    def release(self, slot: int) -> OpenRequest:
        """Take a slot back."""
        request = self.request(slot)
        self.requests[slot] = None
        del self.by_serial[request.serial]
        self._free.append(slot)
        return request

    def account(self, segments_S: Array, slot_S: Array, now: float) -> None:
        """Add the tokens of segments that have a slot."""
        _, states, phases = self.accounted.shape
        # Flat keys, since add.at is some ten times slower with an index per axis.
        key_S = (slot_S * states + segments_S["state"]) * phases + segments_S["phase"]
        np.add.at(self.accounted.reshape(-1), key_S, segments_S["count"].astype(np.int64))
        self._touched[slot_S] = now

    def shift(self, seconds: float) -> None:
        """The clock jumped by so much: what was quiet before is as quiet now."""
        self._touched += seconds

    def state(self, roster: Roster) -> dict[str, Any]:
        """Who sits where, for `restore` of as many slots; copies. The requests go to the roster."""
        slots = self.taken
        roster.add(*self.requests[slots])
        return {
            "slots": slots,
            "serials": [request.serial for request in self.requests[slots]],
            "accounted": self.accounted[slots],
            "touched": self._touched.copy(),
            "free": np.array(self._free, np.int64),
        }

    def restore(self, state: dict[str, Any], roster: Roster, handles: Mapping[int, HandleMap]) -> None:
        """Go on from `state`. `handles`: by slot, those of the boot that its request runs in."""
        slots = state["slots"]
        self._touched[:] = state["touched"]
        self._free = state["free"].tolist()
        self.accounted[slots] = state["accounted"]
        for slot, serial in zip(slots.tolist(), state["serials"], strict=True):
            request = roster.request(serial)
            request.handles = handles[slot]
            self.requests[slot] = request
            self.by_serial[serial] = slot

    @property
    def taken(self) -> Array:
        """Every slot with a request in it, ascending."""
        return np.array(sorted(self.by_serial.values()), np.int64)

    def idle_since(self, before: float) -> list[int]:
        """Taken slots whose last token came before this time."""
        return [slot for slot in np.flatnonzero(self._touched < before).tolist() if self.requests[slot] is not None]


def bounded(text: str) -> str:
    """Text from outside, cut to MAX_ID_CHARACTERS."""
    return text[:MAX_ID_CHARACTERS]
