"""The text of /metrics, made beside the loop: a page of 1,024 features takes some tenths of a second."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from latentwatch.export.families import Family
from latentwatch.export.prometheus import render

_MOST_AT_ONCE: Final = 8
"""Two Prometheus, an agent, a doctor and some people; they wait for each other, and a scrape may take ten seconds."""


class Busy(Exception):
    """So many ask at once that one more would wait for too long."""


class MetricsPage:
    """One page at a time, in a thread of its own, so that other threads' slow disks hold no scrape up.

    The thread rests for as long as a page took it. Whoever reads a page slowly has it already and holds nobody up. A
    page that fails fails its own scrape only.
    """

    def __init__(self, families: Callable[[], Iterable[Family]]) -> None:
        """Args: families: called in the loop, once a page; what it returns is read in the thread."""
        self._families = families
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._turn = asyncio.Lock()
        self._asked = 0
        self._rested_at = 0.0

    async def render(self, *, open_metrics: bool) -> bytes:
        """The page as of when its turn came. Raises Busy."""
        if self._asked >= _MOST_AT_ONCE:
            raise Busy(f"{self._asked} others ask for this page already; give them a longer scrape_interval")
        self._asked += 1
        try:
            async with self._turn:
                await asyncio.sleep(self._rested_at - time.monotonic())
                return await self._made(open_metrics)
        finally:
            self._asked -= 1

    async def _made(self, open_metrics: bool) -> bytes:
        page, began = functools.partial(render, self._families(), open_metrics=open_metrics), time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, page)
        finally:
            # The thread shares the interpreter with the loop: a scraper that never stops asking gets half of it.
            self._rested_at = 2 * time.monotonic() - began
