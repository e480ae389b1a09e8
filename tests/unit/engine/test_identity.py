"""A request's traceparent reaches the worker whatever vLLM does with trace headers, and a client cannot forge it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from monitor.engine import identity

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
    identity.install(made)
    identity.install(made)  # a second load of the plugin changes nothing
    return made()


def params(**extra: Any) -> Any:
    return SimpleNamespace(extra_args=extra or None, max_tokens=3)


def arrived(engine: Engine) -> str:
    return identity.traceparent_of(SimpleNamespace(sampling_params=engine.got[2]))


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


def test_a_vllm_whose_add_request_has_other_parameters_is_not_patched():
    other = type("Other", (), {"add_request": lambda self, request: None})
    with pytest.raises(AttributeError, match="takes"):
        identity.install(other)
