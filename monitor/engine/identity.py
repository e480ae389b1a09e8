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

KEY: Final = "latentwatch_traceparent"
"""In `extra_args`. A client may fill those itself (`vllm_xargs`): what it wrote under this key is overwritten."""

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

    @functools.wraps(original)
    def add_request(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
            bound.arguments["params"] = _carrying(bound.arguments["params"], bound.arguments.get("trace_headers"))
        except Exception:
            # A call that vLLM itself will refuse, or parameters of an unknown kind: served, without a trace context.
            return original(*args, **kwargs)
        return original(*bound.args, **bound.kwargs)

    add_request._latentwatch_wrapped = True  # type: ignore[attr-defined]
    engine_class.add_request = add_request


def traceparent_of(new_request: Any) -> str:
    """The traceparent that the request of a NewRequestData carries, empty for none."""
    extra = getattr(new_request.sampling_params, "extra_args", None)
    return str(extra.get(KEY, "")) if extra else ""


def _carrying(params: Any, headers: Mapping[str, str] | None) -> Any:
    """`params`, or a copy of them where the key must be set or taken out. The caller may use its own again."""
    found = str((headers or {}).get("traceparent", ""))
    extra = getattr(params, "extra_args", None) or {}
    if not _TRACEPARENT.fullmatch(found):
        if KEY not in extra:
            return params
        found = ""
    params = copy.copy(params)
    params.extra_args = {**{k: v for k, v in extra.items() if k != KEY}, **({KEY: found} if found else {})}
    return params
