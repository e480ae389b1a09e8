"""The client's trace context, from the API server's process to the worker.

vLLM drops `trace_headers` where it exports no traces itself, and never sends them to a worker. The sampling parameters
do travel there, with `extra_args` as they are; a request carries its traceparent in these, under a key of ours.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, Final

from latentwatch.engines.vllm.interfaces import NewRequest

KEY: Final = "latentwatch_traceparent"
"""In `extra_args`. A client may fill those itself (`vllm_xargs`): what it wrote under these keys is overwritten."""
UNTRACED_KEY: Final = "latentwatch_untraced"
"""Beside it: how many requests could not be given theirs since the last one that could."""

# W3C Trace Context, version 00; all-zero ids are invalid there.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def install(engine_class: Any) -> None:
    """Wrap `add_request` of vLLM's AsyncLLM. Idempotent. Raises AttributeError on an unknown vLLM."""
    original = engine_class.add_request
    if hasattr(original, "_latentwatch_wrapped"):
        return
    signature = inspect.signature(original)
    # Both are looked up by name below; a vLLM without them is refused here, not at the first request.
    if not {"params", "trace_headers"} <= set(signature.parameters):
        raise AttributeError(f"AsyncLLM.add_request takes {list(signature.parameters)}")
    untraced = 0

    @functools.wraps(original)
    def add_request(*args: object, **kwargs: object) -> object:
        nonlocal untraced
        try:
            bound = signature.bind(*args, **kwargs)
            params = _carrying(bound.arguments["params"], bound.arguments.get("trace_headers"), untraced)
            bound.arguments["params"] = params
        except Exception:
            # A call that vLLM itself will refuse, or parameters of an unknown kind: served, without a trace context.
            untraced += 1
            return original(*args, **kwargs)
        untraced = 0
        return original(*bound.args, **bound.kwargs)

    add_request._latentwatch_wrapped = True  # type: ignore[attr-defined]
    engine_class.add_request = add_request


def traceparent_of(new_request: NewRequest) -> str:
    """The traceparent that the request of a NewRequestData carries, empty for none."""
    found = str(_carried(new_request).get(KEY, ""))
    # A client's own, where the request came in past the wrapper.
    return found if _TRACEPARENT.fullmatch(found) else ""


def untraced_before(new_request: NewRequest) -> int:
    """How many requests before this one, by its word, were served without their trace context."""
    found = _carried(new_request).get(UNTRACED_KEY, 0)
    return found if isinstance(found, int) and 0 <= found < 1 << 31 else 0


def _carried(new_request: NewRequest) -> Mapping[str, object]:
    return getattr(new_request.sampling_params, "extra_args", None) or {}


def _carrying(params: Any, headers: Mapping[str, str] | None, untraced: int) -> object:
    """`params`, or a copy of them where a key of ours must be set or taken out. The caller may use its own again."""
    found = str((headers or {}).get("traceparent", ""))
    ours = {KEY: found} if _TRACEPARENT.fullmatch(found) else {}
    told = {UNTRACED_KEY: untraced} if untraced else {}
    extra = getattr(params, "extra_args", None) or {}
    if not ours and not told and not {KEY, UNTRACED_KEY} & set(extra):
        return params
    params = copy.copy(params)
    params.extra_args = {**{k: v for k, v in extra.items() if k not in (KEY, UNTRACED_KEY)}, **ours, **told}
    return params
