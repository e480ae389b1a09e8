"""What a gateway shows is what its sidecars counted: totals to the token, each request as its sidecar shows it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.client_ids import IdKind
from latentwatch.collector.config import Bounds
from latentwatch.collector.core import Core
from latentwatch.collector.durability.journal import DurableSink
from latentwatch.errors import StreamRefused
from latentwatch.evidence.records import Activations, Ended, Exceeded, Record
from latentwatch.facts import EXCEEDANCE, FEATURE_STAT
from latentwatch.names import Outcome, Severity
from latentwatch.step.batch import EngineCounters, StepBatch
from latentwatch.transport import codec
from latentwatch.transport.codec.fields import MAX_COUNT
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import ReplicaState, Report, RequestRow
from latentwatch.transport.sink import ReceivedReport
from latentwatch.watchlist.file import Limit

from tests.support.streams import Schedule, hello, probe, received, received_report, sparse, tokens, watchlist

FEATURES = (
    sparse("jailbreak", limit=Limit("max", 3.0), severity=Severity.CRITICAL),
    sparse("weather"),
    sparse("bos", limit=Limit("max", 0.1), skip=1),
    probe("deceive", limit=Limit("rolling_mean", 1.0, 4)),
    probe("mood", limit=Limit("max", 2.0, phase="output")),
)
BOUNDS = Bounds()


def core(bounds: Bounds = BOUNDS, **parts: Any) -> Core:
    return Core(watchlist(FEATURES), bounds, **parts)


def forwarder(name: str = "sidecar", boot: str = "f" * 32) -> Hello:
    return hello(replica=name, boot_id=boot, engine="", model_name="", engine_version="", forwards=True)


def sidecar(number: int = 0, bounds: Bounds = BOUNDS) -> Core:
    return core(bounds, forward_boot_id=f"{number:032x}")


def batches(seed: int, requests: int = 6) -> list[StepBatch]:
    rng = np.random.default_rng(seed)
    made = [
        tokens(rng, FEATURES, handle=i, total=int(rng.integers(2, 40)), prompt_tokens=2) for i in range(1, requests + 1)
    ]
    named = [replace(request, request_id=f"chatcmpl-{seed}-{request.handle}-0123abcd") for request in made]
    return Schedule.random(rng, named, 9).batches(FEATURES)


def carry(source: Core, gateway: Core, who: Hello, now: float = 2000.0, *, twice: bool = False) -> None:
    """Everything that waits, over the wire's bytes; acknowledged. `twice`: as when the ack got lost."""
    assert source.outbox is not None
    for _ in range(1 + twice):
        for number, report in list(source.outbox.reports):
            decoded = codec.decode_request(codec.encode_report(number, report))
            assert isinstance(decoded, ReceivedReport)
            gateway.ingest.merge(who, decoded, now)
    source.ingest.acknowledged(max((number for number, _ in source.outbox.reports), default=0))


def same_totals(gateway: Core, *sidecars: Core) -> None:
    """Every count of the gateway is the sum of the sidecars'."""
    shown, summed = gateway.lookup.snapshot(0), [made.lookup.snapshot(0) for made in sidecars]
    for engine in shown.engines:
        parts = [e for s in summed for e in s.engines if (e.model_name, e.engine) == (engine.model_name, engine.engine)]
        assert np.array_equal(engine.tokens, sum(part.tokens for part in parts))
        assert engine.requests == {o: sum(part.requests[o] for part in parts) for o in Outcome}
        assert engine.open_requests == sum(part.open_requests for part in parts)
    for model in shown.models:
        parts = [m for s in summed for m in s.models if m.model_name == model.model_name]
        for column in ("fired_F", "requests_F", "exceedances_F"):
            assert np.array_equal(getattr(model, column), sum(getattr(part, column) for part in parts))
        for histogram in ("statistic", "norm"):
            held = [getattr(part, histogram) for part in parts]
            assert np.array_equal(getattr(model, histogram).counts_FB, sum(part.counts_FB for part in held))
            assert np.allclose(getattr(model, histogram).sum_F, sum(part.sum_F for part in held))
    assert {(e.model_name, e.engine) for e in shown.engines} == {
        (e.model_name, e.engine) for s in summed for e in s.engines
    }


def same_requests(gateway: Core, source: Core, replica: str) -> None:
    """Each ended request looks the same at both."""
    views = [source.lookup.request(serial) for serial in source.lookup.latest(1000)]
    for view in (view for view in views if view and view.outcome != "open"):
        (there,) = [gateway.lookup.request(serial) for serial in gateway.lookup.find(view.request_id)]
        assert there is not None and there.replica == replica
        assert repr(there) == repr(view)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_a_gateway_shows_what_its_sidecars_counted(seed, data):
    """However steps, ticks, deliveries, lost acks and a sidecar's restart from its state fall together."""
    gateway, sources = core(), [sidecar(1), sidecar(2)]
    engines = [hello(replica=f"pod-{i}/0", engine=str(i), boot_id=f"{i:032x}") for i in range(2)]
    who = [forwarder(f"pod-{i}", f"{i + 1:032x}") for i in range(2)]
    for source, engine, name in zip(sources, engines, who, strict=True):
        source.ingest.hello(engine, 1000.0)
        gateway.ingest.hello(name, 1000.0)
    steps = [batches(seed + i) for i in range(2)]
    for number in range(max(len(s) for s in steps)):
        for i in range(2):
            if number < len(steps[i]):
                sources[i].ingest.observe(engines[i], received(number + 1, steps[i][number]), 1000.0 + number)
            if data.draw(st.booleans()):
                sources[i].ingest.tick(1000.0 + number)
            if data.draw(st.integers(0, 3)) == 0:
                again = sidecar(99)
                again.restore(sources[i].state())
                sources[i] = again
            if data.draw(st.integers(0, 2)) == 0:
                carry(sources[i], gateway, who[i], 1000.0 + number, twice=data.draw(st.booleans()))
    for source, name in zip(sources, who, strict=True):
        for _ in range(2):
            source.ingest.tick(1900.0)
            carry(source, gateway, name)
    same_totals(gateway, *sources)
    for i, source in enumerate(sources):
        assert source.outbox is not None and source.outbox._untold_count == len(source.outbox._untold) == 0
        same_requests(gateway, source, f"pod-{i}/0")
    shown = sorted((e.request_id, e.feature, e.position, e.seconds) for e in gateway.lookup.exceedances(1000))
    each = [e for source in sources for e in source.lookup.exceedances(1000)]
    counted = sorted((e.request_id, e.feature, e.position, e.seconds) for e in each)
    assert shown == counted
    assert sum(view.requests for view in gateway.drift.views()) <= 12
    restored = core()
    restored.restore(gateway.state())
    same_totals(restored, *sources)
    same_requests(restored, sources[0], "pod-0/0")


def test_health_of_the_engines_behind_a_sidecar_is_shown_and_goes_with_its_stream():
    gateway, source = core(), sidecar()
    source.ingest.hello(hello(), 1000.0)
    gateway.ingest.hello(forwarder(), 1000.0)
    source.ingest.tick(1001.0)
    carry(source, gateway, forwarder())
    (replica,), (shown,) = gateway.lookup.snapshot(0).replicas, gateway.lookup.snapshot(0).forwarders
    assert replica.replica == "pod-0/0" and replica.connected and shown.collector == "sidecar" and shown.connected
    gateway.ingest.goodbye(forwarder(), 1002.0)
    (replica,), (shown,) = gateway.lookup.snapshot(0).replicas, gateway.lookup.snapshot(0).forwarders
    assert not replica.connected and not shown.connected


def test_an_engine_that_boots_again_behind_a_sidecar_leaves_no_open_requests_at_the_gateway():
    gateway, source = core(), sidecar()
    gateway.ingest.hello(forwarder(), 1000.0)
    source.ingest.hello(hello(), 1000.0)
    source.ingest.observe(hello(), received(1, batches(3)[0]), 1000.0)
    source.ingest.tick(1001.0)
    carry(source, gateway, forwarder())
    assert gateway.lookup.snapshot(0).engines[0].open_requests > 0
    source.ingest.hello(hello(boot_id="1" * 32), 1002.0)
    source.ingest.tick(1003.0)
    carry(source, gateway, forwarder())
    same_totals(gateway, source)
    assert gateway.lookup.snapshot(0).engines[0].open_requests == 0


def test_an_open_request_that_crossed_a_limit_can_be_looked_up_at_the_gateway_before_it_ends():
    gateway, source = core(), sidecar()
    steps = batches(3, requests=1)
    source.ingest.hello(hello(), 1000.0)
    gateway.ingest.hello(forwarder(), 1000.0)
    for i, step in enumerate(steps[:-1], start=1):
        source.ingest.observe(hello(), received(i, step), 1000.0)
    source.ingest.tick(1001.0)
    assert source.lookup.exceedances(1), "the seed was chosen so that a limit is crossed before the last step"
    carry(source, gateway, forwarder())
    (serial,) = gateway.lookup.find("chatcmpl-3-1-0123abcd")
    view = gateway.lookup.request(serial)
    assert view is not None and view.outcome == "open" and view.closed_seconds is None and view.exceeded_features
    source.ingest.observe(hello(), received(len(steps), steps[-1]), 1002.0)
    source.ingest.tick(1003.0)
    carry(source, gateway, forwarder())
    assert gateway.lookup.find("chatcmpl-3-1-0123abcd") == [serial]
    ended = gateway.lookup.request(serial)
    assert ended is not None and ended.outcome == "finished"


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_an_open_request_ends_at_the_gateway_by_the_gateways_clock_also_when_it_is_set(jump):
    """Its sidecar's clock is another one, and says nothing of how long nothing came."""
    source, gateway = sidecar(), core()
    source.ingest.hello(hello(), 1000.0)
    for i, step in enumerate(batches(3, requests=1)[:-1], start=1):
        source.ingest.observe(hello(), received(i, step), 1000.0)
    source.ingest.tick(1001.0)
    gateway.ingest.hello(forwarder(), 500_000.0)
    carry(source, gateway, forwarder(), 500_000.0)
    (serial,) = gateway.lookup.find("chatcmpl-3-1-0123abcd")

    def outcome(now: float) -> str:
        gateway.ingest.tick(now)
        shown = gateway.lookup.request(serial)
        assert shown is not None
        return shown.outcome

    assert outcome(500_001.0) == "open"
    gateway.ingest.shift_clock(jump)
    assert outcome(500_002.0 + jump) == "open"
    assert outcome(500_001.0 + jump + BOUNDS.request_idle_seconds) == "lost"


def test_a_sidecar_that_ran_without_its_gateway_for_a_while_tells_it_what_it_missed_and_nothing_twice():
    gateway, source = core(), sidecar(1)
    gateway.ingest.hello(forwarder(), 1000.0)
    source.ingest.hello(hello(), 1000.0)
    for i, step in enumerate(steps := batches(3), start=1):
        if i == 4:
            source.ingest.tick(1000.0 + i)
            carry(source, gateway, forwarder())
        if i == len(steps) // 2:
            alone = core()
            alone.restore(source.state())
            source = alone
        source.ingest.observe(hello(), received(i, step), 1000.0 + i)
        if i == len(steps) - 2:
            again = sidecar(2)
            again.restore(source.state())
            source = again
    source.ingest.tick(1100.0)
    carry(source, gateway, forwarder())
    same_totals(gateway, source)


def test_a_gateway_that_is_away_costs_rows_beyond_the_bound_and_no_count():
    bounds = Bounds(forward_bytes=6_000)
    gateway, source = core(), sidecar(bounds=bounds)
    source.ingest.hello(hello(), 1000.0)
    gateway.ingest.hello(forwarder(), 1000.0)
    sequence = 0
    for second in range(30):
        for step in batches(second, requests=2):
            sequence += 1
            handles = step.segments_S.copy()
            handles["handle"] += 10 * second
            moved = replace(
                step,
                segments_S=handles,
                opened=tuple(replace(o, handle=o.handle + 10 * second) for o in step.opened),
                closed=tuple(replace(c, handle=c.handle + 10 * second) for c in step.closed),
            )
            source.ingest.observe(hello(), received(sequence, moved), 1000.0 + second)
        source.ingest.tick(1000.0 + second)
    facts = source.lookup.snapshot(0).forward
    assert facts is not None and facts.waiting_reports == 8 and facts.waiting_bytes <= bounds.forward_bytes
    assert facts.shed_requests > 0
    for _ in range(4):
        carry(source, gateway, forwarder())
        source.ingest.tick(1100.0)
    same_totals(gateway, source)
    (shown,) = gateway.lookup.snapshot(0).forwarders
    known = [serial for serial in gateway.lookup.latest(1000) if gateway.lookup.request(serial)]
    assert len(known) + shown.shed_requests == 60
    assert shown.shed_requests == facts.shed_requests
    assert len(gateway.lookup.exceedances(1000)) + shown.shed_exceedances == len(source.lookup.exceedances(1000))


def test_a_killed_sidecar_makes_the_same_reports_from_its_journal(tmp_path):
    steps = batches(5)
    first = DurableSink(made := sidecar(1), tmp_path, 1000.0)
    first.hello(hello(), 1000.0)
    for i, step in enumerate(steps, start=1):
        first.observe(hello(), received(i, step), 1000.0 + i)
        first.tick(1000.0 + i)
        if i == 4:
            first.acknowledged(3)
    first.commit()
    assert made.outbox is not None
    sent = [codec.encode_report(number, report) for number, report in made.outbox.reports]
    first._journal.close()
    first._folder.release()
    second = DurableSink(again := sidecar(2), tmp_path, 1000.0)
    assert again.outbox is not None and again.outbox.boot_id == made.outbox.boot_id
    assert [codec.encode_report(number, report) for number, report in again.outbox.reports] == sent
    assert asyncio.run(second.maintain(9e9)) is None


def test_a_request_that_is_deleted_waits_for_no_gateway():
    gateway, source = core(), sidecar()
    gateway.ingest.hello(forwarder(), 1000.0)
    source.ingest.hello(hello(), 1000.0)
    steps = batches(3)
    ended = [closed.request_id for step in steps for closed in step.closed]
    for i, step in enumerate(steps, start=1):
        source.ingest.observe(hello(), received(i, step), 1000.0 + i)
        if step is steps[-3]:
            source.ingest.tick(1050.0)
    for request_id in (ended[0], ended[-1]):
        source.forget({IdKind.REQUEST: (request_id,)})
        assert request_id not in repr(source.outbox.reports) + repr(source.outbox._plain) + repr(source.outbox._flagged)
    source.ingest.tick(1100.0)
    carry(source, gateway, forwarder())
    same_totals(gateway, source)
    assert not gateway.lookup.find(ended[0]) and not gateway.lookup.find(ended[-1]) and gateway.lookup.find(ended[1])


def test_a_gateways_evidence_has_the_exceedance_and_the_end_and_no_activations():
    records: list[Record] = []
    gateway, source = core(evidence=[records.extend]), sidecar()
    source.ingest.hello(hello(), 1000.0)
    gateway.ingest.hello(forwarder(), 1000.0)
    for i, step in enumerate(batches(3), start=1):
        source.ingest.observe(hello(), received(i, step), 1000.0 + i)
    source.ingest.tick(1100.0)
    carry(source, gateway, forwarder())
    exceedances = [record for record in records if isinstance(record, Exceeded)]
    ends = [record for record in records if isinstance(record, Ended)]
    assert len(exceedances) == len(source.lookup.exceedances(1000)) > 0
    assert {record.request.info.request_id for record in exceedances} == {
        record.request.info.request_id for record in ends
    }
    assert not [record for record in records if isinstance(record, Activations)]


def refused(gateway: Core, report: Report, who: Hello | None = None) -> StreamRefused:
    before = gateway.lookup.snapshot(0)
    with pytest.raises(StreamRefused) as refusal:
        gateway.ingest.merge(who or forwarder(), received_report(1, report), 2000.0)
    after = gateway.lookup.snapshot(0)
    assert repr(before.engines) == repr(after.engines) and before.replicas == after.replicas
    return refusal.value


def a_report(**changes: Any) -> Report:
    source = sidecar()
    source.ingest.hello(hello(), 1000.0)
    for i, step in enumerate(batches(3), start=1):
        source.ingest.observe(hello(), received(i, step), 1000.0 + i)
    source.ingest.tick(1100.0)
    assert source.outbox is not None
    return replace(source.outbox.reports[0][1], **changes)


def broken_row(**changes: Any) -> RequestRow:
    row = a_report().requests[0]
    inside = {name: replace(getattr(row, name), **of) for name, of in changes.items() if isinstance(of, dict)}
    return replace(row, **changes | inside)


def features(*index: int, **columns: Any) -> np.ndarray:
    rows = np.zeros(len(index), FEATURE_STAT)
    rows["index"] = index
    for name, value in columns.items():
        rows[name] = value
    return rows


def exceedance(**columns: Any) -> np.ndarray:
    rows = np.zeros(1, EXCEEDANCE)
    rows["phase"] = 1
    for name, value in columns.items():
        rows[name] = value
    return rows


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"features": features(9)}, "beyond the watchlist"),
        ({"features": features(1, 0)}, "not ascending"),
        ({"features": features(1, 1)}, "not ascending"),
        ({"features": features(-1)}, "beyond the watchlist"),
        ({"features": features(0, max=np.nan)}, "without its maximum"),
        ({"features": features(0, max=np.inf)}, "without its maximum"),
        ({"features": features(0, statistic=-np.inf)}, "infinite statistic"),
        ({"features": features(0, fired=-1)}, "less than never"),
        ({"exceedances": exceedance(feature=5)}, "no feature or no phase"),
        ({"exceedances": exceedance(phase=0)}, "no feature or no phase"),
        ({"exceedances": exceedance(value=np.nan)}, "no finite number"),
        ({"exceedances": exceedance(position=-1)}, "at no position"),
        *(
            ({"info": {"opened_seconds": seconds}}, "before 1970 or after 2037")
            for seconds in (float("inf"), float("nan"), 1e308, 1e300, 1e12, -1.0)
        ),
        ({"exceedances": exceedance(seconds=1e300)}, "before 1970 or after 2037"),
        ({"progress": {"tokens": np.zeros(3, np.int64)}}, "3 token counts"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_changes_nothing(row, found):
    gateway = core()
    gateway.ingest.hello(forwarder(), 1000.0)
    refusal = refused(gateway, a_report(requests=(broken_row(**row),)))
    assert refusal.reason == "malformed_batch" and found in refusal.found


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e300, -1.0])
def test_an_engine_that_was_seen_at_no_time_is_refused(seconds):
    gateway, report = core(), a_report()
    gateway.ingest.hello(forwarder(), 1000.0)
    state = ReplicaState(hello(), True, seconds, 0, EngineCounters())
    assert "was last seen at" in refused(gateway, replace(report, replicas=(state,))).found


def test_counts_of_another_shape_are_refused():
    gateway, report = core(), a_report()
    gateway.ingest.hello(forwarder(), 1000.0)
    model, engine = report.models[0], report.engines[0]
    for changed in (
        replace(report, models=(replace(model, fired_F=model.fired_F[:2]),)),
        replace(report, models=(replace(model, statistic_FB=model.statistic_FB[:, :3]),)),
        replace(report, models=(replace(model, norm_sum_H=model.norm_sum_H * np.nan),)),
        replace(report, models=(replace(model, peak_F=model.peak_F * np.nan),)),
        replace(report, engines=(replace(engine, requests=(1,)),)),
    ):
        assert refused(gateway, changed).reason == "malformed_batch"
    with pytest.raises(StreamRefused, match="more than"):
        huge = replace(engine, tokens=engine.tokens + MAX_COUNT)
        codec.decode_request(codec.encode_report(1, replace(report, engines=(huge,))))


def test_who_may_be_in_a_report():
    gateway, report = core(Bounds(replicas=2, models=1)), a_report()
    gateway.ingest.hello(forwarder(), 1000.0)
    (state,) = report.replicas

    def of(*hellos: Hello) -> Report:
        return replace(report, replicas=tuple(replace(state, hello=other) for other in hellos))

    assert refused(gateway, of(hello(watchlist_sha256="cd" * 32))).reason == "watchlist_mismatch"
    assert refused(gateway, of(forwarder("other"))).reason == "replica_twice"
    assert refused(gateway, of(hello(replica="a"), hello(replica="b"))).reason == "too_many_replicas"
    assert refused(gateway, of(hello(model_name="a"), hello(replica="b", model_name="b"))).reason == "too_many_replicas"
    assert refused(gateway, of(hello(model_name="\n"))).reason == "replica_name"
    rows = tuple(replace(row, info=replace(row.info, model_name=f"m{i}")) for i, row in enumerate(report.requests))
    assert refused(gateway, replace(report, requests=rows)).reason == "too_many_models"
    direct = core()
    direct.ingest.hello(forwarder(), 1000.0)
    direct.ingest.hello(hello(), 1000.0)
    assert refused(direct, report).reason == "replica_twice"
    chained = sidecar()
    with pytest.raises(StreamRefused, match="forwards to another one itself"):
        chained.ingest.hello(forwarder(), 1000.0)
