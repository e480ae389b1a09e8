"""Drift of one served model: rows of ended requests in, windows closed on time, alarms with their explanation out.

No clock and no I/O. Rows wait in a short list until they are worth an array operation; a window closes when the first
call with a later time arrives. A time before the window's counts into it, so a clock that steps back reopens nothing.

Shape legend: n requests, F features, G groups (replica, adapter).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from latentwatch.aggregate.counts import CELLS, Layout, RequestCounts
from latentwatch.arrays import Array, check
from latentwatch.drift.alarms import Alarm, common_alarm, finite, with_text
from latentwatch.drift.common import COMMON, RISE
from latentwatch.drift.detection import (
    KINDS,
    Budget,
    CommonReading,
    DetectorState,
    Readings,
    Window,
    evidence,
    update,
    update_canary,
)
from latentwatch.drift.examples import Examples, TopPlace
from latentwatch.drift.reference import Reference
from latentwatch.drift.sums import TrafficSums
from latentwatch.drift.windows import key_of

_ROWS: Final = 128
"""Requests per array operation: some milliseconds of work at once."""
_GROUPS: Final = 256
"""(replica, adapter) pairs told apart in one window; further ones are counted together, as of no replica or adapter."""
_BEYOND: Final = ("(others)", "(others)")
_REPLICAS: Final = 256
"""Replicas whose detectors are kept; beyond, the one that sent nothing for longest gives its place."""


@dataclass(frozen=True)
class DriftView:
    """What metrics and API show of one model."""

    model_name: str
    armed: bool
    reason: str
    """Why not; empty while armed."""
    baseline_sha256: str
    baseline_created_seconds: float
    """When it was calibrated; 0 where there is none, or where it does not say."""
    windows: int
    """Windows with requests that the detectors took."""
    requests: int
    excluded_windows: int
    """Windows that no later baseline will be made of, because a detector was above its limit."""
    unnamed_requests: int
    """Requests of adapters and routes that have no counts of their own."""
    log10_evalue: dict[str, Array]
    log10_limit: dict[str, float]
    since_seconds: dict[str, Array]
    """0 where the detector is below its limit."""
    rate_ratio_F: Array
    """NaN where nothing is expected."""
    common: CommonReading | None
    """What all features have in common; None while drift is not measured."""
    alarms: list[Alarm]
    """The common movement before all others, then the strongest first."""


@dataclass(frozen=True)
class ReplicaPlace:
    """A replica that has detectors, and the last window in which it sent anything."""

    replica: str
    window: float


@dataclass(frozen=True)
class ModelDriftState:
    """Everything that a ModelDrift remembers."""

    baseline_sha256: str
    """What the detectors compared with."""
    detectors: DetectorState
    observed: TrafficSums
    counts: RequestCounts
    groups: list[tuple[str, str]]
    """Of this window."""
    replicas: list[ReplicaPlace]
    """In the order of the detectors' axis of replicas."""
    waiting_requests: int
    window_key: int
    """Of the requests of this window so far; see windows.py."""
    requests: int
    excluded_windows: int
    window: float
    top: list[TopPlace]
    top_turn_seconds: float


class ModelDrift:
    """Everything about drift of one model."""

    def __init__(
        self,
        model_name: str,
        features: Sequence[str],
        layout: Layout,
        budget: Budget,
        reference: Reference | None,
        *,
        reason: str = "",
        baseline_sha256: str = "",
        baseline_created_seconds: float = 0.0,
    ) -> None:
        """`reason` says why there is no reference."""
        self.model_name = model_name
        self.observed = TrafficSums.empty(layout)
        self._detectors = DetectorState.empty(layout, 1)
        self._features, self._layout, self._budget = features, layout, budget
        self._reference, self._reason = reference, reason
        self._sha256, self._created_seconds = baseline_sha256, baseline_created_seconds
        self._counts = RequestCounts.empty(layout, 1)
        self._groups = dict[tuple[str, str], int]()
        self._replicas, self._replica_window = list[str](), list[float]()
        self._rows = list[tuple[int, Array, Array]]()
        self._row_count = self._requests = self._excluded_windows = self._window_key = 0
        self._window = -math.inf
        self._examples = Examples(layout.features)
        self._evidence: Readings | None = None

    def add(
        self, replica: str, adapters: Sequence[str], names: Sequence[str], fired_nF: Array, value_nF: Array, now: float
    ) -> None:
        """Take n requests that ended. The arrays are kept: do not write to them again.

        Args: fired_nF: tokens on which each sparse feature fired. value_nF: the statistic, NaN for none.
        """
        self.close_windows(now)
        for i, adapter in enumerate(adapters):
            self._rows.append((self._group(replica, adapter), fired_nF[i], value_nF[i]))
        self._row_count += len(adapters)
        self._window_key = key_of((f"{replica} {name}" for name in names), self._window_key)
        self._examples.add(names, value_nF, now)
        if len(self._rows) >= _ROWS:
            self._flush()

    def add_canary(self, prompt: int, value_F: Array, now: float) -> None:
        """Take one run of a canary prompt; it counts for nothing else."""
        value_F = np.where(np.isfinite(value_F), value_F, 0.0)
        if self._reference is not None:
            update_canary(self._detectors, self._reference, prompt, value_F, now)
            self._evidence = None
        if not self._alarming():
            self.observed.add_canary(prompt, value_F)

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """Let go of the examples with these request ids. What they added to counts stays."""
        self._examples.forget(is_gone)

    def close_windows(self, now: float) -> None:
        """Close the window that is over, if there is one. Call it about once a second."""
        number = now // self._budget.window_seconds
        if number <= self._window:
            return
        if self._window > -math.inf:
            self._close((self._window + 1) * self._budget.window_seconds)
        self._window = number

    def view(self) -> DriftView:
        """The state after the last window that closed."""
        shown = self._evidence_now()
        alarms = shown.alarms if shown else {}
        return DriftView(
            model_name=self.model_name,
            armed=self._reference is not None,
            reason=self._reason,
            baseline_sha256=self._sha256,
            baseline_created_seconds=self._created_seconds,
            windows=int(self._detectors.windows[0]),
            requests=self._requests,
            excluded_windows=self._excluded_windows,
            unnamed_requests=self.observed.unnamed_requests,
            log10_evalue=shown.log10_evalue if shown else {},
            log10_limit={**shown.log10_limit, COMMON: shown.common.log10_limit} if shown else {},
            common=shown.common if shown else None,
            since_seconds={k: np.where(alarms[k], s, 0.0) for k, s in shown.since_seconds.items()} if shown else {},
            rate_ratio_F=shown.ratio_F if shown else np.empty(0),
            alarms=self._alarms(shown) if shown else [],
        )

    def state(self) -> ModelDriftState:
        """Everything that later calls depend on; copies."""
        self._flush()
        return ModelDriftState(
            baseline_sha256=self._sha256,
            detectors=copy.deepcopy(self._detectors),
            observed=copy.deepcopy(self.observed),
            counts=copy.deepcopy(self._counts),
            groups=list(self._groups),
            replicas=list(map(ReplicaPlace, self._replicas, self._replica_window)),
            waiting_requests=self._row_count,
            window_key=self._window_key,
            requests=self._requests,
            excluded_windows=self._excluded_windows,
            window=self._window,
            top=self._examples.places(),
            top_turn_seconds=self._examples.turn_seconds,
        )

    def restore(self, state: ModelDriftState) -> None:
        """Go on from `state`. Detectors that compared with another baseline begin anew.

        Raises ValueError where it is of other features.
        """
        state.detectors.check(self._layout)
        state.observed.check(self._layout)
        check(state.counts, F=self._layout.features, B=self._layout.levels_FL.shape[1] + 1, C=CELLS)
        self._window = state.window
        self._replicas = [place.replica for place in state.replicas]
        self._replica_window = [place.window for place in state.replicas]
        for replica, adapter in state.groups:
            self._group(replica, adapter)
        if len(state.counts.levels_GFB) < len(self._groups):
            raise ValueError(f"counts of {len(state.counts.levels_GFB)} groups, but there are {len(self._groups)}")
        if state.baseline_sha256 == self._sha256:
            if state.detectors.replica_2DF.shape[1] < len(self._replicas):
                raise ValueError(f"detectors of fewer than {len(self._replicas)} replicas")
            self._detectors = copy.deepcopy(state.detectors)
        else:
            self._detectors.grow(max(1, len(self._replicas)))
        self.observed, self._counts = copy.deepcopy(state.observed), copy.deepcopy(state.counts)
        self._row_count, self._requests = state.waiting_requests, state.requests
        self._window_key = state.window_key
        self._excluded_windows = state.excluded_windows
        self._examples.restore(state.top, state.top_turn_seconds)
        self._evidence = None

    def _group(self, replica: str, adapter: str) -> int:
        group = self._groups.get((replica, adapter))
        if group is not None:
            return group
        beyond = len(self._groups) >= _GROUPS - 1 and (replica, adapter) != _BEYOND
        if beyond or not self._place(replica):
            return self._group(*_BEYOND)
        group = self._groups[replica, adapter] = len(self._groups)
        if group >= len(self._counts.levels_GFB):
            self._flush()
            wider = RequestCounts.empty(self._layout, min(_GROUPS, max(1, 2 * group)))
            wider.levels_GFB[:group] = self._counts.levels_GFB
            self._counts.levels_GFB = wider.levels_GFB
        return group

    def _place(self, replica: str) -> bool:
        """Give a replica detectors of its own; False where all places are those of replicas of this window."""
        if replica not in self._replicas:
            if len(self._replicas) < _REPLICAS or replica == _BEYOND[0]:
                self._replicas.append(replica)
                self._replica_window.append(self._window)
                if len(self._replicas) > self._detectors.replica_2DF.shape[1]:
                    self._detectors.grow(2 * len(self._replicas))
                return True
            place = int(np.argmin(self._replica_window))
            if self._replica_window[place] >= self._window:
                return False
            self._detectors.clear_replica(place)
            self._replicas[place] = replica
        self._replica_window[self._replicas.index(replica)] = self._window
        return True

    def _flush(self) -> None:
        """Count the rows that wait."""
        if not self._rows:
            return
        groups, fired, values = zip(*self._rows, strict=True)
        self._rows.clear()
        value_nF = np.stack(values)
        self._counts.add(self._layout, np.array(groups), np.stack(fired), value_nF)
        if not self._alarming():
            self.observed.add_tail(value_nF)

    def _close(self, end_seconds: float) -> None:
        self._flush()
        if not self._row_count:
            return
        self._requests += self._row_count
        self._row_count, window_key, self._window_key = 0, self._window_key, 0
        groups = list(self._groups)[: len(self._counts.levels_GFB)]
        counts = RequestCounts(self._counts.levels_GFB[: len(groups)], self._counts.cells_FC, self._counts.coactive_PP)
        if self._reference is not None:
            strata = [self._stratum(adapter) for _, adapter in groups]
            replicas = [self._replicas.index(replica) for replica, _ in groups]
            window = Window(counts, np.array(replicas), np.array(strata), end_seconds)
            update(self._detectors, self._reference, self._layout, window, self._budget)
            self._evidence = None
        if self._alarming():
            # What may be an attack is never learnt as normal.
            self._excluded_windows += 1
        else:
            stratum_G = self.observed.strata_of([adapter for _, adapter in groups], counts.requests_GF.max(axis=1))
            self.observed.add_window(counts, stratum_G, end_seconds, self._budget.window_seconds, window_key)
        self._counts.clear()
        # The next window tells its own apart: names that come once do not take the places of later ones.
        self._groups.clear()

    def _stratum(self, adapter: str) -> int:
        assert self._reference is not None
        strata = self._reference.strata
        return strata.index(adapter) if adapter in strata else len(self._reference.stratum_SF) - 1

    def _evidence_now(self) -> Readings | None:
        if self._evidence is None and self._reference is not None:
            self._evidence = evidence(self._detectors, self._layout, self._reference, self._budget)
        return self._evidence

    def _alarming(self) -> bool:
        shown = self._evidence_now()
        return shown is not None and shown.alarming

    def _alarms(self, shown: Readings) -> list[Alarm]:
        alarms = shown.alarms
        found = [
            self._alarm(shown, kind, feature) for kind in KINDS for feature in np.flatnonzero(alarms[kind]).tolist()
        ]
        found.sort(key=lambda alarm: alarm.log10_limit - alarm.log10_evalue)
        if shown.common.alarm:
            # It goes first: it says what the others are compared with.
            stand_out = [alarm.feature for alarm in found if alarm.kind == "rate"]
            found.insert(0, common_alarm(shown.common, stand_out, self._canary_moved(shown)))
        return found

    def _canary_moved(self, shown: Readings) -> bool | None:
        assert self._reference is not None
        runs = bool((self._reference.canary_N >= 2).any() and self._detectors.canary_F.any())
        return bool(shown.alarms["canary"].any()) if runs else None

    def _alarm(self, shown: Readings, kind: str, feature: int) -> Alarm:
        partner = int(shown.partner_F[feature])
        return with_text(
            Alarm(
                feature=self._features[feature],
                kind=kind,
                direction="up" if shown.direction[kind][feature] == RISE else "down",
                log10_evalue=float(shown.log10_evalue[kind][feature]),
                log10_limit=shown.log10_limit[kind],
                since_seconds=float(shown.since_seconds[kind][feature]),
                rate_ratio=finite(shown.ratio_F[feature]),
                rate_ratio_low=finite(shown.ratio_low_F[feature]),
                rate_ratio_high=finite(shown.ratio_high_F[feature]),
                replica=self._replicas[int(shown.replica_F[feature])] if kind == "replica" else "",
                partner=self._features[partner] if kind == "coactivation" and partner >= 0 else "",
                canary_moved=self._canary_moved(shown),
                requests=self._examples.of(feature),
            )
        )
