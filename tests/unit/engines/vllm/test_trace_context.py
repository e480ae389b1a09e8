"""A request's traceparent reaches the worker whatever vLLM does with trace headers, and a client cannot forge it."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from latentwatch.client_ids import bounded_id
from latentwatch.engines.vllm import response_ids, trace_context

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Engine:
    """AsyncLLM.add_request's shape; keeps what reached it."""

    def add_request(
        self, request_id: str, prompt: Any, params: Any, lora_request: Any = None, trace_headers: Any = None
    ) -> str:
        self.got = (request_id, prompt, params, lora_request)
        return "queue"


@pytest.fixture
def engine() -> Engine:
    made = type("Fresh", (Engine,), {})
    trace_context.install(made)
    trace_context.install(made)  # a second load of the plugin changes nothing
    return made()


def params(**extra: Any) -> Any:
    return SimpleNamespace(extra_args=extra or None, max_tokens=3)


def told(engine: Engine) -> trace_context.Told:
    return trace_context.told_of(SimpleNamespace(sampling_params=engine.got[2]))


def arrived(engine: Engine) -> str:
    return told(engine).traceparent


def test_the_traceparent_travels_in_the_sampling_parameters(engine):
    mine = params(temperature_schedule=1)
    assert engine.add_request("r", "prompt", mine, trace_headers={"traceparent": GOOD}) == "queue"
    assert arrived(engine) == GOOD
    assert engine.got[2].extra_args["temperature_schedule"] == 1
    assert mine.extra_args == {"temperature_schedule": 1}  # the caller's own object is not written


def test_a_request_without_one_carries_its_id_alone(engine):
    engine.add_request("r", "prompt", params())
    assert (engine.got[0], engine.got[1], engine.got[3]) == ("r", "prompt", None)
    assert told(engine) == ("", "r", 0)


@pytest.mark.parametrize("header", ["", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", GOOD + "-more", "x" * 10_000])
def test_what_is_not_a_traceparent_goes_no_further(engine, header):
    engine.add_request("r", "prompt", params(), trace_headers={"traceparent": header})
    assert arrived(engine) == ""


def test_a_client_cannot_write_the_key_itself(engine):
    engine.add_request("r", "prompt", params(latentwatch_traceparent=GOOD, other=2))
    assert arrived(engine) == ""
    assert engine.got[2].extra_args == {"other": 2, trace_context.RESPONSE_KEY: "r"}


def test_a_client_cannot_say_what_another_was_answered_with(engine):
    engine.add_request("r", "prompt", params(latentwatch_response_id="chatcmpl-someone-else"))
    assert told(engine).response_id == "r"


def test_an_id_that_no_wire_takes_is_carried_as_its_digest(engine):
    for id in ("x" * 300, "lone \ud800 surrogate", "sha256:" + "0" * 64):
        engine.add_request(id, "prompt", params())
        assert told(engine).response_id == bounded_id(id) != id and len(bounded_id(id)) < 80


class Hostile:
    """Parameters that cannot be read: what a request brings costs that request alone."""

    @property
    def extra_args(self) -> Any:
        raise RuntimeError("not today")


@pytest.mark.parametrize("extra", [[1], "text", 7, Hostile()])
def test_a_worker_reads_nothing_of_a_request_that_it_cannot_read(extra):
    read = extra if isinstance(extra, Hostile) else SimpleNamespace(extra_args=extra)
    assert trace_context.told_of(SimpleNamespace(sampling_params=read)) == ("", "", 1)


def test_the_id_of_the_response_goes_before_what_the_server_makes_of_it(engine):
    """As vLLM's server does: it notes the id, then asks the engine under others, in a task that began before."""
    app = type("App", (), {"__call__": serve})
    response_ids.install(app)
    response_ids.install(app)
    assert asyncio.run(ask(app(), engine, "cmpl-a")) == ["cmpl-a"] * 2
    assert asyncio.run(ask(app(), engine, "")) == ["cmpl-a-0", "cmpl-a-1"]  # it noted none
    assert response_ids.current() == ""


def test_a_request_that_begins_within_another_ones_context_has_a_place_of_its_own(engine):
    """As uvicorn begins the next one of a connection whose client did not wait for the answer."""
    inner: list[str] = []

    async def serve_both(self: Any, scope: Any, receive: Any, send: Any) -> None:
        if scope["id"] == "cmpl-a":
            await note("cmpl-a")
            if "mounted" not in scope:
                await self({**scope, "mounted": True}, receive, send)
                await asyncio.create_task(self({"type": "http", "id": ""}, receive, send))
        inner.append(response_ids.current())

    app = type("App", (), {"__call__": serve_both})
    response_ids.install(app)
    asyncio.run(app()({"type": "http", "id": "cmpl-a"}, None, None))
    assert inner == ["cmpl-a", "", "cmpl-a"], "an app within the app, the next request, the first one again"


async def serve(self: Any, scope: Any, receive: Any, send: Any) -> None:
    noted = asyncio.Event()

    async def generate() -> None:
        await noted.wait()
        for i in range(2):
            scope["engine"].add_request(f"cmpl-a-{i}", "prompt", params())
            scope["told"].append(told(scope["engine"]).response_id)

    task = asyncio.create_task(generate())
    if scope["id"]:
        await asyncio.create_task(note(scope["id"]))
    noted.set()
    await task


async def note(response_id: str) -> None:
    sys.modules["vllm.entrypoints.fake"].RequestResponseMetadata(request_id=response_id)  # type: ignore[attr-defined]


async def ask(app: Any, engine: Engine, response_id: str) -> list[str]:
    found: list[str] = []
    await app({"type": "http", "id": response_id, "engine": engine, "told": found}, None, None)
    return found


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    class RequestResponseMetadata:
        def __init__(self, request_id: str) -> None:
            self.request_id = request_id

    module = SimpleNamespace(RequestResponseMetadata=RequestResponseMetadata)
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.fake", module)
    monkeypatch.setattr(response_ids, "_watched", [])


def test_a_call_that_vllm_refuses_gets_vllms_own_error(engine):
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        engine.add_request("r")


def untraced(engine: Engine) -> int:
    return told(engine).untraced


def test_requests_that_could_not_carry_their_trace_context_are_counted_by_the_next_that_can(engine):
    class Sealed:
        """Parameters without room for anything of ours, as vLLM's for pooling."""

        __slots__ = ()

    for _ in range(3):
        sealed = Sealed()
        engine.add_request("r", "prompt", sealed, trace_headers={"traceparent": GOOD})
        assert engine.got[2] is sealed  # served all the same
    engine.add_request("r", "prompt", params())
    assert (untraced(engine), arrived(engine)) == (3, "")
    engine.add_request("r", "prompt", params(), trace_headers={"traceparent": GOOD})
    assert (untraced(engine), arrived(engine)) == (0, GOOD)


@pytest.mark.parametrize("forged", ["7", -1, 1 << 40, None, [1]])
def test_a_forged_count_or_traceparent_is_nothing(engine, forged):
    carried = params(latentwatch_untraced=forged, latentwatch_traceparent="x" * 70_000)
    new = SimpleNamespace(sampling_params=carried)
    assert trace_context.told_of(new) == ("", "", 0)
    engine.add_request("r", "prompt", carried)
    assert engine.got[2].extra_args == {trace_context.RESPONSE_KEY: "r"}


def test_a_vllm_whose_add_request_has_other_parameters_is_not_patched():
    other = type("Other", (), {"add_request": lambda self, request: None})
    with pytest.raises(AttributeError, match="takes"):
        trace_context.install(other)
