"""What the collector hands over to the evidence store. Plain values; the caller does not change them afterwards.

Shape legend: N fired activations, R rows (tokens with scores), P dense features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from latentwatch.arrays import Array, Dtype
from latentwatch.facts import Exceedance, FeatureSummary, RequestInfo, RequestProgress

FIRE_RECORD: Final = np.dtype([("position", "<i4"), ("feature", "<u2"), ("value", "<f4")])
"""One sparse activation of a request."""


def row_record(dense_features: int) -> Dtype:
    """The dense scores of one token of a request, columns in watchlist order."""
    return np.dtype([("position", "<i4"), ("score", "<f2", (dense_features,))])


class RecordedRequest(NamedTuple):
    """A request, as far as it is known when it exceeds a limit or ends."""

    key: int
    """Unique over all collectors that ever wrote to the folder; rises with time."""
    info: RequestInfo


class Exceeded(NamedTuple):
    """A request exceeded a limit."""

    request: RecordedRequest
    exceedance: Exceedance


class Activations(NamedTuple):
    """A stretch of a request's activations."""

    request: RecordedRequest
    fires_N: Array
    """FIRE_RECORD."""
    rows_R: Array
    """row_record(P)."""


class Ended(NamedTuple):
    """How a request ended; replaces what was written of the request before."""

    request: RecordedRequest
    progress: RequestProgress
    features: FeatureSummary
    activations_lost: int
    """Sparse activations and dense rows before the first exceedance that were let go, because they did not fit."""


Record = Exceeded | Activations | Ended


class NotWritten(Exception):
    """Some of the records that were to be written were not, for the reason in its cause; the others were."""

    def __init__(self, records: Sequence[Record]) -> None:
        super().__init__(f"{len(records)} records are not written")
        self.records = records


def kind(record: Record) -> str:
    """How metrics name a record."""
    return _KINDS[type(record)]


def size_bytes(record: Record) -> int:
    """About what a record costs while it waits to be written."""
    if isinstance(record, Activations):
        return _OBJECT_BYTES + record.fires_N.nbytes + record.rows_R.nbytes
    if isinstance(record, Ended):
        return 2 * _OBJECT_BYTES + int(record.features.rows.nbytes)
    return _OBJECT_BYTES


_KINDS: Final[dict[type, str]] = {
    Exceeded: "exceedance",
    Activations: "activations",
    Ended: "request_end",
}
KINDS: Final = tuple(_KINDS.values())
_OBJECT_BYTES: Final = 256
"""A tuple of some ten small objects."""
