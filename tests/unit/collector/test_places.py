"""Who has a place in a collector's bounded tables, who gives it up, and who may send what."""

from __future__ import annotations

import numpy as np
import pytest
from latentwatch.aggregate.histogram import NORM_EDGES
from latentwatch.collector.config import Bounds
from latentwatch.collector.core import Core
from latentwatch.errors import StreamRefused
from latentwatch.names import Reason
from latentwatch.step.batch import EngineCounters, StepBatch
from latentwatch.step.reshape import without_scores
from latentwatch.transport.report import ModelDelta, ReplicaState, Report
from latentwatch.watchlist.file import Limit

from tests.support.streams import Schedule, hello, probe, received, received_report, sparse, tokens, watchlist

FEATURES = (sparse("jailbreak", limit=Limit("max", 3.0)), probe("deceive", limit=Limit("rolling_mean", 1.0, 4)))


def core(**bounds: float) -> Core:
    return Core(watchlist(FEATURES), Bounds(**bounds))


def served(made: Core, name: str, now: float, *, replica: str = "", tokens_: int = 4) -> None:
    """One request of this model begins and ends, on an engine that comes and goes."""
    engine = hello(replica=replica or f"pod-{name}/0", model_name=name)
    held = made.ingest.hello(engine, now)
    rng = np.random.default_rng(1)
    batches = Schedule.one_step([tokens(rng, FEATURES, handle=1, total=tokens_, prompt_tokens=2)]).batches(FEATURES)
    for sequence, batch in enumerate(batches, start=held + 1):
        made.ingest.observe(engine, received(sequence, batch), now)


def models_of(made: Core) -> list[str]:
    return [model.model_name for model in made.lookup.snapshot(0.0).models]


def test_a_model_that_nobody_serves_any_more_gives_its_place_to_the_next_one_the_oldest_first():
    made = core(models=3)
    for i in range(9):
        served(made, f"model-{i}", 1000.0 + 10 * i)
        made.ingest.goodbye(hello(replica=f"pod-model-{i}/0", model_name=f"model-{i}"), 1001.0 + 10 * i)
    assert models_of(made) == ["model-6", "model-7", "model-8"]
    assert [e.model_name for e in made.lookup.snapshot(0.0).engines] == ["model-6", "model-7", "model-8"]
    assert [view.model_name for view in made.lookup.snapshot(0.0).drift] == ["model-6", "model-7", "model-8"]
    again = Core(watchlist(FEATURES), Bounds(models=3))
    again.restore(made.state())
    served(again, "model-9", 2000.0)
    assert models_of(again) == ["model-7", "model-8", "model-9"], "and over a restart"


def test_a_name_that_is_idle_for_a_day_goes_by_itself_and_one_that_streams_or_has_requests_stays():
    made = core()
    for name in ("gone", "here"):
        served(made, name, 1000.0)
    made.ingest.goodbye(hello(replica="pod-gone/0", model_name="gone"), 1001.0)
    for minute in range(1440):
        made.ingest.tick(1002.0 + 60 * minute)
    assert models_of(made) == ["gone", "here"]
    made.ingest.tick(1001.0 + made.bounds.name_idle_seconds + 60)
    assert models_of(made) == ["here"]
    served(made, "gone", 200_000.0)
    (fired,) = {model.requests_F.sum() for model in made.lookup.snapshot(0.0).models if model.model_name == "gone"}
    assert fired <= len(FEATURES), "it begins at zero"


def test_names_that_serve_nothing_do_not_keep_out_an_engine_that_does():
    """Whoever may open streams may say any name: one that counted nothing for a minute is no more than said."""
    made = core(models=3, replicas=4)
    served(made, "good", 1000.0)
    for i in range(3):
        try:
            made.ingest.hello(hello(replica=f"hostile-{i}", model_name=f"invented-{i}"), 1000.0)
        except StreamRefused as refused:
            assert refused.reason == "too_many_models"
    with pytest.raises(StreamRefused, match="3 models"):
        made.ingest.hello(hello(replica="late", model_name="late"), 1030.0)
    served(made, "late", 1061.0, replica="late")
    assert {"good", "late"} <= set(models_of(made)), "the oldest name that serves nothing went"
    served(made, "good", 1062.0)
    with pytest.raises(StreamRefused) as refused:
        made.ingest.observe(hello(replica="hostile-0", model_name="invented-0"), received(1, StepBatch(1, 1)), 1063.0)
    assert refused.value.reason == "unknown_boot", "it may say hello again, and takes its turn"


def test_replicas_that_are_gone_give_their_places_and_one_that_streams_keeps_its_own():
    made = core(replicas=3)
    served(made, "toy", 1000.0, replica="good")
    for i in range(20):
        pod = hello(replica=f"crashing-{i}", model_name="toy")
        made.ingest.hello(pod, 1001.0 + i)
        made.ingest.goodbye(pod, 1001.5 + i)
    assert {replica.replica for replica in made.lookup.snapshot(0.0).replicas} == {
        "good",
        "crashing-18",
        "crashing-19",
    }


def test_an_engine_that_said_it_is_not_armed_may_not_send_scores():
    """They would be of another watchlist, or of none: nothing of the batch is counted."""
    made = core()
    refused_engine = hello(armed=False, not_armed_reason="watchlist_mismatch", watchlist_sha256="")
    made.ingest.hello(refused_engine, 1000.0)
    rng = np.random.default_rng(1)
    (batch,) = Schedule.one_step([tokens(rng, FEATURES, handle=1, total=4, prompt_tokens=2)]).batches(FEATURES)
    with pytest.raises(StreamRefused, match="not armed") as refused:
        made.ingest.observe(refused_engine, received(1, batch), 1001.0)
    assert refused.value.reason == "scores_unarmed"
    shown = made.lookup.snapshot(0.0)
    assert not shown.engines[0].tokens.any() and shown.collector.messages == 0
    made.ingest.observe(refused_engine, received(1, without_scores(batch, Reason.NOT_ARMED)), 1002.0)
    assert made.lookup.snapshot(0.0).engines[0].tokens.sum() == 4


def gateway_with(report: Report, now: float = 1000.0, **bounds: float) -> Core:
    made = core(**bounds)
    made.ingest.hello(SIDECAR, now)
    made.ingest.merge(SIDECAR, received_report(1, report), now)
    return made


SIDECAR = hello(replica="sidecar", boot_id="f" * 32, engine="", model_name="", engine_version="", forwards=True)


@pytest.mark.parametrize("clock", [0.0, -100_000.0, 100_000.0])
def test_a_replica_that_left_a_sidecar_stays_as_long_whatever_the_clock_of_the_sidecar(clock):
    now = 1_000_000.0
    left = ReplicaState(hello(), False, now + clock - 60.0, 0, EngineCounters())
    made = gateway_with(Report(int((now + clock) * 1e9), replicas=(left,)), now)
    for waited, there in ((1.0, True), (800.0, True), (900.0, False)):
        made.ingest.tick(now + waited)
        shown = {replica.replica for replica in made.lookup.snapshot(now).replicas}
        assert ("pod-0/0" in shown) is there, waited


def test_models_that_a_report_names_without_an_engine_have_a_bound_too():
    made, sequence = core(models=3), 1
    made.ingest.hello(SIDECAR, 1000.0)
    for i in range(9):
        F, zero = len(FEATURES), np.zeros
        delta = ModelDelta(
            model_name=f"model-{i}",
            fired_F=zero(F, np.int64),
            requests_F=zero(F, np.int64),
            exceedances_F=zero(F, np.int64),
            statistic_FB=zero((F, 11), np.int64),
            statistic_sum_F=zero(F),
            norm_HB=zero((1, len(NORM_EDGES) + 1), np.int64),
            norm_sum_H=zero(1),
            peak_F=np.full(F, -np.inf, np.float32),
        )
        report = Report(int(1000e9), models=(delta,))
        made.ingest.merge(SIDECAR, received_report(sequence, report), 1000.0 + i)
        sequence += 1
    assert models_of(made) == ["model-6", "model-7", "model-8"]
