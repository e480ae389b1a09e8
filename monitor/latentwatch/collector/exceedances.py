"""Exceedances in a bounded ring of columns, so that a storm of them costs arrays and not objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from latentwatch.arrays import Array, axes, check
from latentwatch.collector.requests import Roster, TrackedRequest
from latentwatch.facts import EXCEEDANCE, Exceedance


@dataclass(frozen=True)
class Listed:
    """An exceedance, whose it is, and the largest value of its statistic by the request's end."""

    exceedance: Exceedance
    request: TrackedRequest
    peak: float
    """NaN while the request is open: its running state knows."""


@dataclass(frozen=True)
class ExceedanceRingState:
    """What is in an ExceedanceRing."""

    added: int
    exceedances: Array = field(metadata=axes("n", dtype=EXCEEDANCE))
    peaks: Array = field(metadata=axes("n"))
    serials: Array = field(metadata=axes("n", dtype=np.int64))


class ExceedanceRing:
    """The latest exceedances and the requests that they are of; the oldest go first and are counted."""

    def __init__(self, capacity: int) -> None:
        self._exceedances = np.zeros(capacity, EXCEEDANCE)
        self._peaks = np.full(capacity, np.nan)
        self._requests = np.empty(capacity, object)
        self._serials = np.zeros(capacity, np.int64)
        self._added = 0

    @property
    def evicted(self) -> int:
        """Exceedances that were let go."""
        return max(0, self._added - len(self._exceedances))

    def add(self, exceedances: Array, requests: Array) -> None:
        """Append EXCEEDANCE in the order of their arrival, each with its TrackedRequest."""
        capacity = len(self._exceedances)
        first = self._added + max(0, len(exceedances) - capacity)
        latest, requests = exceedances[-capacity:], requests[-capacity:]
        places = (first % capacity + np.arange(len(latest))) % capacity
        self._exceedances[places], self._requests[places], self._peaks[places] = latest, requests, np.nan
        self._serials[places] = [request.collector_serial for request in requests]
        self._added += len(exceedances)

    def latest(self, limit: int, wanted: Callable[[Array], Array] | None = None) -> Iterator[Listed]:
        """The latest ones, newest first.

        Args: wanted: says of EXCEEDANCE rows which are; None for all.
        """
        places = self._newest_first(limit if wanted is None else len(self._exceedances))
        if wanted is not None:
            places = places[wanted(self._exceedances[places])][:limit]
        yield from map(self._listed, places.tolist())

    def of_requests(self, limit: int) -> list[list[Listed]]:
        """All that is known of the latest requests, a list each; the one with the latest exceedance first."""
        order = self._newest_first(len(self._exceedances))
        serials, first = np.unique(self._serials[order], return_index=True)
        wanted = serials[np.argsort(first)[:limit]]
        found: dict[int, list[Listed]] = {serial: [] for serial in wanted.tolist()}
        for place in order[np.isin(self._serials[order], wanted)].tolist():
            found[int(self._serials[place])].append(self._listed(place))
        return list(found.values())

    def requests_since(self, seconds: float, features: Array) -> int:
        """How many requests went above a limit of these features since then, of those that are still in the ring."""
        order = self._newest_first(len(self._exceedances))
        known = self._exceedances[order]
        lately = (known["seconds"] >= seconds) & np.isin(known["feature"], features)
        return len(np.unique(self._serials[order][lately]))

    def _newest_first(self, limit: int) -> Array:
        """Places of the latest ones."""
        capacity = len(self._exceedances)
        return ((self._added - 1) % capacity - np.arange(min(limit, self._added, capacity))) % capacity

    def _listed(self, place: int) -> Listed:
        return Listed(Exceedance.of(self._exceedances[place]), self._requests[place], float(self._peaks[place]))

    def requests(self) -> Iterator[TrackedRequest]:
        """The request of every exceedance."""
        yield from self._requests[: min(self._added, len(self._exceedances))]

    def settle(self, serial: int, peak_F: Array) -> None:
        """Write the final peaks of a request that closed."""
        places = np.flatnonzero(self._serials == serial)
        self._peaks[places] = peak_F[self._exceedances["feature"][places]]

    def state(self, roster: Roster) -> ExceedanceRingState:
        """What is in the ring; copies. Its requests go to the roster."""
        count = min(self._added, len(self._exceedances))
        roster.add(*self._requests[:count])
        return ExceedanceRingState(
            self._added, self._exceedances[:count].copy(), self._peaks[:count].copy(), self._serials[:count].copy()
        )

    def restore(self, state: ExceedanceRingState, roster: Roster) -> None:
        """Go on from `state` of a ring of the same capacity. Raises ValueError where it does not fit."""
        check(state, n=min(state.added, len(self._exceedances)))
        count = len(state.exceedances)
        self._added = state.added
        self._exceedances[:count], self._peaks[:count] = state.exceedances, state.peaks
        self._serials[:count] = state.serials
        self._requests[:count] = [roster.request(serial) for serial in state.serials.tolist()]
