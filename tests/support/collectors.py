"""A real collector in this process, and one request that exceeds a limit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch.collector.core import Core
from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.evidence import Evidence, Meant
from latentwatch.collector.http.app import make_app
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.names import Severity
from latentwatch.transport.sink import Sink
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.file import Feature, Limit
from starlette.types import ASGIApp

from tests.support.drift import random_baseline
from tests.support.streams import Piece, Tokens, hello, probe, received, sparse, step_batch, watchlist
from tests.support.wire import in_loop

FEATURES = (
    sparse("jailbreak", limit=Limit("max", 1.0), severity=Severity.CRITICAL, label="Complying <b>with</b> a jailbreak"),
    probe("deceive", limit=Limit("max", 9.0)),
)


def app_of(
    core: Core,
    now: float,
    *,
    evidence: Evidence | None = None,
    process: Callable[[], ProcessFacts] = lambda: ProcessFacts(1.0, 2, 3.0),
) -> ASGIApp:
    """The HTTP side of a core without state on a disk."""

    async def forget(meant: Meant) -> bool:
        core.forget(meant)
        return True

    def facts() -> ProcessFacts:
        return replace(process(), evidence=evidence.facts()) if evidence else process()

    return make_app(core.lookup, clock=lambda: now, process=facts, forget=forget, evidence=evidence)


@contextlib.contextmanager
def collector(
    folder: Path, features: Sequence[Feature] = FEATURES, *, http: str = "127.0.0.1:0", **settings: Any
) -> Iterator[Service]:
    """A service on free addresses, without engines."""
    built = watchlist_file.write(watchlist(features), folder / "w.safetensors")
    settings.setdefault("drift", DriftSettings(random_baseline(features, sha256=built.sha256)))
    made = Service(CollectorSettings(folder / "w.safetensors", (f"unix://{folder}/c.sock",), http, **settings))
    in_loop(made.start())
    try:
        yield made
    finally:
        in_loop(made.stop())


def exceed(
    service: Service,
    request_id: str = "chatcmpl-1-0123abcd",
    features: Sequence[Feature] = FEATURES,
    sink: Sink | None = None,
) -> None:
    """One engine, and a request of four tokens, the third above the first feature's limit with 5.0. Its drift window
    closes."""
    who = hello(watchlist_sha256=service.core.watchlist.sha256)
    act = np.zeros((4, len(features)), np.float32)
    act[2, 0] = 5.0
    request = Tokens(1, 2, act, np.ones(4, int), np.ones((4, 1), np.float32), request_id=request_id)
    batch = step_batch(
        [Piece(request, 0, 4)],
        features,
        time_unix_nano=time.time_ns(),
        opened=[request.opened()],
        closed=[request.closed()],
    )
    sink = sink or service.core.ingest
    sink.hello(who, time.time())
    sink.observe(who, received(1, batch), time.time())
    service.core.drift.tick(time.time() + 60)
