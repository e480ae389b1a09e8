"""Open and closed requests: which slot each handle has, what is accounted to it, and what remains after its end.

Shape legend: K slots of open requests, S segments, F features.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

import numpy as np

from latentwatch.aggregate.requests import RequestFeatures
from latentwatch.arrays import Array, axes, check
from latentwatch.client_ids import MAX_ID_CHARACTERS, IdKind
from latentwatch.facts import FEATURE_STAT, FeatureSummary, RequestInfo, RequestProgress
from latentwatch.names import Outcome, Phase, TokenState, trace_id

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

    def state(self) -> HandleMapState:
        """The handles and their slots. The arrays are never written again."""
        return HandleMapState(self._handles, self._slots)

    def restore(self, state: HandleMapState) -> None:
        """Go on from `state`. Raises ValueError where it does not fit together."""
        check(state)
        self._handles, self._slots = state.handles, state.slots


@dataclass(frozen=True)
class HandleMapState:
    """A HandleMap, by handle."""

    handles: Array = field(metadata=axes("n", dtype=np.int64))
    slots: Array = field(metadata=axes("n", dtype=np.int64))


@dataclass
class TrackedRequest:
    """A request as long as anything here points to it."""

    collector_serial: int
    info: RequestInfo
    handles: HandleMap | None = None
    """Of the boot that it runs in; None for one that runs at another collector."""


@dataclass(frozen=True)
class TrackedRequestState:
    """A TrackedRequest; whose handles it belongs to is the boots' to say."""

    collector_serial: int
    info: RequestInfo


class Roster:
    """Requests by serial while a state is made or restored: many parts of it point to one request."""

    def __init__(self) -> None:
        self._requests: dict[int, TrackedRequest] = {}

    def add(self, *requests: TrackedRequest) -> None:
        """Add requests that a state points to."""
        self._requests.update((request.collector_serial, request) for request in requests)

    def request(self, serial: int) -> TrackedRequest:
        """The request with this serial. Raises ValueError where the state points to one that is not in it."""
        if serial not in self._requests:
            raise ValueError(f"it points to request {serial}, which is not in it")
        return self._requests[serial]

    def state(self) -> list[TrackedRequestState]:
        """Every request."""
        return [TrackedRequestState(serial, request.info) for serial, request in self._requests.items()]

    @classmethod
    def of(cls, state: list[TrackedRequestState]) -> Roster:
        """The requests of `state`, without handles until `Slots.restore` gives them their boot's."""
        roster = cls()
        roster.add(*(TrackedRequest(request.collector_serial, request.info) for request in state))
        return roster


def summarise(features: RequestFeatures, limit_F: Array, most: int) -> list[FeatureSummary]:
    """Summaries of n requests, of at most so many features each."""
    n, F = features.max_nF.shape
    seen_nF = features.max_position_nF >= 0
    shown_nk = rank(features.statistic_nF, limit_F, features.exceeded_nF, seen_nF)[:, :most]
    rows_nk = np.empty(shown_nk.shape, FEATURE_STAT)
    rows_nk["index"] = shown_nk
    for name, column_nF in features.columns().items():
        rows_nk[name] = np.take_along_axis(column_nF, shown_nk, axis=1)
    shown_n = seen_nF.sum(axis=1).tolist()
    exceeded_n = features.exceeded_nF.sum(axis=1).tolist()
    return [
        FeatureSummary(rows_nk[i, : shown_n[i]].copy(), exceeded_n[i], max(0, shown_n[i] - min(most, F)))
        for i in range(n)
    ]


def rank(statistic_nF: Array, limit_F: Array, exceeded_nF: Array, seen_nF: Array) -> Array:
    """Order of the features of n requests, most abnormal first, as indices [n, F].

    Exceeded ones, then by nearness to the limit, then those without a limit by size, then those that were seen without
    a value of their statistic, then the others.

    Args: statistic_nF: NaN for none. limit_F: +inf for none. exceeded_nF, seen_nF: bool.
    """
    has_limit = np.isfinite(limit_F)
    limit = np.where(has_limit, limit_F, 0.0)
    # Nearness is squeezed into -1..1 and size into -3..-1, so that one sort key holds both.
    nearness = (statistic_nF - limit) / np.maximum(np.abs(limit), 1e-6)
    key_nF = np.where(has_limit, nearness / (1 + np.abs(nearness)), statistic_nF / (1 + np.abs(statistic_nF)) - 2)
    none_nF = np.where(seen_nF, 4.0, 5.0)
    order: Array = np.argsort(np.where(np.isnan(key_nF), none_nF, -key_nF - 4 * exceeded_nF), axis=1, kind="stable")
    return order


@dataclass(frozen=True)
class RequestSummary:
    """What remains of a request after its end, or is known of one that goes on at another collector."""

    request: TrackedRequest
    progress: RequestProgress
    features: FeatureSummary


@dataclass(frozen=True)
class SummariesState:
    """n RequestSummary as columns; -1 stands for tokens that the engine did not report."""

    serials: Array = field(metadata=axes("n", dtype=np.int64))
    outcomes: Array = field(metadata=axes("n", dtype=np.uint8))
    """0 while it is open."""
    closed_seconds: Array = field(metadata=axes("n"))
    output_tokens: Array = field(metadata=axes("n", dtype=np.int64))
    total_tokens: Array = field(metadata=axes("n", dtype=np.int64))
    tokens: Array = field(metadata=axes("n", "states", dtype=np.int64))
    exceeded: Array = field(metadata=axes("n", dtype=np.int64))
    left_out: Array = field(metadata=axes("n", dtype=np.int64))
    feature_counts: Array = field(metadata=axes("n", dtype=np.int64))
    rows: Array = field(metadata=axes("features", dtype=FEATURE_STAT))

    @classmethod
    def of(cls, summaries: Sequence[RequestSummary], roster: Roster) -> SummariesState:
        """Copies. Their requests go to the roster."""
        roster.add(*(summary.request for summary in summaries))
        n = len(summaries)

        def column(of: Callable[[RequestSummary], int | float | None], dtype: type = np.int64) -> Array:
            values = (of(summary) for summary in summaries)
            return np.fromiter((-1 if value is None else value for value in values), dtype, n)

        return cls(
            serials=column(lambda s: s.request.collector_serial),
            outcomes=column(lambda s: s.progress.outcome or 0, np.uint8),
            closed_seconds=column(lambda s: s.progress.closed_seconds, np.float64),
            output_tokens=column(lambda s: s.progress.output_tokens),
            total_tokens=column(lambda s: s.progress.total_tokens),
            tokens=np.array([s.progress.tokens for s in summaries], np.int64).reshape(n, len(TokenState) + 1),
            exceeded=column(lambda s: s.features.exceeded),
            left_out=column(lambda s: s.features.left_out),
            feature_counts=column(lambda s: len(s.features.rows)),
            rows=np.concatenate([np.empty(0, FEATURE_STAT), *(s.features.rows for s in summaries)]),
        )

    def summaries(self, roster: Roster) -> Iterator[RequestSummary]:
        """Each of them again, of requests that the roster knows. Raises ValueError where they do not fit together."""
        check(self, states=len(TokenState) + 1)
        ends = np.cumsum(self.feature_counts, dtype=np.int64)
        if (self.feature_counts < 0).any() or (ends[-1] if len(ends) else 0) != len(self.rows):
            raise ValueError(f"summaries have {len(self.rows)} features, not as many as they count")
        for i, rows in enumerate(np.split(self.rows, ends[:-1]) if len(ends) else ()):
            output, total = int(self.output_tokens[i]), int(self.total_tokens[i])
            progress = RequestProgress(
                outcome=Outcome(int(self.outcomes[i])) if self.outcomes[i] else None,
                closed_seconds=float(self.closed_seconds[i]),
                tokens=self.tokens[i],
                output_tokens=output if output >= 0 else None,
                total_tokens=total if total >= 0 else None,
            )
            features = FeatureSummary(rows.copy(), int(self.exceeded[i]), int(self.left_out[i]))
            yield RequestSummary(roster.request(int(self.serials[i])), progress, features)


@dataclass(frozen=True)
class RequestIndexState:
    """The closed requests of a RequestIndex, oldest first."""

    evicted: int
    flagged: int
    """How many of them, from the first, are kept for their exceedance."""
    summaries: SummariesState


class RequestIndex:
    """Requests by each of their ids, and the closed ones in the order of their end.

    Beyond `closed_bound` the oldest summary goes; one with an exceedance then stays among the last
    `flagged_bound` such.
    """

    def __init__(self, closed_bound: int, flagged_bound: int) -> None:
        self._closed_bound, self._flagged_bound = closed_bound, flagged_bound
        self._serials: dict[tuple[IdKind, str], dict[int, None]] = {}
        self._closed: OrderedDict[int, RequestSummary] = OrderedDict()
        self._flagged: OrderedDict[int, RequestSummary] = OrderedDict()
        self.evicted = 0

    def add(self, request: TrackedRequest) -> None:
        """Make a request findable by each id that is known of it."""
        for name in _names(request):
            self._serials.setdefault(name, {})[request.collector_serial] = None

    def forget(self, request: TrackedRequest) -> None:
        """Undo `add`."""
        for name in _names(request):
            serials = self._serials.get(name, {})
            serials.pop(request.collector_serial, None)
            if not serials:
                self._serials.pop(name, None)

    def closed(self) -> Iterator[TrackedRequest]:
        """Every closed request that is in the index."""
        return (summary.request for summary in itertools.chain(self._closed.values(), self._flagged.values()))

    def drop(self, request: TrackedRequest) -> None:
        """Let go of a closed request before its time."""
        self.forget(request)
        self._closed.pop(request.collector_serial, None)
        self._flagged.pop(request.collector_serial, None)

    def find(self, meant: Mapping[IdKind, Sequence[str]]) -> set[int]:
        """Serial numbers of the requests with one of these ids; see client_ids.meanings."""
        return {
            serial
            for kind, ids in meant.items()
            for held in _HELD_AS[kind]
            for each in ids
            for serial in self._serials.get((held, each), ())
        }

    def closed_request(self, serial: int) -> RequestSummary | None:
        """The summary of a closed request, None when it is open or gone."""
        return self._closed.get(serial) or self._flagged.get(serial)

    def latest_closed(self, count: int) -> list[int]:
        """Serial numbers of the requests that ended last, latest first."""
        return list(itertools.islice(itertools.chain(reversed(self._closed), reversed(self._flagged)), max(0, count)))

    def state(self, roster: Roster) -> RequestIndexState:
        """The closed requests; copies. Their openings go to the roster."""
        closed = [*self._flagged.values(), *self._closed.values()]
        return RequestIndexState(self.evicted, len(self._flagged), SummariesState.of(closed, roster))

    def restore(self, state: RequestIndexState, roster: Roster) -> None:
        """Go on from `state`, with the requests that the roster knows; the caller adds their names."""
        self.evicted = state.evicted
        for i, summary in enumerate(state.summaries.summaries(roster)):
            (self._flagged if i < state.flagged else self._closed)[summary.request.collector_serial] = summary

    def close(self, summary: RequestSummary) -> None:
        """Store a closed request, and let go of the oldest one beyond the bounds."""
        self._closed[summary.request.collector_serial] = summary
        if len(self._closed) <= self._closed_bound:
            return
        serial, oldest = self._closed.popitem(last=False)
        if oldest.features.exceeded:
            self._flagged[serial] = oldest
            if len(self._flagged) <= self._flagged_bound:
                return
            _, oldest = self._flagged.popitem(last=False)
        self.forget(oldest.request)
        self.evicted += 1


_HELD_AS: Final = {
    IdKind.RESPONSE: (IdKind.RESPONSE,),
    IdKind.REQUEST: (IdKind.REQUEST,),
    IdKind.TRACE: (IdKind.TRACE,),
    IdKind.CLIENT: (IdKind.RESPONSE,),
    IdKind.DIGEST: (IdKind.RESPONSE, IdKind.REQUEST),
}


def _names(request: TrackedRequest) -> list[tuple[IdKind, str]]:
    info = request.info
    names = (
        (IdKind.REQUEST, info.request_id),
        (IdKind.RESPONSE, info.response_id),
        (IdKind.TRACE, trace_id(info.traceparent)),
    )
    return [(kind, name) for kind, name in names if name]


@dataclass(frozen=True)
class SlotsState:
    """Who sits where; n of K slots are taken."""

    slots: Array = field(metadata=axes("n", dtype=np.int64))
    serials: Array = field(metadata=axes("n", dtype=np.int64))
    accounted: Array = field(metadata=axes("n", "states", "phases", dtype=np.int64))
    touched: Array = field(metadata=axes("K"))
    free: Array = field(metadata=axes("free", dtype=np.int64))
    """In the order in which they will be given out, from the last on."""


class Slots:
    """K slots: who sits where, what is accounted to each, and which one to give up when all are taken."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._touched = np.zeros(count)
        self.requests = np.empty(count, object)
        """TrackedRequest by slot, None where it is free."""
        self.accounted = np.zeros((count, len(TokenState) + 1, len(Phase) + 1), np.int64)
        self.by_serial: dict[int, int] = {}

    def request(self, slot: int) -> TrackedRequest:
        """Who sits there; the slot must be taken."""
        return cast(TrackedRequest, self.requests[slot])

    def full(self) -> bool:
        """Whether the next claim needs a slot to be given up first."""
        return not self._free

    def quietest(self) -> tuple[int, float]:
        """When all slots are taken: the one that has gone longest without a token, and the time of that token."""
        slot = int(np.argmin(self._touched))
        return slot, float(self._touched[slot])

    def claim(self, request: TrackedRequest, now: float) -> int:
        """Give a request a slot. There must be a free one."""
        slot = self._free.pop()
        self.requests[slot] = request
        self.by_serial[request.collector_serial] = slot
        self.accounted[slot] = 0
        self._touched[slot] = now
        return slot

    def release(self, slot: int) -> TrackedRequest:
        """Take a slot back."""
        request = self.request(slot)
        self.requests[slot] = None
        del self.by_serial[request.collector_serial]
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

    def state(self, roster: Roster) -> SlotsState:
        """Who sits where; copies. The requests go to the roster."""
        slots = self.occupied
        roster.add(*self.requests[slots])
        return SlotsState(
            slots=slots,
            serials=np.array([request.collector_serial for request in self.requests[slots]], np.int64),
            accounted=self.accounted[slots],
            touched=self._touched.copy(),
            free=np.array(self._free, np.int64),
        )

    def restore(self, state: SlotsState, roster: Roster, handles: Mapping[int, HandleMap]) -> None:
        """Go on from `state` of as many slots. Raises ValueError where it does not fit together.

        Args: handles: by slot, those of the boot that its request runs in.
        """
        K, states, phases = self.accounted.shape
        check(state, K=K, states=states, phases=phases)
        slots = state.slots.tolist()
        if sorted([*slots, *state.free.tolist()]) != list(range(K)) or handles.keys() != set(slots):
            raise ValueError(f"its requests, free slots and handles are not those of {K} slots")
        self._touched[:] = state.touched
        self._free = state.free.tolist()
        self.accounted[state.slots] = state.accounted
        for slot, serial in zip(slots, state.serials.tolist(), strict=True):
            request = roster.request(serial)
            request.handles = handles[slot]
            self.requests[slot] = request
            self.by_serial[serial] = slot

    @property
    def occupied(self) -> Array:
        """Every slot with a request in it, ascending."""
        return np.array(sorted(self.by_serial.values()), np.int64)

    def idle_since(self, before: float) -> list[int]:
        """Taken slots whose last token came before this time."""
        return [slot for slot in np.flatnonzero(self._touched < before).tolist() if self.requests[slot] is not None]


def bounded(text: str) -> str:
    """Text from outside that is no id, cut to MAX_ID_CHARACTERS."""
    return text[:MAX_ID_CHARACTERS]
