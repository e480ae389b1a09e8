"""Two API server processes before one engine: who a request was reaches the collector, also where its client left."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from monitor.demo.processes import free_ports
from monitor.names import Outcome, response_id
from monitor.watchlist import card
from tests.engine.conftest import monitored
from tests.support.engine_run import ENVIRONMENT
from tests.support.engines import ROOT, cache_root
from tests.support.recording import Scores

pytestmark = pytest.mark.engine

ASSETS = ROOT / "monitor/demo/assets"
REQUESTS = 24
START_SECONDS = 300.0


class Asked(NamedTuple):
    """One request as its client saw it."""

    response_id: str
    traceparent: str
    fed_tokens: int | None
    """Prompt and output less the last token; None where the client left."""


class Server:
    """The demo model behind two API servers, until the `with` ends."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        (self.port,) = free_ports(1)
        self._log = folder / "server.log"
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(ASSETS / "model"), "--enforce-eager"]
        limits = ["--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "64"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command, *limits, "--api-server-count", "2", "--port", str(self.port)],
                env={**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(cache_root()), **env},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"the server is not there:\n{self._log.read_text(errors='replace')[-4000:]}")

    def ask(self, i: int) -> Asked:
        """Every fourth client asks for a stream and leaves after its first token."""
        leaves = i % 4 == 0
        traceparent = f"00-{i + 1:032x}-{i + 1:016x}-01"
        body = {
            "messages": [{"role": "user", "content": f"Tell me about topic number {i}. " * (1 + i % 5)}],
            "max_tokens": 300 if leaves else 5 + i,
            "temperature": 0,
            "ignore_eos": True,
            "stream": leaves,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json", "X-Request-Id": f"client-{i}", "traceparent": traceparent}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        if leaves:
            while b"content" not in (line := response.readline()):
                pass
            connection.close()
            return Asked(json.loads(line.removeprefix(b"data: "))["id"], traceparent, None)
        answer = json.loads(response.read())
        usage = answer["usage"]
        return Asked(answer["id"], traceparent, usage["prompt_tokens"] + usage["completion_tokens"] - 1)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(60)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Asked], dict[str, Scores], Any]]:
    """(requests as asked, by response id what the collector was told, the collector's sink)."""
    folder = tmp_path_factory.mktemp("server")
    watchlist = ASSETS / "demo.watchlist.safetensors"
    with monitored(folder) as engine:
        server = Server(folder, engine.environment(watchlist))
        try:
            server.wait()
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                asked = list(pool.map(server.ask, range(REQUESTS)))
            engine.wait_closed(REQUESTS)
        finally:
            server.end()
        scores = engine.sink.requests(card.read(watchlist))
        yield asked, {response_id(name): told for name, told in scores.items()}, engine.sink


def test_the_clients_request_id_and_traceparent_are_on_its_request(told):
    asked, scores, _ = told
    assert set(scores) == {each.response_id for each in asked}
    assert {f"chatcmpl-client-{i}" for i in range(REQUESTS)} == set(scores)
    assert all(scores[each.response_id].opened.traceparent == each.traceparent for each in asked)


def test_every_request_balances_and_one_whose_client_left_ends_as_aborted(told):
    asked, scores, _ = told
    for each in asked:
        found = scores[each.response_id]
        assert found.closed is not None
        assert sum(found.tokens.values()) == found.closed.total_tokens
        if each.fed_tokens is None:
            assert found.closed.outcome == Outcome.ABORTED
            assert sorted(found.at) == list(range(found.closed.total_tokens))
        else:
            assert (found.closed.outcome, found.closed.total_tokens) == (Outcome.FINISHED, each.fed_tokens)


def test_two_api_servers_are_one_engine(told):
    _, _, sink = told
    assert {hello.engine for hello in sink.hellos} == {"0"}
    assert len({hello.boot_id for hello in sink.hellos}) == 1
