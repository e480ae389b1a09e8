"""A request's traceparent reaches the worker whatever vLLM does with trace headers, and a client cannot forge it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from latentwatch.engines.vllm import trace_context

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


def arrived(engine: Engine) -> str:
    return trace_context.traceparent_of(SimpleNamespace(sampling_params=engine.got[2]))


def test_the_traceparent_travels_in_the_sampling_parameters(engine):
    mine = params(temperature_schedule=1)
    assert engine.add_request("r", "prompt", mine, trace_headers={"traceparent": GOOD}) == "queue"
    assert arrived(engine) == GOOD
    assert engine.got[2].extra_args["temperature_schedule"] == 1
    assert mine.extra_args == {"temperature_schedule": 1}  # the caller's own object is not written


def test_a_request_without_one_is_passed_on_as_it_is(engine):
    mine = params()
    engine.add_request("r", "prompt", mine)
    assert engine.got == ("r", "prompt", mine, None)
    assert arrived(engine) == ""


@pytest.mark.parametrize("header", ["", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", GOOD + "-more", "x" * 10_000])
def test_what_is_not_a_traceparent_goes_no_further(engine, header):
    engine.add_request("r", "prompt", params(), trace_headers={"traceparent": header})
    assert arrived(engine) == ""


def test_a_client_cannot_write_the_key_itself(engine):
    engine.add_request("r", "prompt", params(latentwatch_traceparent=GOOD, other=2))
    assert arrived(engine) == ""
    assert engine.got[2].extra_args == {"other": 2}


def test_a_call_that_vllm_refuses_gets_vllms_own_error(engine):
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        engine.add_request("r")


def untraced(engine: Engine) -> int:
    return trace_context.untraced_before(SimpleNamespace(sampling_params=engine.got[2]))


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
    assert (trace_context.untraced_before(new), trace_context.traceparent_of(new)) == (0, "")
    engine.add_request("r", "prompt", carried)
    assert engine.got[2].extra_args == {}


def test_a_vllm_whose_add_request_has_other_parameters_is_not_patched():
    other = type("Other", (), {"add_request": lambda self, request: None})
    with pytest.raises(AttributeError, match="takes"):
        trace_context.install(other)
