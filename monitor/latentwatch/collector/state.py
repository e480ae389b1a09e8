"""What a collector knows, as data: what happens to it is in `ingest`, `closing` and `federation.merge`, what is read of
it in `lookup`.

Shape legend: F features, H hook points.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from latentwatch.aggregate.features import FeatureTable
from latentwatch.aggregate.histogram import (
    LAG_EDGES,
    NORM_EDGES,
    Histograms,
    ScalarHistogram,
    ScalarHistogramState,
)
from latentwatch.aggregate.requests import RequestStates, StatisticsState
from latentwatch.aggregate.window import WindowRing, WindowRingState
from latentwatch.arrays import Array, axes, check
from latentwatch.collector.config import Bounds
from latentwatch.collector.exceedances import ExceedanceRing, ExceedanceRingState
from latentwatch.collector.remote_requests import RemoteRequests, RemoteRequestsState
from latentwatch.collector.replicas import Boot, Replicas, ReplicasState
from latentwatch.collector.requests import (
    RequestIndex,
    RequestIndexState,
    Roster,
    Slots,
    SlotsState,
    TrackedRequestState,
)
from latentwatch.collector.totals import EngineTotals, Exemplar, ModelTotals
from latentwatch.names import Outcome, Phase, trace_id
from latentwatch.transport.report import TOKEN_SHAPE
from latentwatch.watchlist.file import Watchlist

_MAX_SERIAL: Final = 1 << 62
"""Serials are int64 in arrays, and rise by one with each request: nobody comes there by counting."""


@dataclass
class EngineCounts:
    """Counts of one (model_name, engine)."""

    tokens: Array = field(default_factory=lambda: np.zeros(TOKEN_SHAPE, np.int64))
    requests: Counter[Outcome] = field(default_factory=Counter)


@dataclass
class ModelCounts:
    """Counts of one served model name."""

    fired_F: Array = field(metadata=axes("F", dtype=np.int64))
    requests_F: Array = field(metadata=axes("F", dtype=np.int64))
    exceedances_F: Array = field(metadata=axes("F", dtype=np.int64))
    statistic: Histograms
    norm: Histograms
    latest: dict[int, Exemplar] = field(default_factory=dict)

    def totals(self, name: str) -> ModelTotals:
        """The counts under their name; copies."""
        return ModelTotals(
            model_name=name,
            fired_F=self.fired_F.copy(),
            requests_F=self.requests_F.copy(),
            exceedances_F=self.exceedances_F.copy(),
            statistic=self.statistic.copy(),
            norm=self.norm.copy(),
            latest=dict(self.latest),
        )

    def restore(self, state: ModelCounts) -> None:
        """Go on from the counts of a state. Raises ValueError where they are of other features or bounds."""
        check(state, F=len(self.fired_F))
        if any(not 0 <= feature < len(self.fired_F) for feature in state.latest):
            raise ValueError(f"it has exemplars of features {sorted(state.latest)}")
        self.fired_F, self.requests_F = state.fired_F.copy(), state.requests_F.copy()
        self.exceedances_F, self.latest = state.exceedances_F.copy(), dict(state.latest)
        # Together with counts of nothing: that checks the bounds.
        self.statistic, self.norm = self.statistic.merge(state.statistic), self.norm.merge(state.norm)


@dataclass
class Totals:
    """Plain counts of a collector."""

    messages: int = 0
    duplicates: int = 0
    lost_sequences: int = 0
    requests_evicted: int = 0
    excess_tokens: int = 0


@dataclass(frozen=True)
class EngineCountsState:
    """EngineCounts of one engine."""

    model_name: str
    engine: str
    tokens: Array = field(metadata=axes("states", "reasons", "phases", dtype=np.int64))
    requests: list[int]
    """By Outcome, in the order of its values."""

    def check(self) -> None:
        """Raise ValueError where the counts are of other states, reasons or phases."""
        check(self, **dict(zip(("states", "reasons", "phases"), TOKEN_SHAPE, strict=True)))


@dataclass(frozen=True)
class CollectorStateData:
    """A CollectorState as values that nothing changes."""

    replicas: ReplicasState
    slots: SlotsState
    statistics: StatisticsState
    index: RequestIndexState
    exceedances: ExceedanceRingState
    remote: RemoteRequestsState
    windows: WindowRingState
    engines: list[EngineCountsState]
    models: dict[str, ModelCounts]
    lag: ScalarHistogramState
    refused: dict[str, int]
    last_serial: int
    totals: Totals
    requests: list[TrackedRequestState]
    """Every one that the parts above point to by its serial."""


class CollectorState:
    """Everything that the next batch or reading depends on, but for what its listeners remember."""

    def __init__(self, watchlist: Watchlist, bounds: Bounds) -> None:
        """Nothing seen yet. Args: watchlist: with every limit that counts."""
        self.watchlist = watchlist
        self.features = watchlist.features
        self.bounds = bounds
        self.table = FeatureTable.of(self.features)
        self.slots = Slots(bounds.open_requests)
        self.scratch = bounds.open_requests
        """One slot more: rows of requests that found no slot are computed there and thrown away."""
        self.statistics = RequestStates(self.table, bounds.open_requests + 1)
        self.index = RequestIndex(bounds.closed_requests, bounds.flagged_requests)
        self.exceedances = ExceedanceRing(bounds.exceedances)
        self.windows = WindowRing(len(self.features), bounds.windows, bounds.window_seconds)
        self.replicas = Replicas(watchlist.sha256, bounds)
        self.remote = RemoteRequests(bounds.open_requests)
        self.engines: dict[tuple[str, str], EngineCounts] = {}
        self.models: dict[str, ModelCounts] = {}
        self.last_serial = 0
        self.lag = ScalarHistogram(LAG_EDGES)
        self.refused: Counter[str] = Counter()
        self.totals = Totals()

    def engine(self, key: tuple[str, str]) -> EngineCounts:
        """Counts of a (model_name, engine)."""
        return self.engines.setdefault(key, EngineCounts())

    def model(self, name: str) -> ModelCounts:
        """Counts of a served model name."""
        if name not in self.models:
            self.models[name] = self.new_model()
        return self.models[name]

    def new_model(self) -> ModelCounts:
        """Counts of nothing, over this watchlist."""
        F, H = len(self.features), len(self.watchlist.hooks)
        return ModelCounts(
            fired_F=np.zeros(F, np.int64),
            requests_F=np.zeros(F, np.int64),
            exceedances_F=np.zeros(F, np.int64),
            statistic=Histograms.empty(self.table.edges_FB),
            norm=Histograms.empty(np.tile(NORM_EDGES, (H, 1))),
        )

    def list_exceedances(self, model: ModelCounts, exceedances: Array, requests: Array) -> None:
        """List EXCEEDANCE of these requests, all of one model, and each feature's latest as its exemplar."""
        self.exceedances.add(exceedances, requests)
        features, from_end = np.unique(exceedances["feature"][::-1], return_index=True)
        for feature, i in zip(features.tolist(), (len(exceedances) - 1 - from_end).tolist(), strict=True):
            info, latest = requests[i].info, exceedances[i]
            model.latest[feature] = Exemplar(
                info.request_id, trace_id(info.traceparent), float(latest["value"]), float(latest["seconds"])
            )

    def state(self) -> CollectorStateData:
        """Everything; later batches do not change it."""
        roster = Roster()
        return CollectorStateData(
            replicas=self.replicas.state(),
            slots=self.slots.state(roster),
            statistics=self.statistics.state(self.slots.occupied),
            index=self.index.state(roster),
            exceedances=self.exceedances.state(roster),
            remote=self.remote.state(roster),
            windows=self.windows.state(),
            engines=[
                EngineCountsState(*key, engine.tokens.copy(), [engine.requests[outcome] for outcome in Outcome])
                for key, engine in self.engines.items()
            ],
            models={name: copy.deepcopy(model) for name, model in self.models.items()},
            lag=self.lag.state(),
            refused=dict(self.refused),
            last_serial=self.last_serial,
            totals=copy.copy(self.totals),
            # Last: every part above adds its own.
            requests=roster.state(),
        )

    def restore(self, state: CollectorStateData) -> None:
        """Go on from `state`, where nothing was seen yet, with the same watchlist and bounds.

        Raises ValueError where it does not fit them, or not together.
        """
        roster = Roster.of(state.requests)
        self.slots.restore(state.slots, roster, self.replicas.restore(state.replicas))
        self.statistics.restore(state.slots.slots, state.statistics)
        self.index.restore(state.index, roster)
        self.exceedances.restore(state.exceedances, roster)
        self.remote.restore(state.remote, roster)
        self.windows.restore(state.windows)
        for of_engine in state.engines:
            of_engine.check()
            requests = Counter(dict(zip(Outcome, of_engine.requests, strict=True)))
            self.engines[of_engine.model_name, of_engine.engine] = EngineCounts(of_engine.tokens.copy(), requests)
        for name, counts in state.models.items():
            self.model(name).restore(counts)
        self.lag.restore(state.lag)
        self.refused.update(state.refused)
        self.last_serial, self.totals = state.last_serial, copy.copy(state.totals)
        parts = (state.slots.serials, state.index.summaries.serials, state.remote.summaries.serials)
        for serial in np.sort(np.concatenate(parts)).tolist():
            self.index.add(roster.request(serial))
        self._check_references(state)

    def _check_references(self, state: CollectorStateData) -> None:
        """Raise ValueError where a restored state points to what is not there."""
        if state.last_serial >= _MAX_SERIAL:
            raise ValueError(f"its last request has serial {state.last_serial}")
        listed, summaries = state.exceedances.exceedances, (state.index.summaries, state.remote.summaries)
        features = np.concatenate([listed["feature"], *(some.rows["index"] for some in summaries)])
        if ((features < 0) | (features >= len(self.features))).any() or not np.isin(listed["phase"], list(Phase)).all():
            raise ValueError("it has features or phases that there are not")
        for request in self.slots.requests[self.slots.occupied]:
            info = request.info
            if info.model_name not in self.models or (info.model_name, info.engine) not in self.engines:
                raise ValueError(f"it has no counts of model {info.model_name!r} and engine {info.engine!r}")

    def engine_totals(self) -> tuple[EngineTotals, ...]:
        """Copies of the engines' counts, by name."""
        opened: Counter[tuple[str, str]] = Counter()
        for replica in self.replicas.known.values():
            for boot in replica.boots.values():
                opened[boot.hello.model_name, boot.hello.engine] += open_requests(boot)
        return tuple(
            EngineTotals(
                model_name=key[0],
                engine=key[1],
                tokens=engine.tokens.copy(),
                requests={outcome: engine.requests[outcome] for outcome in Outcome},
                open_requests=opened[key],
            )
            for key, engine in sorted(self.engines.items(), key=lambda item: item[0])
        )

    def model_totals(self) -> tuple[ModelTotals, ...]:
        """Copies of the models' counts, by name."""
        return tuple(model.totals(name) for name, model in sorted(self.models.items()))


def open_requests(boot: Boot) -> int:
    """Of an engine that streams here, or to a collector that forwards for it."""
    return len(boot.handles) + boot.remote_open_requests
