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
from typing import Any

import aiohttp
from aiohttp import web

PROMPT_TOKENS, OUTPUT_TOKENS = 10, 5
MODEL = "latentwatch-demo"


class Collector:
    def __init__(self) -> None:
        self.scored = -int(os.environ.get("STUB_LOSES", "0"))
        self.exceedances: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []

    async def take(self, request: web.Request) -> web.Response:
        answer = await request.json()
        self.scored += PROMPT_TOKENS + OUTPUT_TOKENS - 1
        over = bool(answer["feared"])
        value = 4.0 if over else -2.0
        row = {"feature": "probe.0", "statistic": value, "limit": 2.0}
        self.requests.append({"response_id": answer["id"], "features": [row]})
        if over:
            about = {"label": "Deceiving", "severity": "critical", "phase": "output", "position": PROMPT_TOKENS + 2}
            scores = {"feature": "probe.0", "value": value, "limit": 2.0, "peak": value}
            self.exceedances.insert(0, {"seconds": time.time(), "response_id": answer["id"], **about, **scores})
        return web.Response()

    async def metrics(self, _: web.Request) -> web.Response:
        tokens = f'model_name="{MODEL}",engine="0",state="scored",reason="none",phase="prompt"'
        feature = 'feature="probe.0",severity="critical"'
        lines = [
            f"latentwatch_tokens_total{{{tokens}}} {max(0, self.scored)}",
            f'latentwatch_exceedances_total{{model_name="{MODEL}",{feature}}} {len(self.exceedances)}',
            f'latentwatch_feature_info{{{feature},label="Deceiving",hook_point="resid_post.2"}} 1',
        ]
        return web.Response(text="\n".join(lines) + "\n")

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/healthz", _ok)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/stub", self.take)
        app.router.add_get("/v1/exceedances", lambda _: _json({"exceedances": self.exceedances}))
        app.router.add_get("/v1/requests", lambda _: _json({"requests": self.requests}))
        return app


class Engine:
    def __init__(self, collector_url: str) -> None:
        self.collector_url = collector_url
        self.answered = 0

    async def chat(self, request: web.Request) -> web.StreamResponse:
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
            return web.json_response({"id": identity, "choices": [message], "usage": _usage(OUTPUT_TOKENS)})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for tokens in range(1, OUTPUT_TOKENS + 1):
            chunk = {"id": identity, "choices": [{"delta": {"content": "word "}}], "usage": _usage(tokens)}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _tell(self, identity: str, *, feared: bool) -> None:
        told = {"id": identity, "feared": feared}
        async with aiohttp.ClientSession() as session, session.post(f"{self.collector_url}/stub", json=told):
            pass

    async def metrics(self, _: web.Request) -> web.Response:
        counts = {
            "vllm:prompt_tokens_total": PROMPT_TOKENS * self.answered,
            "vllm:generation_tokens_total": OUTPUT_TOKENS * self.answered,
            "vllm:request_success_total": self.answered,
        }
        return web.Response(text="".join(f'{name}{{engine="0"}} {count}\n' for name, count in counts.items()))

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", _ok)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/chat/completions", self.chat)
        return app


async def _ok(_: web.Request) -> web.Response:
    return web.Response()


async def _json(value: Any) -> web.Response:
    return web.json_response(value)


def _usage(output: int) -> dict[str, int]:
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": output}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("collector", "engine"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--collector-url", default="")
    args = parser.parse_args()
    stub = Collector() if args.role == "collector" else Engine(args.collector_url)
    web.run_app(stub.app(), host="127.0.0.1", port=args.port, print=None, handle_signals=True)


if __name__ == "__main__":
    main()
