"""A collector that only writes down: every batch an exporter delivered, put back together per request and position."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch.names import Phase, Reason, TokenState
from latentwatch.step.batch import RequestClosed, RequestOpened, StepBatch, owns_rows
from latentwatch.step.checks import validate
from latentwatch.transport.hello import Hello
from latentwatch.transport.receiver import Receiver
from latentwatch.transport.sink import ReceivedBatch
from latentwatch.watchlist.file import Watchlist


@dataclass
class Scores:
    """What one request showed: features [F] by position; NaN rows were not seen."""

    opened: RequestOpened
    engine: str = "0"
    """Index of the engine that served it."""
    closed: RequestClosed | None = None
    at: dict[int, Any] = field(default_factory=dict)
    norm_at: dict[int, Any] = field(default_factory=dict)
    tokens: Counter[tuple[TokenState, Reason, Phase]] = field(default_factory=Counter)


class RecordingSink:
    """A Sink that keeps everything."""

    def __init__(self) -> None:
        self.hellos: list[Hello] = []
        self.batches: list[StepBatch] = []
        self.engine_of: list[str] = []
        """By batch: the index of the engine that it came from."""
        self._held: dict[tuple[str, str], int] = {}
        self.errors: list[str] = []

    def hello(self, hello: Hello, now: float) -> int:
        self.hellos.append(hello)
        return self._held.get((hello.replica, hello.boot_id), 0)

    def observe(self, hello: Hello, received: ReceivedBatch, now: float) -> None:
        sequence, held = received.sequence, self._held.get((hello.replica, hello.boot_id), 0)
        if sequence > held:
            if sequence != held + 1:
                self.errors.append(f"sequence {sequence} after {held}")
            self._held[hello.replica, hello.boot_id] = sequence
            self.engine_of.append(hello.engine)
            self.batches.append(received.batch)

    def commit(self) -> None:
        pass

    def goodbye(self, hello: Hello, now: float) -> None:
        pass

    def requests(self, watchlist: Watchlist) -> dict[str, Scores]:
        """By the engine's request id. Asserts on the way that no position was delivered twice."""
        by_handle: dict[tuple[str, int], Scores] = {}
        sparse = watchlist.sparse_F
        batches = list(self.batches)
        for engine, batch in zip(self.engine_of, batches, strict=False):
            validate(batch, sparse_F=sparse, hook_points=len(watchlist.hooks))
            for opened in batch.opened:
                # Said again of a session whose prompt has grown.
                by_handle.setdefault((engine, opened.handle), Scores(opened, engine)).opened = opened
            values = np.zeros((batch.rows, len(sparse)), np.float32)
            values[batch.fires_N["row"], batch.fires_N["feature"]] = batch.fires_N["act"]
            if batch.rows:
                values[:, ~sparse] = batch.dense_RP
            row = 0
            for segment, owns in zip(batch.segments_S, owns_rows(batch.segments_S), strict=True):
                scores = by_handle[engine, int(segment["handle"])]
                count = int(segment["count"])
                key = TokenState(segment["state"]), Reason(segment["reason"]), Phase(segment["phase"])
                scores.tokens[key] += count
                for offset in range(count if owns else 0):
                    position = int(segment["start"]) + offset
                    assert position not in scores.at, f"position {position} of {scores.opened.request_id} came twice"
                    scores.at[position] = values[row + offset]
                    scores.norm_at[position] = batch.norm_RH[row + offset]
                row += count if owns else 0
            for closed in batch.closed:
                by_handle[engine, closed.handle].closed = closed
        return {scores.opened.request_id: scores for scores in by_handle.values()}


class RecordingCollector:
    """A receiver with a RecordingSink in a thread: `with RecordingCollector(path) as collector:`."""

    def __init__(self, socket: Path) -> None:
        self.target = f"unix://{socket}"
        self.sink = RecordingSink()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._receiver: Receiver | None = None

    def __enter__(self) -> RecordingCollector:
        self._thread.start()

        async def start() -> None:
            self._receiver = Receiver(self.sink, [self.target], clock=time.time)
            await self._receiver.start()

        asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._receiver is not None
        asyncio.run_coroutine_threadsafe(self._receiver.stop(1.0), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def wait_closed(self, requests: int, seconds: float = 20.0) -> None:
        """Until that many requests are closed, or the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if sum(len(batch.closed) for batch in list(self.sink.batches)) >= requests:
                return
            time.sleep(0.05)
