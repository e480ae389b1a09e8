"""A chat from the server that names it to whoever asks for it or deletes it, through everything in between but vLLM:
the server's id, the tap, the ring, the ledger, the wire, the collector, its evidence and its HTTP side."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from latentwatch import secrets
from latentwatch.collector.core import Core
from latentwatch.collector.evidence import Evidence, EvidenceSettings
from latentwatch.collector.pseudonyms import Pseudonyms, PseudonymSink
from latentwatch.engines.vllm import response_ids, trace_context
from latentwatch.engines.vllm.arming import ArmedHook
from latentwatch.engines.vllm.step_tap import StepTap
from latentwatch.exporter.ledger import Ledger
from latentwatch.handover.ring import Geometry, Ring
from latentwatch.step.batch import EngineCounters
from latentwatch.transport import codec
from latentwatch.transport.sink import ReceivedBatch

from tests.support import tiny
from tests.support.collectors import app_of
from tests.support.evidence import NOW
from tests.support.fake_model import scheduled
from tests.support.streams import hello

TOKEN = "correct-horse-battery"
CLIENTS = ("session_42", "session", "session_43")


class Engine:
    """AsyncLLM.add_request's shape; what it is given goes to the worker under an id of its own."""

    def __init__(self) -> None:
        self.new: list[tuple[str, Any]] = []

    def add_request(self, request_id: str, prompt: Any, params: Any, trace_headers: Any = None) -> None:
        self.new.append((f"{request_id}-{len(self.new):08x}", params))


class Server:
    """vLLM's: of the header it makes the id of the response, notes it, and asks the engine, here for two choices."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        id = "chatcmpl-" + scope["x-request-id"]
        sys.modules["vllm.entrypoints.fake"].RequestResponseMetadata(id)  # type: ignore[attr-defined]
        for choice in range(2):
            self._engine.add_request(f"{id}_{choice}", "prompt", SimpleNamespace(extra_args=None), trace_headers={})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    class RequestResponseMetadata:
        def __init__(self, request_id: str) -> None:
            self.request_id = request_id

    module = SimpleNamespace(RequestResponseMetadata=RequestResponseMetadata)
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.fake", module)
    monkeypatch.setattr(response_ids, "_watched", [])
    engine, made = type("Fresh", (Engine,), {}), type("FreshServer", (Server,), {})
    trace_context.install(engine)
    response_ids.install(made)
    served: Server = made(engine())
    return served


def delivered(new: list[tuple[str, Any]], hooks: tuple[ArmedHook, ...]) -> Iterator[ReceivedBatch]:
    """What a collector reads off the wire: a step in which each computes its prompt of three, and their ends."""
    n = len(new)
    sizes = {"features": 5 * len(hooks), "dense": len(hooks), "hook_points": len(hooks)}
    ring = Ring.create(Geometry(max_requests=n, max_rows=3 * n, **sizes))
    tap, ledger = StepTap(ring, hooks, on_gpu=False), Ledger(armed=True, drafts=False)
    first = scheduled({name: 3 for name, _ in new}, new=[(name, 3) for name, _ in new])
    for told, (_, params) in zip(first.scheduled_new_reqs, new, strict=True):
        told.sampling_params = params
    for hook in hooks:
        hook.act_TK[: 3 * n] = 2.0
        hook.stat_T3[: 3 * n, 0] = 7.0
    last = scheduled({}, finished={name: (1, False) for name, _ in new})
    for number, (names, output) in enumerate((([name for name, _ in new], first), ([], last)), 1):
        at = np.zeros(len(names) + 1, np.int32)
        batch = SimpleNamespace(req_ids=names, num_reqs=len(names), num_computed_tokens_cpu=at)
        tap.after_step(SimpleNamespace(input_batch=batch, execute_model_state=None), output)
        raw = ring.peek()
        assert raw is not None
        received = codec.decode_request(codec.encode_batch(number, ledger.settle(raw, EngineCounters())))
        ring.release()
        assert isinstance(received, ReceivedBatch)
        yield received


Ask = Callable[[str, str], httpx.Response]


@pytest.fixture(params=[b"", b"k" * 32], ids=["clear", "hashed"])
def ask(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> Iterator[Ask]:
    """A collector that saw these clients' chats, each of two choices. With a key it holds hashes."""
    watchlist = tiny.watchlist(tmp_path / "w.safetensors", sparse=4, dense=1)
    hooks = tuple(ArmedHook(rows, torch.zeros(32, 5), torch.ones(32, 3)) for rows in watchlist.hooks)
    for hook in hooks:
        hook.stat_T3[:, 2] = 0
        hook.reset()
    secrets.write(tmp_path / "token", TOKEN.encode())
    pseudonyms = Pseudonyms(request.param, lambda _: False) if request.param else None
    settings = EvidenceSettings(tmp_path / "evidence", token_file=tmp_path / "token")
    evidence = Evidence(settings, watchlist, lambda: NOW, pseudonyms)
    core = Core(watchlist, evidence=[evidence.put], evidence_scope="all", pseudonyms=pseudonyms)
    sink = PseudonymSink(core.ingest, pseudonyms) if pseudonyms else core.ingest
    for client in CLIENTS:
        asyncio.run(server({"type": "http", "x-request-id": client}, None, None))
    who = hello(watchlist_sha256=watchlist.sha256)
    sink.hello(who, NOW)
    for batch in delivered(server._engine.new, hooks):
        sink.observe(who, batch, NOW)
    evidence.written().result(10)
    app = app_of(core, NOW, evidence=evidence)

    def ask(method: str, path: str) -> httpx.Response:
        async def once() -> httpx.Response:
            transport, headers = httpx.ASGITransport(app), {"authorization": f"Bearer {TOKEN}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
                return await client.request(method, path)

        return asyncio.run(once())

    yield ask
    evidence.close()
    if pseudonyms:
        assert not any(b"session" in path.read_bytes() for path in (tmp_path / "evidence").iterdir())


@pytest.mark.parametrize("name", ["chatcmpl-{}", "{}"])
def test_each_client_finds_its_own_two_choices_by_what_it_holds(ask: Ask, name: str):
    found = {}
    for client in CLIENTS:
        for room in ("/v1/evidence/requests/", "/v1/requests/"):
            requests = ask("GET", room + name.format(client)).json()["requests"]
            assert [each["tokens"]["scored"] for each in requests] == [3, 3]
            found[client] = {each["request_id"] for each in requests}
    assert len(set.union(*found.values())) == 2 * len(CLIENTS)


@pytest.mark.parametrize("name", ["chatcmpl-{}", "{}"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_deletion_takes_those_and_leaves_everybody_elses(ask: Ask, client: str, name: str):
    mine = name.format(client)
    would = ask("DELETE", f"/v1/evidence/requests/{mine}?dry_run=true").json()
    done = ask("DELETE", f"/v1/evidence/requests/{mine}").json()
    assert done["requests"] == 2 and done["deleted"] == would["deleted"]
    for other in CLIENTS:
        for room in ("/v1/evidence/requests/", "/v1/requests/"):
            assert ask("GET", f"{room}chatcmpl-{other}").status_code == (404 if other == client else 200)
    assert ask("DELETE", f"/v1/evidence/requests/{mine}").status_code == 404
