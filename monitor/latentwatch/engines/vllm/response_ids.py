"""The id that a client is answered with, from where vLLM's server decides it to where the engine is given the requests.

The server makes the engine's ids of it: a number for each prompt, a word for each beam, hex digits for uniqueness.
Those cannot be taken off again without guessing. It notes the id itself in the metadata of the response, before it asks
the engine; what it notes while it serves one HTTP request is kept beside that request.
"""

from __future__ import annotations

import contextvars
import functools
import sys
from typing import Any, Final

_METADATA: Final = "RequestResponseMetadata"
_SERVERS: Final = "vllm.entrypoints"
_SEEN: Final = "latentwatch_served"
"""In the scope of an HTTP request that has its place: apps within the app are called with the same."""
_served: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("latentwatch_served", default=None)
"""Of the HTTP request that is served here. A dict, so that tasks which began before the id was known see it too."""


def install(app_class: Any) -> None:
    """Wrap Starlette's `__call__`: each HTTP request from here on has a place for its response id. Idempotent."""
    original = app_class.__call__
    if hasattr(original, "_latentwatch_wrapped"):
        return

    @functools.wraps(original)
    async def call(self: object, scope: Any, receive: object, send: object) -> None:
        # Not by the context: uvicorn begins the next request of a pipelined connection within that of the one before.
        if scope.get("type") != "http" or _SEEN in scope:
            await original(self, scope, receive, send)
            return
        scope[_SEEN] = True
        _watch_metadata()
        token = _served.set({})
        try:
            await original(self, scope, receive, send)
        finally:
            _served.reset(token)

    call._latentwatch_wrapped = True  # type: ignore[attr-defined]
    app_class.__call__ = call


def current() -> str:
    """The response id of the HTTP request that is being served, empty where there is none or it is not known."""
    served = _served.get()
    return served.get("response_id", "") if served else ""


_watched: list[type] = []


def _watch_metadata() -> None:
    """Wrap the constructor of the metadata, wherever this vLLM has it; it is loaded for sure once the server runs."""
    if _watched:
        return
    for name, module in list(sys.modules.items()):
        found = getattr(module, _METADATA, None) if name.startswith(_SERVERS) else None
        if isinstance(found, type) and found not in _watched:
            _watched.append(found)
            _note_ids(found)


def _note_ids(metadata_class: Any) -> None:
    original = metadata_class.__init__

    @functools.wraps(original)
    def init(self: Any, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        served = _served.get()
        if served is not None:
            served["response_id"] = str(getattr(self, "request_id", ""))

    metadata_class.__init__ = init
