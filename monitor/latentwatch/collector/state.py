"""What a collector knows, as data: what happens to it is in `ingest`, `closing` and `federation.merge`, what is read of
it in `lookup`.

Shape legend: F features, H hook points.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from latentwatch.aggregate.features import FeatureTable
from latentwatch.aggregate.histogram import LAG_EDGES, NORM_EDGES, Histograms, ScalarHistogram
from latentwatch.aggregate.requests import RequestStates
from latentwatch.aggregate.window import WindowRing
from latentwatch.collector.config import Bounds
from latentwatch.collector.durability.checkpoint import State
from latentwatch.collector.exceedances import EVENT_DTYPE, ExceedanceRing
from latentwatch.collector.remote_requests import RemoteRequests
from latentwatch.collector.replicas import Boot, Replicas
from latentwatch.collector.requests import RequestIndex, Roster, Slots
from latentwatch.collector.snapshot import EngineTotals, Exemplar, ModelTotals
from latentwatch.names import Outcome, trace_id
from latentwatch.transport.report import TOKEN_SHAPE
from latentwatch.watchlist.file import Watchlist

Array = npt.NDArray[Any]

_MODEL_COLUMNS: Final = ("fired_F", "requests_F", "exceedances_F")


@dataclass
class EngineCounts:
    """Counts of one (model_name, engine)."""

    tokens: Array = field(default_factory=lambda: np.zeros(TOKEN_SHAPE, np.int64))
    requests: Counter[Outcome] = field(default_factory=Counter)


@dataclass
class ModelCounts:
    """Counts of one served model name."""

    fired_F: Array
    requests_F: Array
    exceedances_F: Array
    statistic: Histograms
    norm: Histograms
    latest: dict[int, Exemplar] = field(default_factory=dict)

    def state(self) -> State:
        """Everything, for `restore`; copies."""
        return {name: getattr(self, name).copy() for name in _MODEL_COLUMNS} | {
            "statistic": self.statistic.state(),
            "norm": self.norm.state(),
            "latest": [[feature, *astuple(exemplar)] for feature, exemplar in self.latest.items()],
        }

    def restore(self, state: State) -> None:
        """Go on from `state`."""
        for name in _MODEL_COLUMNS:
            getattr(self, name)[:] = state[name]
        self.statistic.restore(state["statistic"])
        self.norm.restore(state["norm"])
        self.latest.update((feature, Exemplar(*exemplar)) for feature, *exemplar in state["latest"])


@dataclass
class Totals:
    """Plain counts of a collector."""

    messages: int = 0
    duplicates: int = 0
    lost_sequences: int = 0
    requests_evicted: int = 0
    excess_tokens: int = 0


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
            F, H = len(self.features), len(self.watchlist.hooks)
            self.models[name] = ModelCounts(
                fired_F=np.zeros(F, np.int64),
                requests_F=np.zeros(F, np.int64),
                exceedances_F=np.zeros(F, np.int64),
                statistic=Histograms.empty(self.table.edges_FB),
                norm=Histograms.empty(np.tile(NORM_EDGES, (H, 1))),
            )
        return self.models[name]

    def list_exceedances(self, model: ModelCounts, crossed: Array, requests: Array) -> None:
        """List crossings (CROSSED_DTYPE) of these requests, all of one model, and keep each feature's latest."""
        events = np.zeros(len(crossed), EVENT_DTYPE)
        events["peak"] = np.nan
        for name in ("feature", "phase", "position", "value", "seconds"):
            events[name] = crossed[name]
        self.exceedances.add(events, requests)
        features, from_end = np.unique(crossed["feature"][::-1], return_index=True)
        for feature, i in zip(features.tolist(), (len(crossed) - 1 - from_end).tolist(), strict=True):
            request = requests[i]
            model.latest[feature] = Exemplar(
                request.request_id,
                trace_id(request.traceparent),
                float(crossed["value"][i]),
                float(crossed["seconds"][i]),
            )

    def state(self) -> State:
        """Everything, as values that later batches do not change, for `restore`."""
        slots, roster = self.slots.taken, Roster()
        state = {
            "replicas": self.replicas.state(),
            "slots": self.slots.state(roster),
            "features": self.statistics.state(slots),
            "index": self.index.state(roster),
            "events": self.exceedances.state(roster),
            "windows": self.windows.state(),
            "engines": [
                [*key, engine.tokens.copy(), [engine.requests[outcome] for outcome in Outcome]]
                for key, engine in self.engines.items()
            ],
            "models": {name: model.state() for name, model in self.models.items()},
            "lag": {"counts": list(self.lag.counts), "sum": self.lag.sum},
            "refused": dict(self.refused),
            "last_serial": self.last_serial,
            "totals": asdict(self.totals),
            "elsewhere": self.remote.state(roster),
        }
        return state | {"requests": roster.state()}

    def restore(self, state: State) -> None:
        """Go on from `state`, where nothing was seen yet, with the same watchlist and bounds."""
        roster = Roster.of(state["requests"])
        handles = self.replicas.restore(state["replicas"])
        self.slots.restore(state["slots"], roster, handles)
        self.statistics.restore(self.slots.taken, state["features"])
        self.index.restore(state["index"], roster)
        self.exceedances.restore(state["events"], roster)
        self.windows.restore(state["windows"])
        for model_name, engine, tokens, requests in state["engines"]:
            self.engines[model_name, engine] = EngineCounts(tokens, Counter(dict(zip(Outcome, requests, strict=True))))
        for name, counts in state["models"].items():
            self.model(name).restore(counts)
        self.lag.counts[:], self.lag.sum = state["lag"]["counts"], state["lag"]["sum"]
        self.refused.update(state["refused"])
        self.last_serial, self.totals = state["last_serial"], Totals(**state["totals"])
        self.remote.restore(state["elsewhere"], roster)
        parts = (state["slots"]["serials"], state["index"]["serial"], state["elsewhere"]["serial"])
        for serial in sorted(serial for serials in parts for serial in serials):
            self.index.named(serial, roster.request(serial).request_id)

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
        return tuple(
            ModelTotals(
                model_name=name,
                fired_F=model.fired_F.copy(),
                requests_F=model.requests_F.copy(),
                exceedances_F=model.exceedances_F.copy(),
                statistic=model.statistic.copy(),
                norm=model.norm.copy(),
                latest=dict(model.latest),
            )
            for name, model in sorted(self.models.items())
        )


def open_requests(boot: Boot) -> int:
    """Of an engine that streams here, or to a collector that forwards for it."""
    return len(boot.handles) + boot.remote_open_requests
