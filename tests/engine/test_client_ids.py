"""The real HTTP server: whatever a client calls its request, it is found by what its client holds;
and what it sends costs no other request its monitoring."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from latentwatch.client_ids import IdKind, bounded_id, kinds_of, meanings
from latentwatch.watchlist import file as watchlist_file

from tests.engine.conftest import SMALL, monitored
from tests.support import server, tiny
from tests.support.engines import cache_root
from tests.support.recording import Scores

pytestmark = pytest.mark.engine

HEADERS = (
    "session_42",
    "session",
    "session_1",
    "a-0",
    "a",
    "a-0-0123abcd",
    "-",
    "",
    "x" * 300,
    "x" * 301,
    "größe",
    "7 %/?",
)
HOSTILE: list[dict[str, Any]] = [
    {"traceparent": "00-" + "0" * 32 + "-" + "1" * 16 + "-01"},
    {"traceparent": "x" * 8000, "tracestate": "a=b," * 500},
    {"X-Request-Id": "lone-\x80\xff"},
]
XARGS = [
    {"latentwatch_response_id": "cmpl-session"},
    {"latentwatch_untraced": 7, "latentwatch_traceparent": "y" * 9000},
]
CHAT = [{"role": "user", "content": "w3 w4 w5"}]
MOST = {"max_tokens": 4, "ignore_eos": True}


class Asked(NamedTuple):
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    parts: int
    """Requests of the engine that serve it; 0 for any number."""


def asked() -> list[Asked]:
    found: list[Asked] = []
    for name in HEADERS:
        headers = {"X-Request-Id": name}
        found.append(Asked("/v1/chat/completions", {"messages": CHAT, **MOST}, headers, 1))
        found.append(Asked("/v1/completions", {"prompt": [3, 4, 5], **MOST}, headers, 1))
    several = {"prompt": [[3, 4], [5, 6, 7]], "n": 3, "temperature": 1.0, **MOST}
    found.append(Asked("/v1/completions", several, {"X-Request-Id": "several"}, 6))
    found.append(Asked("/v1/chat/completions", {"messages": CHAT, "n": 2, "temperature": 1.0, **MOST}, {}, 2))
    streamed = {"messages": CHAT, "stream": True, **MOST}
    found.append(Asked("/v1/chat/completions", streamed, {"X-Request-Id": "streamed_1"}, 1))
    found.append(Asked("/v1/responses", {"input": "w3 w4", "max_output_tokens": 4}, {"X-Request-Id": "unused"}, 1))
    beams = {"prompt": [3, 4, 5], "use_beam_search": True, "n": 2, "max_tokens": 3}
    found.append(Asked("/v1/completions", beams, {"X-Request-Id": "beams"}, 0))
    found += [Asked("/v1/completions", {"prompt": [3, 4], **MOST}, headers, 1) for headers in HOSTILE]
    found += [Asked("/v1/completions", {"prompt": [3, 4], "vllm_xargs": extra, **MOST}, {}, 1) for extra in XARGS]
    return found


class Told(NamedTuple):
    answers: list[tuple[int, str]]
    """By what was asked: status, and the id that the client was answered with."""
    scores: list[Scores]


def post(port: int, each: Asked) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"Content-Type": "application/json", **each.headers}
    sent = {name: value.encode("utf-8" if value.isprintable() else "latin-1") for name, value in headers.items()}
    connection.request("POST", each.path, json.dumps(each.body), sent)
    response = connection.getresponse()
    text = response.read().decode()
    if response.status != 200:
        return response.status, text[:500]
    if each.body.get("stream"):
        text = text.partition("data: ")[2].partition("\n")[0]
    return 200, json.loads(text)["id"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, watchlist_path: Path) -> Told:
    folder = tmp_path_factory.mktemp("client_ids")
    model = tiny.llama(folder / "model")
    tiny.save_tokenizer(model)
    engine = {"model": str(model), **SMALL, "dtype": "float32", "enforce_eager": True, "max_logprobs": 20}
    with monitored(folder) as collected:
        env = {**collected.environment(watchlist_path), "VLLM_CACHE_ROOT": str(cache_root())}
        with server.Server(engine, env, folder / "server.log", 300.0) as served, ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda each: post(served.port, each), asked()))
            collected.wait_closed(
                sum(each.parts for each, (status, _) in zip(asked(), answers, strict=True) if status == 200)
            )
        scores = list(collected.sink.requests(watchlist_file.read(watchlist_path)).values())
    return Told(answers, scores)


def test_each_answer_is_found_by_its_id_and_every_request_is_somebodys(told: Told):
    served = {id: each for each, (status, id) in zip(asked(), told.answers, strict=True) if status == 200}
    assert {each.path for each in served.values()} == {each.path for each in asked()}, told.answers
    for id, each in served.items():
        found = [scores for scores in told.scores if IdKind.RESPONSE in kinds(id, scores)]
        same = sum(other.parts for other, (_, given) in zip(asked(), told.answers, strict=True) if given == id)
        assert len(found) == same or (not each.parts and len(found) > 1), f"{each}: {id}"
    held = {bounded_id(id) for id in served}
    assert {scores.opened.response_id for scores in told.scores} == held


def kinds(name: str, scores: Scores) -> set[IdKind]:
    opened = scores.opened
    return kinds_of(meanings(name), response=opened.response_id, request=opened.request_id, trace="")


def test_each_client_finds_its_own_by_what_it_sent(told: Told):
    for name in HEADERS:
        if name:
            found = [scores for scores in told.scores if IdKind.CLIENT in kinds(name, scores)]
            assert len(found) == 2, name


def test_whatever_was_sent_every_request_is_counted_whole(told: Told):
    for scores in told.scores:
        assert scores.closed is not None and scores.closed.total_tokens == sum(scores.tokens.values())
