"""Whose message is merged next: fair shares of one event loop among streams, by the bytes that each one sends.

Start-time fair queueing (Goyal, Vin, Cheng 1996): a message begins at the later of the virtual time and the end of its
stream's message before, and ends its length later; the one that begins first goes first. A stream that sends fifty
times as much as another one waits for its own messages, not the other one for them.

A stream waits with one message at a time and reads no further meanwhile, so that what it sends beyond its share stays
in gRPC's window and then in its sender's bounded buffer.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Flow:
    """What one stream has used, in virtual bytes."""

    end: float = 0.0


@dataclass(frozen=True)
class FairQueueFacts:
    """Messages that wait for their turn."""

    waiting: int = 0
    oldest_seconds: float = 0.0
    """How long the one that waits longest has."""


class FairQueue:
    """Runs short pieces of work one at a time, in the order of fair shares."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._virtual = 0.0
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, float, asyncio.Future[None]]] = []
        self._server: asyncio.Task[None] | None = None

    @property
    def facts(self) -> FairQueueFacts:
        """Who waits now."""
        since = min((since for _, _, since, _ in self._waiting), default=None)
        return FairQueueFacts(len(self._waiting), 0.0 if since is None else self._clock() - since)

    async def run(self, flow: Flow, cost: int, work: Callable[[], T], *, alone: bool) -> T:
        """Do the work when it is this flow's turn; `alone`: there is nobody to share with."""
        start = max(self._virtual, flow.end)
        flow.end = start + cost
        if alone and not self._waiting:
            self._virtual = start
            return work()
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (start, next(self._numbers), self._clock(), turn))
        if self._server is None or self._server.done():
            self._server = asyncio.create_task(self._serve())
        await turn
        return work()

    async def _serve(self) -> None:
        while self._waiting:
            # Whoever has a message by now may wait with it, before one of them is chosen.
            await asyncio.sleep(0)
            start, _, _, turn = heapq.heappop(self._waiting)
            self._virtual = max(self._virtual, start)
            if not turn.done():
                turn.set_result(None)
                # Its work is done when the loop has come round to it.
                await asyncio.sleep(0)
