"""/metrics under many scrapers: the loop goes on, few wait, and none harms another."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import urllib.request

import pytest
from latentwatch.collector.core import Core
from latentwatch.collector.http.metrics_page import MetricsPage
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.export.families import Family
from latentwatch.export.metrics import Metric
from starlette.testclient import TestClient

from tests.support.collectors import app_of, collector
from tests.support.streams import sparse, watchlist

THINGS = Metric("latentwatch_things_total", "counter", (), "Things.")


class Slow:
    """Families that are there once `go` is set; `asked` counts pages that were begun."""

    def __init__(self):
        self.asked, self.go, self.threads = 0, threading.Event(), set()

    def __call__(self):
        self.asked += 1
        return self._families(self.asked)

    def _families(self, value):
        self.threads.add(threading.current_thread().name)
        self.go.wait(10)
        yield Family(THINGS, ((),), [value])


async def settled():
    for _ in range(10):
        await asyncio.sleep(0.001)


def test_the_loop_goes_on_while_a_page_is_made():
    async def scene():
        slow = Slow()
        asked = asyncio.create_task(MetricsPage(slow).render(open_metrics=False))
        await settled()  # would not return if the page were made in the loop
        assert not asked.done()
        slow.go.set()
        assert b"latentwatch_things_total 1.0\n" in await asked
        assert slow.threads == {"metrics_0"}

    asyncio.run(scene())


def test_one_page_is_made_at_a_time_each_as_of_its_own_turn():
    async def scene():
        slow = Slow()
        page = MetricsPage(slow)
        asked = [asyncio.create_task(page.render(open_metrics=False))]
        await settled()
        asked += [asyncio.create_task(page.render(open_metrics=wanted)) for wanted in (False, True)]
        await settled()
        assert slow.asked == 1, "the moment of a page is when its turn comes, and one moment is in memory"
        slow.go.set()
        assert [made.split()[-1] for made in await asyncio.gather(*asked[:2])] == [b"1.0", b"2.0"]
        assert b" 3.0\n" in await asked[2]

    asyncio.run(scene())


def test_however_many_ask_none_is_crowded_out_and_two_pages_are_made():
    """The ninth was refused once, whoever the eight were."""

    async def scene():
        slow = Slow()
        page = MetricsPage(slow)
        asked = [asyncio.create_task(page.render(open_metrics=False)) for _ in range(500)]
        await settled()
        asked += [asyncio.create_task(page.render(open_metrics=False)) for _ in range(500)]
        await settled()
        slow.go.set()
        made = [text.split()[-1] for text in await asyncio.gather(*asked)]
        assert made == [b"1.0"] * 500 + [b"2.0"] * 500 and slow.asked == 2

    asyncio.run(scene())


def test_a_scraper_that_hangs_up_takes_the_page_from_nobody():
    async def scene():
        slow = Slow()
        page = MetricsPage(slow)
        for _ in range(5):
            asked = asyncio.create_task(page.render(open_metrics=False))
            await settled()
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        asked = asyncio.create_task(page.render(open_metrics=False))
        await settled()
        slow.go.set()
        assert await asked

    asyncio.run(scene())


def test_the_thread_rests_for_as_long_as_a_page_took_it():
    """Both share one interpreter: under a scraper that never stops asking, streams would have what is left over."""

    async def scene():
        turns: list[tuple[float, float]] = []

        def families():
            began = time.monotonic()
            yield Family(THINGS, ((),), [1])
            time.sleep(0.2)
            turns.append((began, time.monotonic()))

        page = MetricsPage(families)
        await page.render(open_metrics=False)
        await page.render(open_metrics=False)
        (first_began, first_ended), (second_began, _) = turns
        # Both ends are the thread's own: however late the loop is, it only rests for longer.
        assert second_began - first_ended >= first_ended - first_began

    asyncio.run(scene())


def test_a_scrape_that_fails_fails_alone():
    # The first one is asked for where the application is made, the others by a scrape each.
    facts = iter([None, OSError("no /proc here"), ProcessFacts(1.0, 2, 3.0), ProcessFacts(1.0, "?", 3.0), None])

    def process():
        fact = next(facts) or ProcessFacts(1.0, 2, 3.0)
        if isinstance(fact, Exception):
            raise fact
        return fact

    app = app_of(Core(watchlist((sparse("f"),))), 1.0, process=process)
    client = TestClient(app, raise_server_exceptions=False)
    assert [client.get("/metrics").status_code for _ in range(4)] == [503, 200, 500, 200]


@pytest.mark.e2e
def test_scrapers_that_do_not_read_hold_nobody_up(tmp_path):
    """More of them than pages are made at once; each page is larger than what a socket takes unread."""
    with collector(tmp_path, tuple(sparse(f"f{i}") for i in range(512))) as made:
        host, port = made.http_url.removeprefix("http://").split(":")
        idle = [socket.socket() for _ in range(10)]
        for each in idle:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.connect((host, int(port)))
            each.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with urllib.request.urlopen(f"{made.http_url}/healthz", timeout=10) as answer:
            assert answer.status == 200
        for each in idle:
            each.settimeout(20)
            assert each.recv(12).startswith(b"HTTP/1.1 ")
        with urllib.request.urlopen(f"{made.http_url}/metrics", timeout=10) as answer:
            assert answer.read().endswith(b"\n")
        for each in idle:
            each.close()
