"""From steps to evidence records: keeps the latest activations of every open request, and lets them go unless a limit
was exceeded. No I/O, no clock, no thread.

Shape legend: K request slots, N fired activations or crossings, R rows, P dense features, S slots that are full.

What it promises of a request that exceeded a limit: the crossing, every activation from then on, and those before it as
far as they fit into its slot. What did not fit is counted in its end record. With `keep="all"` the other requests are
recorded too, with what fits into the slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from latentwatch.aggregate.requests import StepView
from latentwatch.collector.requests import ClosedRequest, OpenRequest
from latentwatch.evidence.records import FIRE_RECORD, Activations, Ended, Exceedance, Record, Request, row_record
from latentwatch.evidence.segment import Watched, WatchedFeature
from latentwatch.names import Phase, TokenState
from latentwatch.step.batch import StepBatch
from latentwatch.watchlist.file import Watchlist

Array = npt.NDArray[Any]
Keep = Literal["exceeded", "all"]

SLOT_BYTES: Final = 16 << 10
"""Per open request, for sparse activations and for dense scores each: 1,638 activations, at 2.5 a token some 650
tokens. The operating system backs only the slots that were used."""
_SERIAL_BITS: Final = 22
"""What 63 bits leave beside milliseconds since the epoch."""


class EvidenceBuffer:
    """Watches a pipeline's slots and hands records to every sink."""

    def __init__(
        self,
        watchlist: Watchlist,
        slots: int,
        sinks: Sequence[Callable[[Sequence[Record]], None]],
        keep: Keep,
    ) -> None:
        """Args: slots: how many `step` may name."""
        self._sinks = tuple(sinks)
        self._keep = keep
        self._flagged = np.zeros(slots, bool)
        dense = row_record(sum(feature.dense for feature in watchlist.features))
        self._fires = _Slots(FIRE_RECORD, slots)
        self._rows = _Slots(dense, slots)

    def step(self, batch: StepBatch, view: StepView, crossings: Array, requests_K: Array, now: float) -> None:
        """Take a step. Args: crossings: those of requests with a slot. requests_K: OpenRequest by slot."""
        self._exceeded(crossings, requests_K, now)
        rows = view.rows
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

    def close(self, slot: int, closed: ClosedRequest) -> None:
        """A request ended; its slot is free for another one."""
        # A collector that was started again knows from its state what was exceeded before.
        if self._flagged[slot] or closed.features.exceeded or self._keep == "all":
            request = _request(closed.open)
            self._sink(
                (
                    Activations(request, self._fires.take(slot), self._rows.take(slot)),
                    _ended(request, closed, int(self._fires.lost_K[slot] + self._rows.lost_K[slot])),
                )
            )
        self.clear(slot)

    def elsewhere(self, crossings: Array, latest: ClosedRequest, *, ended: bool) -> None:
        """A request of another collector, which has its activations, crossed limits (CROSSED_DTYPE) or ended."""
        request = _request(latest.open)
        if len(crossings):
            self._sink(
                [
                    Exceedance(request, feature, seconds, position, Phase(phase), value)
                    for feature, phase, position, value, seconds in crossings.tolist()
                ]
            )
        if ended and (latest.features.exceeded or self._keep == "all"):
            self._sink((_ended(request, latest, 0),))

    def clear(self, slot: int) -> None:
        """A request was let go without an end."""
        self._flagged[slot] = False
        self._fires.clear(slot)
        self._rows.clear(slot)

    def _exceeded(self, crossings: Array, requests_K: Array, now: float) -> None:
        if not len(crossings):
            return
        self._flagged[crossings["slot"]] = True
        self._sink(
            [
                Exceedance(_request(requests_K[slot]), feature, now, position, Phase(phase), value)
                for slot, feature, position, value, phase in crossings.tolist()
            ]
        )

    def _sink(self, records: Sequence[Record]) -> None:
        for sink in self._sinks:
            sink(records)

    def _add(self, slots: _Slots, slot_N: Array, records_N: Array, requests_K: Array) -> None:
        for slot, overflow in slots.add(slot_N, records_N):
            if not self._flagged[slot]:
                slots.keep_latest(slot, overflow)
                continue
            whole = np.concatenate([slots.take(slot), overflow])
            parts = (whole, self._rows.none) if slots is self._fires else (self._fires.none, whole)
            self._sink((Activations(_request(requests_K[slot]), *parts),))


def _key(request: OpenRequest) -> int:
    """Unique and rising with time; the same after the collector was started again from its state."""
    return int(request.opened_seconds * 1000) << _SERIAL_BITS | request.serial % (1 << _SERIAL_BITS)


def _request(request: OpenRequest) -> Request:
    return Request(
        key=_key(request),
        request_id=request.request_id,
        replica=request.replica,
        model_name=request.model_name,
        engine=request.engine,
        adapter=request.adapter,
        traceparent=request.traceparent,
        opened_seconds=request.opened_seconds,
        opening_seen=request.opening_seen,
    )


def _ended(request: Request, closed: ClosedRequest, activations_lost: int) -> Ended:
    return Ended(
        request=request,
        closed_seconds=closed.closed_seconds,
        outcome=closed.outcome,
        prompt_tokens=closed.open.prompt_tokens,
        output_tokens=closed.output_tokens,
        total_tokens=closed.total_tokens,
        tokens=tuple(closed.tokens[list(TokenState)].tolist()),
        exceeded_features=closed.features.exceeded,
        features=closed.features.rows,
        features_left_out=closed.features.left_out,
        activations_lost=activations_lost,
    )


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

    def keep_latest(self, slot: int, overflow: Array) -> None:
        """Append records that do not fit, and let the oldest go: half of the slot, so that this is rare."""
        whole = np.concatenate([self._records[slot, : self._length_K[slot]], overflow])
        kept = whole[-(self._capacity // 2) :]
        self.lost_K[slot] += len(whole) - len(kept)
        self._records[slot, : len(kept)] = kept
        self._length_K[slot] = len(kept)

    def take(self, slot: int) -> Array:
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
