"""What the client's server knows of a request, from its process to the worker: trace context and response id.

vLLM drops `trace_headers` where it exports no traces itself, and never sends them to a worker; and a worker learns only
the engine's own id of a request, of which the client's cannot be had back. The sampling parameters do travel there,
with `extra_args` as they are; a request carries in these, under keys of ours, what is to be known of it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from latentwatch.client_ids import bounded_id, carried
from latentwatch.engines.vllm import response_ids
from latentwatch.engines.vllm.interfaces import NewRequest

KEY: Final = "latentwatch_traceparent"
"""In `extra_args`. A client may fill those itself (`vllm_xargs`): what it wrote under these keys is overwritten."""
RESPONSE_KEY: Final = "latentwatch_response_id"
UNTRACED_KEY: Final = "latentwatch_untraced"
"""Beside them: how many requests could not be given theirs since the last one that could."""
_OURS: Final = {KEY, RESPONSE_KEY, UNTRACED_KEY}

# W3C Trace Context, version 00; all-zero ids are invalid there.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Told(NamedTuple):
    """What a request carried to the worker."""

    traceparent: str = ""
    response_id: str = ""
    """As client_ids carries it; empty where no server told."""
    untraced: int = 0
    """Requests before this one, by its word, that were served without; and this one, where it cannot be read."""


def install(engine_class: Any) -> None:
    """Wrap `add_request` of vLLM's AsyncLLM. Idempotent. Raises AttributeError on an unknown vLLM."""
    original = engine_class.add_request
    if hasattr(original, "_latentwatch_wrapped"):
        return
    signature = inspect.signature(original)
    # They are looked up by name below; a vLLM without them is refused here, not at the first request.
    if not {"request_id", "prompt", "params", "trace_headers"} <= set(signature.parameters):
        raise AttributeError(f"AsyncLLM.add_request takes {list(signature.parameters)}")
    untraced = 0

    @functools.wraps(original)
    def add_request(*args: object, **kwargs: object) -> object:
        nonlocal untraced
        try:
            bound = signature.bind(*args, **kwargs)
            response_id = response_ids.current() or str(bound.arguments["request_id"])
            told = _told(bound.arguments.get("trace_headers"), response_id, untraced)
            prompt = bound.arguments["prompt"]
            # A request that is made already brings its own parameters; those given beside it are not used.
            if getattr(prompt, "sampling_params", None) is not None and hasattr(prompt, "external_req_id"):
                prompt.sampling_params = _carrying(prompt.sampling_params, told)
            bound.arguments["params"] = _carrying(bound.arguments["params"], told)
        except Exception:
            # A call that vLLM itself will refuse, or parameters of an unknown kind: served, without a trace context.
            untraced += 1
            return original(*args, **kwargs)
        untraced = 0
        return original(*bound.args, **bound.kwargs)

    add_request._latentwatch_wrapped = True  # type: ignore[attr-defined]
    engine_class.add_request = add_request


def told_of(new_request: NewRequest) -> Told:
    """What the request of a NewRequestData carries. Never raises: whatever a client wrote there costs only itself."""
    try:
        extra = getattr(new_request.sampling_params, "extra_args", None) or {}
        # A client's own, where the request came in past the wrapper.
        traceparent, untraced = str(extra.get(KEY, "")), extra.get(UNTRACED_KEY, 0)
        return Told(
            traceparent if _TRACEPARENT.fullmatch(traceparent) else "",
            carried(str(extra.get(RESPONSE_KEY, ""))),
            untraced if isinstance(untraced, int) and 0 <= untraced < 1 << 31 else 0,
        )
    except Exception:  # a client's own object, whatever it does when it is read
        return Told(untraced=1)


def _told(headers: Mapping[str, str] | None, response_id: str, untraced: int) -> dict[str, object]:
    """The keys of ours in `extra_args`."""
    traceparent = str((headers or {}).get("traceparent", ""))
    told: dict[str, object] = {RESPONSE_KEY: bounded_id(response_id)}
    if _TRACEPARENT.fullmatch(traceparent):
        told[KEY] = traceparent
    if untraced:
        told[UNTRACED_KEY] = untraced
    return told


def _carrying(params: Any, told: Mapping[str, object]) -> object:
    """A copy of `params` with what is told in it: the caller may use its own again."""
    extra = getattr(params, "extra_args", None) or {}
    params = copy.copy(params)
    params.extra_args = {**{key: value for key, value in extra.items() if key not in _OURS}, **told}
    return params
