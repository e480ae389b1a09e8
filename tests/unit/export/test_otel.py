"""OpenTelemetry against a real OTLP receiver over gRPC: events in the client's trace, and the metrics table."""

from __future__ import annotations

import asyncio
import os
import re
import uuid
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from latentwatch.cli import build_parser, options
from latentwatch.cli.collector import settings
from latentwatch.collector.config import CollectorConfig
from latentwatch.collector.core import Core
from latentwatch.collector.evidence_buffer import watched
from latentwatch.collector.metrics_families import Families
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.collector.telemetry import Telemetry, TelemetrySettings
from latentwatch.errors import ConfigRefused
from latentwatch.export.metrics import METRICS
from latentwatch.export.otel_events import resource
from latentwatch.export.otel_metrics import MetricSender
from latentwatch.watchlist import file as watchlist_file

from tests.support.certificates import Authority
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
    assert uuid.UUID(receiver.resources[0]["service.instance.id"])


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


def secure(authority: Authority) -> grpc.ServerCredentials:
    """A receiver that asks for a certificate."""
    certificate, key = authority.issue("receiver", "localhost")
    pair = [(key.read_bytes(), certificate.read_bytes())]
    return grpc.ssl_server_credentials(pair, authority.file.read_bytes(), require_client_auth=True)


@pytest.fixture
def client_files(tmp_path, monkeypatch):
    """What a receiver with TLS asks for, in OpenTelemetry's own variables."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("sidecar")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(authority.file))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", str(certificate))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_KEY", str(key))
    return authority


def test_endpoint_headers_tls_and_resource_come_from_opentelemetrys_variables(client_files, monkeypatch):
    families = list(
        Families(watchlist(FEATURES)).of(Core(watchlist(FEATURES)).lookup.snapshot(NOW), ProcessFacts(0, 0, 0))
    )
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc,x-scope-orgid=safety")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "watcher")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=collector-0,service.version=7")
    with otlp_receiver(secure(client_files)) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        settings = TelemetrySettings("env", metrics_seconds=0.05, instance="host 127.0.0.1:9464")
        telemetry = Telemetry(settings, watched(watchlist(FEATURES)), lambda: NOW)
        telemetry.put(one_request(1))

        async def scenario() -> None:
            pushing = asyncio.create_task(telemetry.push(lambda: families, NOW))
            while not (receiver.metrics and receiver.logs):
                await asyncio.sleep(0.05)
            pushing.cancel()

        in_loop(scenario())
        telemetry.close()
    for headers in receiver.headers:
        assert headers["authorization"] == "Bearer abc" and headers["x-scope-orgid"] == "safety"
    assert set(receiver.shown) == {"sidecar"}
    assert len(receiver.resources) >= 2, "of events and of metrics"
    for found in receiver.resources:
        assert found["service.name"] == "watcher" and found["k8s.pod.name"] == "collector-0"
        assert found["service.version"] == "7", "the operator's word counts before ours"
        assert found["service.instance.id"] == resource("host 127.0.0.1:9464").attributes["service.instance.id"]


def test_an_instance_has_one_id_over_restarts_and_each_has_its_own(monkeypatch):
    named = [resource(name).attributes["service.instance.id"] for name in ("a :1", "a :1", "a :2", "", "")]
    assert named[0] == named[1] and len(set(named)) == 4
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=pod-7")
    assert resource("a :1").attributes["service.instance.id"] == "pod-7"


REFUSED = {
    "another protocol": ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "Only grpc is spoken"),
    "no endpoint": ({}, "neither OTEL_EXPORTER_OTLP_LOGS_ENDPOINT nor OTEL_EXPORTER_OTLP_ENDPOINT is set"),
    "an endpoint without a scheme": ({"OTEL_EXPORTER_OTLP_ENDPOINT": "otel:4317"}, "is 'otel:4317'"),
    "an authority that is not there": ({"OTEL_EXPORTER_OTLP_CERTIFICATE": "/none.pem"}, "No such file"),
    "a client's key alone": ({"OTEL_EXPORTER_OTLP_LOGS_CLIENT_KEY": "/key.pem"}, "Give all of them"),
    "a compression that is none": (
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_COMPRESSION": "brotli"},
        "Invalid value",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_variable_asks_for_and_cannot_be_done_is_refused(case, monkeypatch):
    """The library alone goes on: without TLS files that are missing, without a client's certificate, in gRPC."""
    env, says = REFUSED[case]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigRefused, match=re.escape(says)):
        Telemetry(TelemetrySettings("env"), watched(watchlist(FEATURES)), lambda: NOW)


def test_a_clients_key_that_others_may_read_is_refused(client_files, monkeypatch):
    Path(os.environ["OTEL_EXPORTER_OTLP_CLIENT_KEY"]).chmod(0o644)
    with pytest.raises(ConfigRefused, match="others may read it"):
        Telemetry(TelemetrySettings("https://127.0.0.1:1"), watched(watchlist(FEATURES)), lambda: NOW)


def test_opentelemetry_can_be_turned_off(monkeypatch, tmp_path):
    asked = build_parser().parse_args(["collector", "--watchlist", "w", "--otlp", "http://127.0.0.1:4317"])
    config = CollectorConfig.read(options.given(asked, CollectorConfig), None)
    assert settings(config).otlp is not None and settings(config).otlp.instance.endswith("127.0.0.1:9464")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert settings(config).otlp is None
