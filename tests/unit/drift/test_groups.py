"""Replicas, adapters and routes in one model's drift: told apart within bounds, and never counted as another's."""

from __future__ import annotations

import numpy as np
from latentwatch.aggregate.counts import Layout
from latentwatch.aggregate.features import FeatureTable
from latentwatch.drift.detection import Budget
from latentwatch.drift.model import ModelDrift

from tests.support.streams import sparse

FEATURES = [sparse("a"), sparse("b")]
LAYOUT = Layout.of(FeatureTable.of(FEATURES), FEATURES)


def made() -> ModelDrift:
    return ModelDrift("toy", ["a", "b"], LAYOUT, Budget(), None)


def serve(model: ModelDrift, replica: str, adapters: list[str], now: float) -> None:
    n = len(adapters)
    model.add(replica, adapters, ["r"] * n, np.ones((n, 2), np.int64), np.ones((n, 2)), now)


def test_names_that_come_once_take_no_place_from_those_of_later_windows():
    """A route is what a client writes into its request's id."""
    model = made()
    serve(model, "pod-0", [f"invented-{i}" for i in range(300)], 1000.0)
    model.close_windows(2000.0)
    serve(model, "pod-1", ["chat"], 2001.0)
    state = model.state()
    assert state.groups == [("pod-1", "chat")] and state.counts.levels_GFB[0].any()


def test_what_is_beyond_the_bound_is_counted_as_nobodys():
    model = made()
    serve(model, "pod-0", [f"invented-{i}" for i in range(300)], 1000.0)
    serve(model, "pod-1", ["chat"], 1001.0)
    state = model.state()
    requests = state.counts.requests_GF[: len(state.groups), 0].tolist()
    assert len(state.groups) == 256 and state.groups[-1] == ("(others)", "(others)")
    assert requests[:-1] == [1] * 255 and requests[-1] == 300 + 1 - 255


def test_pods_that_were_replaced_give_their_places_to_those_that_run_and_survive_a_restart():
    model = made()
    for day in range(400):
        serve(model, f"pod-{day}", [""], 1000.0 + 86_400.0 * day)
        if day == 300:
            again = made()
            again.restore(model.state())
            model = again
    state = model.state()
    names = [place.replica for place in state.replicas]
    assert len(names) <= 257 and state.groups == [("pod-399", "")] and "pod-399" in names and "pod-0" not in names
    assert state.detectors.replica_2DF.shape[1] <= 2 * 257
