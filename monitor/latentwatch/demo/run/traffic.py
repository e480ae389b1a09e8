"""The demo's users: ordinary chat requests, an incident among them, ordinary requests again.

The plan is pure and seeded; sending it is the only part that touches the network.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict

import httpx
import numpy as np

from latentwatch.errors import Refusal, RefusalReason

CONCURRENCY: Final = 12
"""Requests in flight at most: what two CPU cores batch without a queue that would stretch the plan."""
MAX_OUTPUT_TOKENS: Final = 48
ANSWER_TIMEOUT_SECONDS: Final = 240.0


@dataclass(frozen=True)
class Prompt:
    """A chat prompt and what it is about. `feared`: an operator would want to be paged for the answer."""

    topic: str
    messages: tuple[Mapping[str, str], ...]
    feared: bool
    concern: str = ""
    """What a feared request is feared for, where the watchlist has a feature of that name."""

    @property
    def last_words(self) -> str:
        """The last message, for a table."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Planned:
    """A request to come. `request_id` goes out as X-Request-Id and comes back in the answer's id."""

    at_seconds: float
    """After the start of the traffic."""
    request_id: str
    prompt: Prompt
    stream: bool
    max_tokens: int = MAX_OUTPUT_TOKENS


@dataclass(frozen=True)
class Answer:
    """A finished request. Times are seconds since the Unix epoch."""

    response_id: str
    prompt: Prompt
    sent_at: float
    finished_at: float
    text: str
    prompt_tokens: int
    output_tokens: int
    token_times: tuple[float, ...] = ()
    """When the client received each output token; empty where the answer was not streamed."""

    def received_at(self, position: int) -> float | None:
        """When the token at this position reached the client; a prompt token counts from the sending.

        None where it cannot be known: the answer was not streamed.
        """
        if position < self.prompt_tokens:
            return self.sent_at
        output = position - self.prompt_tokens
        return self.token_times[output] if output < len(self.token_times) else None


@dataclass(frozen=True)
class Phases:
    """How long each part of the plan lasts, in seconds."""

    before: float
    incident: float
    after: float

    @classmethod
    def of(cls, total_seconds: float) -> Phases:
        """Half of it before, a fifth the incident, the rest after."""
        return cls(before=0.45 * total_seconds, incident=0.2 * total_seconds, after=0.35 * total_seconds)

    @property
    def total(self) -> float:
        return self.before + self.incident + self.after


class AnswerFailed(Refusal):
    """The server did not answer a request of the plan."""


def read_prompts(path: Path, *, feared: bool) -> list[Prompt]:
    """Prompts from a JSONL file with `topic` and `messages` in each line.

    Raises: Refusal, reason "demo_prompts": the file holds no prompt, or a line is not one.
    """
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        if not all(isinstance(row["topic"], str) for row in rows):
            raise ValueError("a topic is not text")
        prompts = [Prompt(row["topic"], tuple(dict(m) for m in row["messages"]), feared) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _bad_prompts(path, f"not prompts ({type(error).__name__}: {error})") from error
    if not prompts or not all(prompt.messages for prompt in prompts):
        raise _bad_prompts(path, "no prompt in it, or one without messages")
    return prompts


def plan(
    ordinary: Sequence[Prompt],
    incidents: Sequence[Prompt],
    phases: Phases,
    *,
    rate_per_second: float,
    rng: np.random.Generator,
    max_tokens: int = MAX_OUTPUT_TOKENS,
) -> list[Planned]:
    """Ordinary requests throughout, at random times; in the incident phase feared ones at the same rate among them.

    Prompts come in a random order, again from the first where more are needed: those hit the prefix cache. Feared
    requests stream, which times each of their tokens, and every second one of the ordinary.
    """
    end_of_incident = phases.before + phases.incident
    arrivals = [(at, prompt) for at, prompt in _arrivals(ordinary, 0.0, phases.total, rate_per_second, rng)]
    arrivals += _arrivals(incidents, phases.before, end_of_incident, rate_per_second, rng)
    arrivals.sort(key=lambda arrival: arrival[0])
    return [
        Planned(at, f"demo-{i:04d}", prompt, stream=prompt.feared or i % 2 == 0, max_tokens=max_tokens)
        for i, (at, prompt) in enumerate(arrivals)
    ]


async def send(planned: Iterable[Planned], url: str, model: str, *, on_answer: Callable[[Answer], None]) -> None:
    """Send every request at its time, at most CONCURRENCY at once, and return when all are answered.

    Raises: AnswerFailed: the first request that was not answered; the others are given up.
    """
    began = time.monotonic()
    places = asyncio.Semaphore(CONCURRENCY)

    async def one(request: Planned) -> None:
        await asyncio.sleep(max(0.0, request.at_seconds - (time.monotonic() - began)))
        async with places:
            on_answer(await ask(client, url, model, request))

    # A proxy from the environment would be asked for this machine's own ports.
    async with httpx.AsyncClient(trust_env=False, timeout=ANSWER_TIMEOUT_SECONDS) as client:
        try:
            async with asyncio.TaskGroup() as group:
                for request in planned:
                    group.create_task(one(request))
        except* AnswerFailed as failures:
            raise failures.exceptions[0] from None


class _Message(TypedDict, total=False):
    content: str | None


class _Choice(TypedDict, total=False):
    message: _Message
    delta: _Message


class _Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(TypedDict):
    """A whole answer, or a piece of one that streams."""

    id: str
    choices: list[_Choice]
    usage: _Usage


async def ask(client: httpx.AsyncClient, url: str, model: str, request: Planned) -> Answer:
    """One chat completion. Raises AnswerFailed for any answer that is not a whole completion."""
    call = client.stream(
        "POST",
        f"{url}/v1/chat/completions",
        json=_body(model, request),
        headers={"X-Request-Id": request.request_id},
    )
    sent_at = time.time()
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS), call as response:
            if response.status_code != 200:
                found = (await response.aread()).decode(errors="replace")
                raise _no_answer(request, f"HTTP {response.status_code}: {found[:300]}")
            chunks, token_times = await (_streamed(response) if request.stream else _whole(response))
        return _answer(request.prompt, chunks, sent_at, token_times)
    except (httpx.HTTPError, TimeoutError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _no_answer(request, f"{type(error).__name__}: {error}") from error


def _body(model: str, request: Planned) -> dict[str, object]:
    body: dict[str, object] = {
        "model": model,
        "messages": [dict(message) for message in request.prompt.messages],
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "stream": request.stream,
    }
    if request.stream:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return body


def _answer(prompt: Prompt, chunks: Sequence[_Chunk], sent_at: float, token_times: tuple[float, ...]) -> Answer:
    return Answer(
        response_id=chunks[0]["id"],
        prompt=prompt,
        sent_at=sent_at,
        finished_at=time.time(),
        text="".join(_text(choice) for chunk in chunks for choice in chunk["choices"]),
        prompt_tokens=chunks[-1]["usage"]["prompt_tokens"],
        output_tokens=chunks[-1]["usage"]["completion_tokens"],
        token_times=token_times,
    )


async def _whole(response: httpx.Response) -> tuple[list[_Chunk], tuple[float, ...]]:
    return [json.loads(await response.aread())], ()


async def _streamed(response: httpx.Response) -> tuple[list[_Chunk], tuple[float, ...]]:
    """The chunks of a streamed answer and when each output token arrived; a chunk says how many it brings us to."""
    parts: list[_Chunk] = []
    token_times: list[float] = []
    async for line in response.aiter_lines():
        data = line.strip().removeprefix("data: ")
        if data and data != "[DONE]":
            parts.append(json.loads(data))
            arrived = parts[-1]["usage"]["completion_tokens"] - len(token_times)
            token_times += [time.time()] * arrived
    return parts, tuple(token_times)


def _text(choice: _Choice) -> str:
    message: _Message = choice.get("message") or choice.get("delta") or {}
    return message.get("content") or ""


def _arrivals(
    prompts: Sequence[Prompt], begin: float, end: float, rate_per_second: float, rng: np.random.Generator
) -> Iterator[tuple[float, Prompt]]:
    count = max(1, round((end - begin) * rate_per_second))
    order = rng.permutation(len(prompts)).tolist()
    for number, at in enumerate(np.sort(rng.uniform(begin, end, count))):
        yield float(at), prompts[order[number % len(order)]]


def _bad_prompts(path: Path, found: str) -> Refusal:
    return Refusal(
        f"prompts {path}",
        found=found,
        instead="Build the demo's assets again with 'latentwatch demo build'.",
        reason=RefusalReason.DEMO_PROMPTS,
    )


def _no_answer(request: Planned, found: str) -> AnswerFailed:
    return AnswerFailed(
        f"request {request.request_id}",
        found=found,
        instead="The server's log says why.",
        reason=RefusalReason.NO_ANSWER,
    )
