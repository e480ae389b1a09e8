"""vLLM's own spans and our events at one OTLP receiver: what a page is about stands in the trace of its request."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.collector.telemetry import TelemetrySettings

from tests.engine.conftest import SMALL
from tests.support import server, tiny
from tests.support.engines import cache_root, random_prompts
from tests.support.otlp import attributes, otlp_receiver
from tests.support.wire import eventually, in_loop

pytestmark = pytest.mark.engine

REQUESTS = 3


class Traced(NamedTuple):
    """What the receiver got of requests 0 to 2, each with a traceparent of its own."""

    response_ids: list[str]
    spans: list[Any]
    events: list[Any]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, watchlist_path: Path) -> Traced:
    folder = tmp_path_factory.mktemp("traced")
    model = tiny.llama(folder / "model")
    tiny.save_tokenizer(model)
    prompts = random_prompts(REQUESTS, vocabulary=tiny.VOCABULARY, longest=40, seed=3)
    with tempfile.TemporaryDirectory(prefix="lw") as short, otlp_receiver() as receiver:
        target = f"unix://{short}/c.sock"
        collector = Service(
            CollectorSettings(watchlist_path, (target,), "127.0.0.1:0", otlp=TelemetrySettings(receiver.url))
        )
        in_loop(collector.start())
        engine = {
            "model": str(model),
            **SMALL,
            "dtype": "float32",
            "enforce_eager": True,
            "otlp_traces_endpoint": receiver.url,
        }
        env = {
            "LATENTWATCH_WATCHLIST": str(watchlist_path),
            "LATENTWATCH_COLLECTOR": target,
            "VLLM_CACHE_ROOT": str(cache_root()),
            "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true",
        }
        with server.Server(engine, env, folder / "server.log", 300.0) as served:
            asked = [
                {"prompt": each["prompt"], "max_tokens": 8, "stop": [], "abort_after_outputs": None} for each in prompts
            ]
            ids = [served.ask(i, request)["response_id"] for i, request in enumerate(asked)]
            eventually(lambda: spans_of(receiver) >= REQUESTS and bool(receiver.logs), 90)
        in_loop(collector.stop())
    return Traced(ids, [span for span in receiver.spans if span.name == "llm_request"], receiver.logs)


def spans_of(receiver: Any) -> int:
    return sum(span.name == "llm_request" for span in receiver.spans)


def test_an_event_has_the_trace_of_vllms_span_and_the_same_parent(traced: Traced):
    assert traced.events, "some request went above a limit"
    by_trace = {span.trace_id: span for span in traced.spans}
    assert len(by_trace) == REQUESTS
    parents = {tuple(server.traceparent(i).split("-")[1:3]): name for i, name in enumerate(traced.response_ids)}
    for event in traced.events:
        span = by_trace[event.trace_id]
        assert event.span_id == span.parent_span_id, "both are children of what the client sent"
        response_id = parents[event.trace_id.hex(), event.span_id.hex()]
        assert event.event_name == "gen_ai.evaluation.result"
        assert attributes(event)["gen_ai.response.id"] == response_id
        assert attributes(span)["gen_ai.request.id"].startswith(response_id)
