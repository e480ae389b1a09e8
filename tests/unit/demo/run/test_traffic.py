"""The planned requests, the same for the same seed, and how they are sent and timed."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from latentwatch.demo.run.traffic import Answer, AnswerFailed, Phases, Planned, Prompt, plan, read_prompts, send
from latentwatch.errors import Refusal
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

ORDINARY = [Prompt(f"t{i}", ({"role": "user", "content": f"ordinary {i}"},), feared=False) for i in range(9)]
FEARED = [Prompt("deceit", ({"role": "user", "content": f"feared {i}"},), feared=True) for i in range(5)]
PHASES = Phases(before=20.0, incident=10.0, after=15.0)


def a_plan(seed: int = 0) -> list[Planned]:
    return plan(ORDINARY, FEARED, PHASES, rate_per_second=3.0, rng=np.random.default_rng(seed))


def test_feared_requests_come_in_the_incident_only_and_ordinary_ones_throughout() -> None:
    planned = a_plan()
    feared = [request.at_seconds for request in planned if request.prompt.feared]
    ordinary = [request.at_seconds for request in planned if not request.prompt.feared]
    assert len(feared) == 30
    assert all(20.0 <= at <= 30.0 for at in feared)
    assert len(ordinary) == 135
    assert min(ordinary) < 2.0 and max(ordinary) > 43.0
    assert any(20.0 <= at <= 30.0 for at in ordinary)


def test_a_plan_is_in_order_has_unique_ids_and_is_the_same_for_the_same_seed() -> None:
    planned = a_plan()
    assert [request.at_seconds for request in planned] == sorted(request.at_seconds for request in planned)
    assert len({request.request_id for request in planned}) == len(planned)
    assert planned == a_plan()
    assert planned != a_plan(seed=1)


def test_feared_requests_stream_and_ordinary_ones_do_both() -> None:
    planned = a_plan()
    assert all(request.stream for request in planned if request.prompt.feared)
    assert len(Counter(request.stream for request in planned if not request.prompt.feared)) == 2


def test_the_phases_share_the_whole_time() -> None:
    assert Phases.of(40.0).total == pytest.approx(40.0)


@pytest.mark.parametrize("text", ["", "not json\n", '{"topic": "x"}\n', '{"topic": "x", "messages": []}\n', "3\n"])
def test_a_prompt_file_without_prompts_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ordinary.jsonl"
    path.write_text(text)
    with pytest.raises(Refusal, match=r"ordinary\.jsonl") as refused:
        read_prompts(path, feared=False)
    assert refused.value.reason == "demo_prompts"


def test_prompts_are_read_with_topic_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"topic": "tea", "messages": [{"role": "user", "content": "Hi"}], "more": 1}) + "\n")
    (prompt,) = read_prompts(path, feared=True)
    assert (prompt.topic, prompt.last_words, prompt.feared) == ("tea", "Hi", True)


class ChatServer:
    """Answers as vLLM's OpenAI server does: three tokens, the id made from X-Request-Id."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.in_flight = self.most_in_flight = 0
        self.bodies: list[dict[str, Any]] = []

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.02)
        self.in_flight -= 1
        if self.status != 200:
            return PlainTextResponse("the engine is dead", self.status)
        identity = f"chatcmpl-{request.headers['X-Request-Id']}"
        if not body["stream"]:
            message = {"message": {"role": "assistant", "content": "one two three"}}
            return JSONResponse({"id": identity, "choices": [message], "usage": usage(3)})
        return StreamingResponse(chunks(identity), media_type="text/event-stream")


async def chunks(identity: str) -> AsyncIterator[str]:
    for tokens, words in ((0, ""), (1, "one "), (3, "two three")):
        chunk = {"id": identity, "choices": [{"delta": {"content": words}}], "usage": usage(tokens)}
        yield f"data: {json.dumps(chunk)}\n\n"
    last = {"id": identity, "choices": [], "usage": usage(3)}
    yield f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"


def usage(output: int) -> dict[str, int]:
    return {"prompt_tokens": 10, "completion_tokens": output, "total_tokens": 10 + output}


def exchange(server: ChatServer, planned: list[Planned]) -> list[Answer]:
    """Send a plan to a chat server on a free port."""

    async def both() -> list[Answer]:
        app = Starlette(routes=[Route("/v1/chat/completions", server.chat, methods=["POST"])])
        serving = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            task = asyncio.create_task(serving.serve([listener]))
            try:
                answers: list[Answer] = []
                await send(planned, f"http://127.0.0.1:{listener.getsockname()[1]}", "m", on_answer=answers.append)
                return answers
            finally:
                serving.should_exit = True
                await task

    return asyncio.run(both())


def at_once(count: int, *, stream: bool) -> list[Planned]:
    return [Planned(0.0, f"r{i}", ORDINARY[0], stream) for i in range(count)]


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_an_answer_has_the_text_the_tokens_and_the_servers_id(stream: bool) -> None:
    server = ChatServer()
    (answer,) = exchange(server, at_once(1, stream=stream))
    assert answer.text == "one two three"
    assert answer.response_id == "chatcmpl-r0"
    assert (answer.prompt_tokens, answer.output_tokens) == (10, 3)
    assert len(answer.token_times) == (3 if stream else 0)
    assert answer.sent_at < answer.finished_at
    assert server.bodies[0]["model"] == "m"


def test_many_requests_are_in_flight_together_but_never_more_than_the_bound() -> None:
    server = ChatServer()
    assert len(exchange(server, at_once(40, stream=False))) == 40
    assert 2 < server.most_in_flight <= 12


def test_a_server_that_fails_ends_the_traffic_with_its_words() -> None:
    with pytest.raises(AnswerFailed, match="HTTP 500: the engine is dead"):
        exchange(ChatServer(status=500), at_once(5, stream=True))


def test_a_token_is_received_with_its_chunk_and_a_prompt_token_counts_from_the_sending() -> None:
    answer = Answer("id", ORDINARY[0], 5.0, 9.0, "", prompt_tokens=10, output_tokens=3, token_times=(6.0, 7.0, 8.0))
    assert answer.received_at(0) == answer.received_at(9) == 5.0
    assert [answer.received_at(10 + i) for i in range(4)] == [6.0, 7.0, 8.0, None]
