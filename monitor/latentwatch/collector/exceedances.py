"""Exceedance events in a bounded ring of columns, so that a storm of them costs arrays and not objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from latentwatch.collector.requests import OpenRequest, Roster

Array = npt.NDArray[Any]

EVENT_DTYPE = np.dtype(
    [
        ("feature", "<i4"),
        ("phase", "u1"),
        ("position", "<i8"),
        ("value", "<f8"),
        ("peak", "<f8"),  # NaN while the request is open: its running state knows
        ("seconds", "<f8"),
    ]
)


class ExceedanceRing:
    """The latest events and the requests that they are of; the oldest go first and are counted."""

    def __init__(self, capacity: int) -> None:
        self._events = np.zeros(capacity, EVENT_DTYPE)
        self._requests = np.empty(capacity, object)
        self._serials = np.zeros(capacity, np.int64)
        self._added = 0

    @property
    def evicted(self) -> int:
        """Events that are no longer held."""
        return max(0, self._added - len(self._events))

    def add(self, events: Array, requests: Array) -> None:
        """Append events in the order of their arrival, each with its OpenRequest."""
        capacity = len(self._events)
        first = self._added + max(0, len(events) - capacity)
        kept, requests = events[-capacity:], requests[-capacity:]
        places = (first + np.arange(len(kept))) % capacity
        self._events[places], self._requests[places] = kept, requests
        self._serials[places] = [request.serial for request in requests]
        self._added += len(events)

    def latest(self, limit: int) -> Iterator[tuple[Array, OpenRequest]]:
        """The latest events, newest first."""
        count = min(limit, self._added, len(self._events))
        for place in ((self._added - 1 - np.arange(count)) % len(self._events)).tolist():
            yield self._events[place], self._requests[place]

    def of_requests(self, limit: int) -> list[list[tuple[Array, OpenRequest]]]:
        """All that is held of the latest requests, a list each; the one with the latest event first."""
        found: dict[int, list[tuple[Array, OpenRequest]]] = {}
        for event, request in self.latest(len(self._events)):
            if request.serial in found:
                found[request.serial].append((event, request))
            elif len(found) < limit:
                found[request.serial] = [(event, request)]
        return list(found.values())

    def requests(self) -> Iterator[OpenRequest]:
        """The request of every event that is held."""
        yield from self._requests[: min(self._added, len(self._events))]

    def state(self, roster: Roster) -> dict[str, Any]:
        """What is held, for `restore` of a ring of the same capacity; copies. Its requests go to the roster."""
        held = min(self._added, len(self._events))
        roster.add(*self._requests[:held])
        return {"added": self._added, "events": self._events[:held].copy(), "serials": self._serials[:held].copy()}

    def restore(self, state: dict[str, Any], roster: Roster) -> None:
        """Go on from `state`, with the requests that the roster knows."""
        held = len(state["events"])
        self._added = state["added"]
        self._events[:held], self._serials[:held] = state["events"], state["serials"]
        self._requests[:held] = [roster.request(serial) for serial in state["serials"].tolist()]

    def settle(self, serial: int, peak_F: Array) -> None:
        """Write the final peaks of a request that closed."""
        held = np.flatnonzero(self._serials == serial)
        self._events["peak"][held] = peak_F[self._events["feature"][held]]
