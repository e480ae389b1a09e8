"""OpenTelemetry against a real OTLP receiver over gRPC: events in the client's trace, and the metrics table."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from latentwatch.collector.core import Core
from latentwatch.collector.evidence_buffer import watched
from latentwatch.collector.metrics_families import Families
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.collector.telemetry import Telemetry, TelemetrySettings
from latentwatch.errors import ConfigRefused
from latentwatch.export.metrics import METRICS
from latentwatch.export.otel_metrics import MetricSender
from latentwatch.watchlist import file as watchlist_file

from tests.support.evidence import FEATURES, NOW, one_request
from tests.support.otlp import attributes, otlp_receiver
from tests.support.streams import Schedule, hello, received, tokens, watchlist
from tests.support.wire import eventually, in_loop

TRACE, SPAN = "ab" * 16, "cd" * 8
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"


def traced(number: int, **options):
    made = one_request(number, **options)
    traced = made[0].request._replace(info=replace(made[0].request.info, traceparent=TRACEPARENT))
    return [record._replace(request=traced) for record in made]


def test_an_exceedance_is_an_evaluation_result_in_the_trace_of_its_request():
    with otlp_receiver() as receiver:
        telemetry = Telemetry(TelemetrySettings(receiver.url), watched(watchlist(FEATURES)), lambda: NOW)
        telemetry.put(traced(1, request_id="chatcmpl-abc-0123abcd", exceedances=2))
        eventually(lambda: len(receiver.logs) == 2)
        telemetry.close()
    jailbreak, deceive = receiver.logs
    assert (jailbreak.event_name, jailbreak.trace_id.hex(), jailbreak.span_id.hex()) == (
        "gen_ai.evaluation.result", TRACE, SPAN,
    )  # fmt: skip
    found = attributes(jailbreak)
    assert found["gen_ai.evaluation.name"] == "jailbreak" and found["gen_ai.evaluation.score.value"] == 5.0
    assert found["gen_ai.response.id"] == "chatcmpl-abc" and found["gen_ai.request.model"] == "toy"
    assert "over the limit 4 at position 0" in found["gen_ai.evaluation.explanation"]
    assert (jailbreak.severity_text, deceive.severity_text) == ("warning", "critical")
    assert jailbreak.severity_number < deceive.severity_number and jailbreak.time_unix_nano == int(NOW * 1e9)
    assert receiver.resources[0]["service.name"] == "latentwatch-collector"


def test_a_request_without_a_trace_gives_an_event_without_one():
    with otlp_receiver() as receiver:
        telemetry = Telemetry(TelemetrySettings(receiver.url), watched(watchlist(FEATURES)), lambda: NOW)
        telemetry.put(one_request(1))
        eventually(lambda: len(receiver.logs) == 1)
        telemetry.close()
    assert receiver.logs[0].trace_id == b"" and receiver.logs[0].span_id == b""


def test_events_that_no_receiver_takes_are_counted(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "1")
    telemetry = Telemetry(TelemetrySettings("http://127.0.0.1:1"), watched(watchlist(FEATURES)), lambda: NOW)
    telemetry.put(one_request(1) + one_request(2))
    eventually(lambda: telemetry.facts().events.dropped == {("exceedance", "write_failed"): 2}, 30)
    telemetry.close()


def test_the_metrics_over_otlp_are_those_of_the_table():
    core = Core(watchlist(FEATURES))
    core.ingest.hello(hello(), NOW)
    rng = np.random.default_rng(0)
    requests = [tokens(rng, FEATURES, handle=h, total=30, prompt_tokens=10) for h in range(1, 4)]
    for batch in Schedule.one_step(requests).batches(FEATURES):
        core.ingest.observe(hello(), received(1, batch), NOW)
    families = list(Families(core.watchlist).of(core.lookup.snapshot(NOW), ProcessFacts(NOW - 9, 2, 3.0)))
    with otlp_receiver() as receiver:
        sender = MetricSender(receiver.url)
        assert sender.send(families, start_seconds=NOW - 9, now=NOW)
        sender.close()
    (sent,) = receiver.metrics
    assert set(sent) <= {m.name if m.kind == "info" else m.family for m in METRICS}
    tokens_sent = sent["latentwatch_tokens"].sum
    assert tokens_sent.is_monotonic and tokens_sent.aggregation_temporality == 2
    assert sum(point.as_double + point.as_int for point in tokens_sent.data_points) == 90
    assert tokens_sent.data_points[0].start_time_unix_nano == int((NOW - 9) * 1e9)
    histogram = {attributes(p)["feature"]: p for p in sent["latentwatch_feature_request_max"].histogram.data_points}
    assert histogram["jailbreak"].count == 3 == sum(histogram["jailbreak"].bucket_counts)
    assert len(histogram["jailbreak"].bucket_counts) == len(histogram["jailbreak"].explicit_bounds) + 1
    assert histogram["jailbreak"].HasField("sum") and not histogram["deceive"].HasField("sum")
    assert attributes(sent["latentwatch_feature_info"].gauge.data_points[0])["feature"] == "jailbreak"


def test_a_collector_sends_its_metrics_as_often_as_it_is_told(tmp_path: Path):
    watchlist_file.write(watchlist(FEATURES), tmp_path / "w.safetensors")
    with otlp_receiver() as receiver:

        async def scenario() -> None:
            otlp = TelemetrySettings(receiver.url, metrics_seconds=0.1)
            listen = (f"unix://{tmp_path}/c.sock",)
            service = Service(CollectorSettings(tmp_path / "w.safetensors", listen, "127.0.0.1:0", otlp=otlp))
            await service.start()
            while len(receiver.metrics) < 3:
                await asyncio.sleep(0.05)
            await service.stop()

        in_loop(scenario())
    assert "latentwatch_otlp_events" in receiver.metrics[-1]


@pytest.mark.parametrize(("endpoint", "seconds"), [("localhost:4317", 0), ("http://localhost:4317", -1)])
def test_an_endpoint_or_interval_that_cannot_be_is_refused(endpoint, seconds):
    with pytest.raises(ConfigRefused):
        TelemetrySettings(endpoint, seconds)
