"""From steps to evidence records: keeps the latest activations of every open request, and lets them go unless a limit
was exceeded. No I/O, no clock, no thread.

Shape legend: K request slots, N fired activations, R rows, P dense features, S slots that are full.

What it promises of a request that exceeded a limit: the exceedance, every activation from then on, and those before it
as far as they fit into its slot. What did not fit is counted in its end record. With `scope="all"` the other requests
are recorded too, with what fits into the slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import numpy as np

from latentwatch.arrays import Array
from latentwatch.collector.requests import TrackedRequest
from latentwatch.collector.step_listener import Ends, Eviction, RemoteRows, Step, StepListener
from latentwatch.evidence.records import (
    FIRE_RECORD,
    Activations,
    Ended,
    Exceeded,
    Record,
    RecordedRequest,
    row_record,
)
from latentwatch.evidence.segment import Watched, WatchedFeature
from latentwatch.facts import Exceedance
from latentwatch.names import Phase
from latentwatch.watchlist.file import Watchlist

EvidenceScope = Literal["exceeded", "all"]

SLOT_BYTES: Final = 16 << 10
"""Per open request, for sparse activations and for dense scores each: 1,638 activations, at 2.5 a token some 650
tokens. The operating system backs only the slots that were used."""
_RECORDS_AT_ONCE: Final = 1024
"""A step may have a million exceedances; whoever takes them has a bound of its own."""
_PHASES: Final = {int(phase): phase for phase in Phase}
_SERIAL_BITS: Final = 22
"""What 63 bits leave beside milliseconds since the epoch."""


class EvidenceBuffer(StepListener):
    """Watches a collector's slots and hands records to every sink."""

    def __init__(
        self,
        watchlist: Watchlist,
        slots: int,
        sinks: Sequence[Callable[[Sequence[Record]], None]],
        scope: EvidenceScope,
    ) -> None:
        """Args: slots: how many `step` may name; the last one is of requests that found none."""
        self._sinks = tuple(sinks)
        self._scope = scope
        self._flagged = np.zeros(slots, bool)
        dense = row_record(sum(feature.dense for feature in watchlist.features))
        self._fires = _Slots(FIRE_RECORD, slots)
        self._rows = _Slots(dense, slots)

    def step(self, step: Step) -> None:
        """See StepListener."""
        batch, rows, requests_K = step.batch, step.view.rows, step.requests_K
        if len(step.exceedances):
            self._flagged[step.exceeding_slots] = True
            self._sink_exceedances(step.exceedances, requests_K[step.exceeding_slots])
        fires = np.empty(len(batch.fires_N), FIRE_RECORD)
        at = batch.fires_N["row"]
        fires["position"], fires["feature"], fires["value"] = (
            rows.position[at],
            batch.fires_N["feature"],
            batch.fires_N["act"],
        )
        self._add(self._fires, rows.slot[at], fires, requests_K)
        if batch.dense_RP.shape[1]:
            scores = np.empty(len(batch.dense_RP), self._rows.dtype)
            scores["position"], scores["score"] = rows.position, batch.dense_RP
            self._add(self._rows, rows.slot, scores, requests_K)
        self._clear(len(self._flagged) - 1)

    def ended(self, ends: Ends) -> None:
        """See StepListener."""
        for slot, summary in zip(ends.slots, ends.requests, strict=True):
            # A collector that was started again knows from its state what was exceeded before.
            if self._flagged[slot] or summary.features.exceeded or self._scope == "all":
                lost = int(self._fires.lost_K[slot] + self._rows.lost_K[slot])
                request = _recorded(summary.request)
                self._sink(
                    (
                        Activations(request, self._fires.pop(slot), self._rows.pop(slot)),
                        Ended(request, summary.progress, summary.features, lost),
                    )
                )
            self._clear(slot)

    def evicted(self, eviction: Eviction) -> None:
        """See StepListener."""
        self._clear(eviction.slot)

    def remote(self, remote: RemoteRows) -> None:
        """See StepListener. Another collector has the activations of these requests."""
        for row, latest in zip(remote.rows, remote.requests, strict=True):
            if len(row.exceedances):
                self._sink_exceedances(row.exceedances, [latest.request] * len(row.exceedances))
            if row.progress.outcome is not None and (latest.features.exceeded or self._scope == "all"):
                self._sink((Ended(_recorded(latest.request), latest.progress, latest.features, 0),))

    def _clear(self, slot: int) -> None:
        self._flagged[slot] = False
        self._fires.clear(slot)
        self._rows.clear(slot)

    def _sink_exceedances(self, exceedances: Array, requests: Sequence[TrackedRequest] | Array) -> None:
        recorded: dict[int, RecordedRequest] = {}
        for first in range(0, len(exceedances), _RECORDS_AT_ONCE):
            some = slice(first, first + _RECORDS_AT_ONCE)
            records: list[Record] = []
            for request, found in zip(requests[some], exceedances[some].tolist(), strict=True):
                serial = request.collector_serial
                if serial not in recorded:
                    recorded[serial] = _recorded(request)
                feature, phase, position, value, seconds = found
                records.append(
                    Exceeded(recorded[serial], Exceedance(feature, _PHASES[phase], position, value, seconds))
                )
            self._sink(records)

    def _sink(self, records: Sequence[Record]) -> None:
        for sink in self._sinks:
            sink(records)

    def _add(self, slots: _Slots, slot_N: Array, records_N: Array, requests_K: Array) -> None:
        for slot, overflow in slots.add(slot_N, records_N):
            if not self._flagged[slot]:
                slots.append_latest(slot, overflow)
                continue
            whole = np.concatenate([slots.pop(slot), overflow])
            parts = (whole, self._rows.none) if slots is self._fires else (self._fires.none, whole)
            self._sink((Activations(_recorded(requests_K[slot]), *parts),))


def _recorded(request: TrackedRequest) -> RecordedRequest:
    """Its key is unique and rises with time; the same after the collector was started again from its state."""
    serial = request.collector_serial % (1 << _SERIAL_BITS)
    return RecordedRequest(int(request.info.opened_seconds * 1000) << _SERIAL_BITS | serial, request.info)


class _Slots:
    """A short list of records per slot, in one array."""

    def __init__(self, dtype: np.dtype[Any], slots: int) -> None:
        self.dtype = dtype
        self.none = np.empty(0, dtype)
        self._capacity = max(2, SLOT_BYTES // dtype.itemsize)
        self._records = np.zeros((slots, self._capacity), dtype)
        self._length_K = np.zeros(slots, np.int64)
        self.lost_K = np.zeros(slots, np.int64)

    def add(self, slot_N: Array, records_N: Array) -> list[tuple[int, Array]]:
        """Append records in their order. Returns the slots that have no room for theirs, with those records."""
        if not len(slot_N):
            return []
        order = np.argsort(slot_N, kind="stable")
        slot_N, records_N = slot_N[order], records_N[order]
        first = np.flatnonzero(np.append(True, slot_N[1:] != slot_N[:-1]))
        slot_S, count_S = slot_N[first], np.diff(np.append(first, len(slot_N)))
        fits_S = self._length_K[slot_S] + count_S <= self._capacity
        place_N = np.arange(len(slot_N)) + np.repeat(self._length_K[slot_S] - first + slot_S * self._capacity, count_S)
        fits_N = np.repeat(fits_S, count_S)
        self._records.reshape(-1)[place_N[fits_N]] = records_N[fits_N]
        self._length_K[slot_S[fits_S]] += count_S[fits_S]
        over = np.flatnonzero(~fits_S)
        return [(int(slot_S[i]), records_N[first[i] : first[i] + count_S[i]]) for i in over]

    def append_latest(self, slot: int, overflow: Array) -> None:
        """Append records that do not fit, and let the oldest go: half of the slot, so that this is rare."""
        whole = np.concatenate([self._records[slot, : self._length_K[slot]], overflow])
        kept = whole[-(self._capacity // 2) :]
        self.lost_K[slot] += len(whole) - len(kept)
        self._records[slot, : len(kept)] = kept
        self._length_K[slot] = len(kept)

    def pop(self, slot: int) -> Array:
        """The records of a slot, which is empty then."""
        taken: Array = self._records[slot, : self._length_K[slot]].copy()
        self._length_K[slot] = 0
        return taken

    def clear(self, slot: int) -> None:
        self._length_K[slot] = 0
        self.lost_K[slot] = 0


def watched(watchlist: Watchlist) -> Watched:
    """What evidence files say of a watchlist."""
    return Watched(
        watchlist.name,
        watchlist.sha256,
        tuple(
            WatchedFeature(
                i, f.id, f.label, str(f.severity), str(point), f.units, f.dense, f.limit.value if f.limit else None
            )
            for i, (f, point) in enumerate(zip(watchlist.features, watchlist.hook_point_F, strict=True))
        ),
    )
