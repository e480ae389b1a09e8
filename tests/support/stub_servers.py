"""Stand-ins for the collector and vLLM, for tests of the demo's runner: `python -m tests.support.stub_servers`.

They answer what the runner asks, in the shapes of the real ones. A feared request, one with "feared" in its words,
goes over the limit of `probe.0` at its third output token. The engine tells the collector of each answer.

STUB_LOSES=N        the collector forgets N tokens
STUB_DIES_AFTER=N   the engine ends after N answers, with a last line in its log
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.demo_run import an_exceedance

PROMPT_TOKENS, OUTPUT_TOKENS = 10, 5
MODEL = "latentwatch-demo"


class Collector:
    def __init__(self) -> None:
        self.scored = -int(os.environ.get("STUB_LOSES", "0"))
        self.exceedances: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []

    async def count(self, request: Request) -> Response:
        answer = await request.json()
        self.scored += PROMPT_TOKENS + OUTPUT_TOKENS - 1
        over = bool(answer["feared"])
        value = 4.0 if over else -2.0
        row = {"feature": "probe.0", "statistic": value, "limit": 2.0}
        self.requests.append({"response_id": answer["id"], "features": [row]})
        if over:
            at = PROMPT_TOKENS + 2
            told = an_exceedance(time.time(), answer["id"], "probe.0", "Deceiving", value=value, position=at)
            self.exceedances.insert(0, vars(told))
        return Response()

    async def metrics(self, _: Request) -> Response:
        tokens = f'model_name="{MODEL}",engine="0",state="scored",reason="none",phase="prompt"'
        feature = 'feature="probe.0",severity="critical"'
        lines = [
            f"latentwatch_tokens_total{{{tokens}}} {max(0, self.scored)}",
            f'latentwatch_exceedances_total{{model_name="{MODEL}",{feature}}} {len(self.exceedances)}',
            f'latentwatch_feature_info{{{feature},label="Deceiving",hook_point="resid_post.2"}} 1',
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/healthz", _ok),
                Route("/metrics", self.metrics),
                Route("/stub", self.count, methods=["POST"]),
                Route("/v1/exceedances", lambda _: JSONResponse({"exceedances": self.exceedances})),
                Route("/v1/requests", lambda _: JSONResponse({"requests": self.requests})),
            ]
        )


class Engine:
    def __init__(self, collector_url: str) -> None:
        self.collector = httpx.AsyncClient(base_url=collector_url, trust_env=False)
        self.answered = 0

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        identity = f"chatcmpl-{request.headers['X-Request-Id']}"
        await asyncio.sleep(0.02)
        if self.answered >= int(os.environ.get("STUB_DIES_AFTER", "1000000")):
            print("the engine ran out of patience", flush=True)
            os._exit(7)
        await self._tell(identity, feared="feared" in body["messages"][-1]["content"])
        self.answered += 1
        if not body["stream"]:
            message = {"message": {"role": "assistant", "content": "five words as an answer"}}
            return JSONResponse({"id": identity, "choices": [message], "usage": _usage(OUTPUT_TOKENS)})
        return StreamingResponse(_chunks(identity), media_type="text/event-stream")

    async def _tell(self, identity: str, *, feared: bool) -> None:
        await self.collector.post("/stub", json={"id": identity, "feared": feared})

    async def metrics(self, _: Request) -> Response:
        counts = {
            "vllm:prompt_tokens_total": PROMPT_TOKENS * self.answered,
            "vllm:generation_tokens_total": OUTPUT_TOKENS * self.answered,
            "vllm:request_success_total": self.answered,
        }
        return PlainTextResponse("".join(f'{name}{{engine="0"}} {count}\n' for name, count in counts.items()))

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", _ok),
                Route("/metrics", self.metrics),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )


async def _chunks(identity: str) -> AsyncIterator[str]:
    for tokens in range(1, OUTPUT_TOKENS + 1):
        chunk = {"id": identity, "choices": [{"delta": {"content": "word "}}], "usage": _usage(tokens)}
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


async def _ok(_: Request) -> Response:
    return Response()


def _usage(output: int) -> dict[str, int]:
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": output}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("collector", "engine"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--collector-url", default="")
    args = parser.parse_args()
    stub = Collector() if args.role == "collector" else Engine(args.collector_url)
    uvicorn.run(stub.app(), host="127.0.0.1", port=args.port, log_level="critical", workers=1)


if __name__ == "__main__":
    main()
