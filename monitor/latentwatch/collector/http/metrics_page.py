"""The text of /metrics, made beside the loop: a page of 1,024 features takes some tenths of a second."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from latentwatch.export.families import Family
from latentwatch.export.prometheus import render


class MetricsPage:
    """One page at a time, in a thread of its own, so that other threads' slow disks hold no scrape up.

    Whoever asks while a page waits for its turn gets that one: however many ask, a scrape waits for one page before its
    own, and none can crowd another out. The thread rests for as long as a page took it. Whoever reads a page slowly has
    it already and holds nobody up. A page that fails fails those who waited for it.
    """

    def __init__(self, families: Callable[[], Iterable[Family]]) -> None:
        """Args: families: called in the loop, once a page; what it returns is read in the thread."""
        self._families = families
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._turn = asyncio.Lock()
        self._next: dict[bool, asyncio.Task[bytes]] = {}
        """The page that waits for its turn, by `open_metrics`."""
        self._rested_at = 0.0

    async def render(self, *, open_metrics: bool) -> bytes:
        """The page as of when its turn came, which is after this was called."""
        page = self._next.get(open_metrics)
        if page is None:
            page = self._next[open_metrics] = asyncio.create_task(self._in_turn(open_metrics))
            page.add_done_callback(_look_at)
        # One who hangs up takes the page from nobody else.
        return await asyncio.shield(page)

    async def _in_turn(self, open_metrics: bool) -> bytes:
        async with self._turn:
            await asyncio.sleep(self._rested_at - time.monotonic())
            del self._next[open_metrics]
            return await self._made(open_metrics)

    async def _made(self, open_metrics: bool) -> bytes:
        page, began = functools.partial(render, self._families(), open_metrics=open_metrics), time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, page)
        finally:
            # The thread shares the interpreter with the loop: a scraper that never stops asking gets half of it.
            self._rested_at = 2 * time.monotonic() - began


def _look_at(page: asyncio.Task[bytes]) -> None:
    """So that a failure of which nobody waited any more is no complaint of asyncio's."""
    if not page.cancelled():
        page.exception()
