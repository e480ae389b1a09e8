"""Entry point `vllm.general_plugins`: vLLM calls register() in every process that it starts.

Only patches are installed here: no thread, no CUDA, no socket. Without LATENTWATCH_WATCHLIST and LATENTWATCH_COLLECTOR
nothing is touched at all, and LATENTWATCH_DISABLE=1 wins over both.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import multiprocessing
from typing import TYPE_CHECKING, Any, Final

from latentwatch.engines.vllm import settings
from latentwatch.engines.vllm.settings import PluginSettings
from latentwatch.watchlist.file import Watchlist

if TYPE_CHECKING:
    from latentwatch.engines.vllm.attach import Attachment
    from latentwatch.engines.vllm.interfaces import Worker

logger = logging.getLogger("vllm.latentwatch")

_attachments: list[Attachment] = []
"""One per worker of this process."""
_ENGINE_PROCESSES: Final = ("EngineCore", "VllmWorker")
"""How vLLM names the processes that take no request from a client."""


def register() -> None:
    """Install the patches, once per process. Never raises: a monitor that cannot start must not stop the server."""
    try:
        chosen = PluginSettings.from_env()
        if chosen.wanted:
            _install(chosen)
    except Exception:
        # vLLM would log it and go on too, but without saying what it means.
        logger.exception("latentwatch: the plugin could not be installed; the model is served unwatched")


def _install(chosen: PluginSettings) -> None:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus
    from vllm.v1.worker.worker_base import WorkerBase

    from latentwatch.engines.vllm import request_ends, trace_context

    if hasattr(WorkerBase, "_latentwatch_wrapped"):
        return
    WorkerBase._latentwatch_wrapped = True
    request_ends.install(Scheduler, RequestStatus)
    _attach_to_workers(WorkerBase, chosen)
    _salt_compile_cache(VllmConfig, chosen)
    if not multiprocessing.current_process().name.startswith(_ENGINE_PROCESSES):
        # Requests come in here. The module costs an engine process half a second of its start, for nothing.
        from starlette.applications import Starlette
        from vllm.v1.engine.async_llm import AsyncLLM

        from latentwatch.engines.vllm import response_ids

        trace_context.install(AsyncLLM)
        response_ids.install(Starlette)


def _attach_to_workers(worker_class: Any, chosen: PluginSettings) -> None:
    """Wrap WorkerBase.__init__: in a spawned worker the plugin is loaded inside the frame of everything earlier."""
    original = worker_class.__init__

    @functools.wraps(original)
    def init(self: Worker, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        try:
            from latentwatch.engines.vllm.attach import Attachment

            _attachments.append(Attachment(self, chosen))
        except Exception:
            # Inside the worker's own constructor: raised, it would end the server (I4).
            logger.exception("latentwatch: could not attach to the worker; the model is served unwatched")

    worker_class.__init__ = init


def _salt_compile_cache(config_class: Any, chosen: PluginSettings) -> None:
    """Make a graph with the op and one without it different entries of vLLM's compile cache.

    Plugin code is not in the cache key: without this, a graph that was cached before the plugin was installed is
    loaded silently and nothing is scored, and one that was cached with it crashes a server that runs without.
    """
    original = config_class.compute_hash

    @functools.wraps(original)
    def compute_hash(self: object, *args: object, **kwargs: object) -> str:
        plain: str = original(self, *args, **kwargs)
        salt = _salt(chosen)
        if not salt:
            return plain
        return hashlib.sha256(f"{plain}/{salt}".encode()).hexdigest()[: len(plain)]

    config_class.compute_hash = compute_hash


def _salt(chosen: PluginSettings) -> str:
    """By what the worker of this process has armed; elsewhere, by what it is going to arm."""
    try:
        if _attachments:
            return str(_attachments[-1].salt)
        watchlist = settings.load_watchlist(chosen)
        return settings.graph_key(watchlist.hooks) if isinstance(watchlist, Watchlist) else ""
    except Exception:
        logger.exception("latentwatch: no salt for the compile cache")
        return ""
