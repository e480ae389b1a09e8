"""The operator's night on a real Prometheus and Alertmanager: `make bench-night` writes results/night.json.

Each row is something that happens at night, with a model, a scrape job and collectors of its own, so that all of them
run at once and each notification is of one row. What is counted is what a webhook gets: notifications, not alerts.

Collectors are processes that real senders stream to, but for two that run here: drift needs hours of traffic, which
this one is given in minutes, by its own detectors; and a KV connector, whose tokens no CPU engine has. The rules are
the shipped ones FACTOR times as fast (`faster`), Alertmanager's sample configuration likewise; Prometheus scrapes and
evaluates every second, which is every 4 seconds of the night.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from latentwatch import __version__
from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.demo.run.commands import demo_alertmanager
from latentwatch.demo.run.processes import free_ports
from latentwatch.demo.run.webhook import Page, Webhook
from latentwatch.names import Outcome, Phase, Reason, Severity, TokenState
from latentwatch.step.batch import SEGMENT_DTYPE, RequestClosed, RequestOpened, StepBatch
from latentwatch.transport.channel import Backoff
from latentwatch.transport.sender import Sender
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.file import Limit

from tests.chaos.world import Collector
from tests.support.drift import random_baseline
from tests.support.engines import ROOT
from tests.support.programs import program
from tests.support.stack import alertmanager, prometheus
from tests.support.streams import Piece, Tokens, hello, received, sparse, step_batch, watchlist
from tests.support.wire import in_loop

RESULT = Path(__file__).parent / "results" / "night.json"
FACTOR = 4
"""A second here is so many of the night."""
SPEED = {"interval": "1s", "resend_delay": f"{60 / FACTOR:.0f}s"}
REQUESTS = 24
CRITICAL, WARNING = 3, 5
"""Features that each bad request drives over their limits."""
LIMITED = (
    *(sparse(f"c{i}", limit=Limit("max", 1.0), severity=Severity.CRITICAL) for i in range(CRITICAL)),
    *(sparse(f"w{i}", limit=Limit("max", 1.0), severity=Severity.WARNING) for i in range(WARNING)),
)
UNLIMITED = tuple(sparse(f"d{i}", severity=Severity.CRITICAL if i < CRITICAL else Severity.WARNING) for i in range(9))
KILLS: Mapping[str, float] = {
    "before it fires, and the requests arrive when it is back": -20,
    "as the requests arrive": 2,
    "while it fires": 120,
    "5 minutes after the last request": 300,
    "while it is held": 720,
    "as it ends": 1190,
    "after it has ended": 1380,
}
"""When a collector is killed, in seconds of the night since the first bad request."""
AWAY_SECONDS = 30.0
LONGEST_SECONDS = 1700.0
"""Of the night, until every alert that is going to end has ended."""


@dataclass(frozen=True)
class Row:
    """One thing that happens, and what an operator should get of it."""

    line: str
    name: str
    pages: int
    """-1: one notification, a page or a ticket, as the change is."""
    most_tickets: int
    happens: Callable[[], None]
    targets: Sequence[str] = ()
    """host:port of its collectors."""

    @property
    def goal(self) -> str:
        if self.pages < 0:
            return "1 notification"
        tickets = f"at most {self.most_tickets} ticket" if self.most_tickets else "no ticket"
        return f"{self.pages or 'no'} page, {tickets}"

    def is_met(self, pages: int, tickets: int) -> bool:
        """Whether so many are what an operator should get."""
        return pages + tickets == 1 if self.pages < 0 else pages == self.pages and tickets <= self.most_tickets

    def has(self, page: Page) -> bool:
        """Whether an alert is of this row."""
        labels = page.labels
        return self.name in (
            labels.get("model_name"),
            labels.get("job", "").removeprefix("latentwatch-"),
        ) or labels.get("replica", "").startswith(f"{self.name}/")


def night(seconds: float) -> float:
    """Seconds of the night, as seconds here."""
    return seconds / FACTOR


@dataclass
class Fleet:
    """A collector process and the engine that streams to it."""

    folder: Path
    name: str
    watched: Path
    sha256: str
    port: int = field(default_factory=lambda: free_ports(1)[0])

    def __post_init__(self) -> None:
        # Its own folder: each has a socket and a state.
        self.folder.mkdir()
        self.collector = Collector(self.folder, self.watched, more=("--http", f"127.0.0.1:{self.port}"))
        self.collector.start()
        self._handles = itertools.count(1)
        self._one_at_a_time = threading.Lock()
        self._ended = threading.Event()
        self.engine = self.streams(self.sha256)
        threading.Thread(target=self._lives, daemon=True, name=f"{self.name}-heartbeat").start()

    def _lives(self) -> None:
        """What an idle engine's exporter does: a sign of life every few seconds, whoever listens."""
        while not self._ended.wait(2.0):
            self._offer(step_batch([], LIMITED, step=next(self._handles), time_unix_nano=time.time_ns()))

    def _offer(self, batch: StepBatch) -> None:
        with self._one_at_a_time:
            self.engine.offer(batch)

    def streams(self, sha256: str, boot: int = 1) -> Sender:
        """An engine's sender, started."""
        who = hello(replica=f"{self.name}/0", model_name=self.name, boot_id=f"{boot:032d}", watchlist_sha256=sha256)
        made = Sender(f"unix://{self.collector.socket}", who, backoff=Backoff(0.2, 0.5, refused_seconds=0.25))
        made.start()
        return made

    def bad_request(self) -> None:
        """One that drives every feature over its limit, in one step."""
        handle = next(self._handles)
        act = np.full((4, len(LIMITED)), 5.0, np.float32)
        request = Tokens(handle, 2, act, np.ones(4, int), np.ones((4, 1), np.float32))
        self._offer(
            step_batch(
                [Piece(request, 0, 4)],
                LIMITED,
                step=handle,
                time_unix_nano=time.time_ns(),
                opened=[request.opened()],
                closed=[request.closed()],
            )
        )

    def incident(self) -> None:
        """24 bad requests within a minute."""
        for _ in range(REQUESTS):
            self.bad_request()
            time.sleep(night(60) / REQUESTS)

    def incident_with_a_kill(self, at: float) -> None:
        """The same, with the collector killed at a time of the alert's life and back half a minute later."""
        if at < 0:
            self.kill()
            threading.Timer(night(AWAY_SECONDS), self.collector.start).start()
            time.sleep(night(-at))
            self.incident()
            return
        killer = threading.Timer(night(at), self.killed)
        killer.start()
        self.incident()
        killer.join()

    def kill(self) -> None:
        self.collector.kill()

    def killed(self) -> None:
        self.kill()
        time.sleep(night(AWAY_SECONDS))
        self.collector.start()

    def rollout(self) -> None:
        """The engine is the newer one for a minute, and the collector refuses it."""
        with self._one_at_a_time:
            self.engine.close()
            self.engine = self.streams("c" * 64, boot=2)
        time.sleep(night(60))
        with self._one_at_a_time:
            self.engine.close()
            self.engine = self.streams(self.sha256, boot=3)

    def end(self) -> None:
        self._ended.set()
        self.engine.close()
        self.collector.kill()


class TrafficThatChanges:
    """A collector here, with windows of a minute of traffic that come as fast as they are made."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        watched = watchlist_file.write(watchlist(UNLIMITED), folder / "w.safetensors")
        baseline = random_baseline(UNLIMITED, sha256=watched.sha256, requests=20_000)
        self.service = Service(
            CollectorSettings(
                folder / "w.safetensors", (f"unix://{folder}/c.sock",), "127.0.0.1:0", drift=DriftSettings(baseline)
            )
        )
        in_loop(self.service.start())
        self._who = hello(replica=f"{name}/0", model_name=name, watchlist_sha256=watched.sha256)
        self._now = time.time()
        self._rng = np.random.default_rng(0)
        self._handles = itertools.count(1)
        self._sequences = itertools.count(1)
        in_loop(self._window(0.05, hello_first=True))

    async def _window(self, share: float, *, hello_first: bool = False) -> None:
        core, F = self.service.core, len(UNLIMITED)
        if hello_first:
            core.ingest.hello(self._who, self._now)
        active = self._rng.random((50, F)) < share
        values = np.where(active, np.exp(self._rng.normal(0, 0.5, active.shape)), 0).astype(np.float32)
        one = np.ones(1, int)
        requests = [
            Tokens(next(self._handles), 1, values[i : i + 1], one, np.ones((1, 1), np.float32)) for i in range(50)
        ]
        batch = step_batch(
            [Piece(request, 0, 1) for request in requests],
            UNLIMITED,
            time_unix_nano=int(self._now * 1e9),
            opened=[request.opened() for request in requests],
            closed=[request.closed() for request in requests],
        )
        core.ingest.observe(self._who, received(next(self._sequences), batch), self._now)
        self._now += 60
        core.drift.tick(self._now)

    def changes(self) -> None:
        """Ten windows as in the baseline; then every feature is active in five times as many requests, for an hour."""
        for share in (*[0.05] * 10, *[0.25] * 60):
            in_loop(self._window(share))
            time.sleep(night(20))

    def end(self) -> None:
        in_loop(self.service.stop())


class KvConnector:
    """A collector here, of an engine that takes 4 of 5 tokens out of a shared KV cache."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        watched = watchlist_file.write(watchlist(UNLIMITED), folder / "w.safetensors")
        self.service = Service(CollectorSettings(folder / "w.safetensors", (f"unix://{folder}/c.sock",), "127.0.0.1:0"))
        in_loop(self.service.start())
        self._who = hello(replica=f"{name}/0", model_name=name, watchlist_sha256=watched.sha256)
        self._numbers = itertools.count(1)
        in_loop(self._greet())

    async def _greet(self) -> None:
        self.service.core.ingest.hello(self._who, time.time())

    async def _request(self) -> None:
        number = next(self._numbers)
        cached, scored = 800, 200
        segments = [
            (number, 0, cached, TokenState.UNSEEN, Reason.KV_CONNECTOR, Phase.PROMPT),
            (number, cached, scored, TokenState.SCORED, Reason.NONE, Phase.PROMPT),
        ]
        total = cached + scored
        batch = StepBatch(
            step=number,
            time_unix_nano=time.time_ns(),
            segments_S=np.array(segments, SEGMENT_DTYPE),
            dense_RP=np.empty((scored, 0), np.float16),
            norm_RH=np.ones((scored, 1), np.float32),
            opened=(RequestOpened(number, f"chatcmpl-{number}-0123abcd", total),),
            closed=(RequestClosed(number, f"chatcmpl-{number}-0123abcd", total, 1, total, Outcome.FINISHED),),
        )
        self.service.core.ingest.observe(self._who, received(number, batch), time.time())

    def serves(self) -> None:
        """As long as the night is."""
        end = time.monotonic() + night(LONGEST_SECONDS)
        while time.monotonic() < end:
            in_loop(self._request())
            time.sleep(night(5))

    def end(self) -> None:
        in_loop(self.service.stop())


@contextlib.contextmanager
def rows(folder: Path) -> Iterator[list[Row]]:
    """Everything that happens tonight, its collectors up."""
    watched = folder / "w.safetensors"
    sha256 = watchlist_file.write(watchlist(LIMITED), watched).sha256
    with contextlib.ExitStack() as stack:

        def fleet(name: str) -> Fleet:
            made = Fleet(folder / name, name, watched, sha256)
            stack.callback(made.end)
            return made

        incident, rollout = fleet("incident"), fleet("rollout")
        traffic, kv = TrafficThatChanges(folder / "traffic", "traffic"), KvConnector(folder / "kv", "kv")
        stack.callback(traffic.end)
        stack.callback(kv.end)

        def here(service: Service) -> list[str]:
            return [service.http_url.removeprefix("http://")]

        def at(one: Fleet) -> list[str]:
            return [f"127.0.0.1:{one.port}"]

        made = [
            Row("a rollout with 60 s of mismatch", "rollout", 0, 0, rollout.rollout, at(rollout)),
            Row(f"one incident of {REQUESTS} requests", "incident", 1, 1, incident.incident, at(incident)),
            Row("one traffic change that 9 features show", "traffic", -1, 0, traffic.changes, here(traffic.service)),
            Row("a KV-connector deployment, 80 % of tokens unseen by design", "kv", 0, 0, kv.serves, here(kv.service)),
        ]
        for number, (when, seconds) in enumerate(KILLS.items()):
            one = fleet(f"kill-{number}")

            def happens(one: Fleet = one, seconds: float = seconds) -> None:
                one.incident_with_a_kill(seconds)

            made.append(Row(f"the collector killed {when}", one.name, 1, 1, happens, at(one)))
        yield made


def scaled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Alertmanager's configuration with its own waits, FACTOR times as fast, and what a webhook is told at the end."""
    sample = yaml.safe_load((ROOT / "dashboards" / "alertmanager.yml").read_text())
    made: dict[str, Any] = json.loads(json.dumps(config))
    for fast, slow in zip(
        (made["route"], *made["route"]["routes"]), (sample["route"], *sample["route"]["routes"]), strict=True
    ):
        for wait in ("group_wait", "group_interval", "repeat_interval"):
            if wait in slow:
                fast[wait] = f"{max(1, round(_seconds(slow[wait]) * 1000 / FACTOR))}ms"
            else:
                fast.pop(wait, None)
    for receiver in made["receivers"]:
        receiver["webhook_configs"][0]["send_resolved"] = True
    return made


def _seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([smhd])", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]


def notifications(pages: Sequence[Page], row: Row, receiver: str) -> int:
    """How many times a receiver was told that something of this row fires."""
    told: dict[float, list[Page]] = {}
    for page in pages:
        if page.receiver == receiver and row.has(page):
            told.setdefault(page.at, []).append(page)
    return sum(any(page.status == "firing" for page in one) for one in told.values())


def run(folder: Path) -> tuple[list[dict[str, Any]], list[Page]]:
    """The night, and everything that the webhook was told."""
    sample = yaml.safe_load((ROOT / "dashboards" / "alertmanager.yml").read_text())
    with Webhook() as webhook, rows(folder) as happening, contextlib.ExitStack() as stack:
        url = stack.enter_context(alertmanager(folder, scaled(demo_alertmanager(sample, webhook.port))))
        jobs = {f"latentwatch-{row.name}": row.targets for row in happening}
        stack.enter_context(prometheus(folder, jobs, factor=FACTOR, alertmanager_url=url, **SPEED))
        # Until each has been scraped for a while: what is counted later is an event.
        time.sleep(night(150))
        threads = [threading.Thread(target=row.happens, name=row.name) for row in happening]
        for thread in threads:
            thread.start()
        time.sleep(night(LONGEST_SECONDS))
        for thread in threads:
            thread.join()
        pages = webhook.pages()
    found = []
    for row in happening:
        paged, tickets = notifications(pages, row, "pager"), notifications(pages, row, "tickets")
        ok = row.is_met(paged, tickets)
        found.append({"line": row.line, "pages": paged, "tickets": tickets, "goal": row.goal, "ok": ok})
    return found, pages


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--told", type=Path, help="also write every alert of every notification there, as JSON lines")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="lw") as folder:
        found, pages = run(Path(folder))
    if args.told:
        args.told.write_text("".join(json.dumps(vars(page)) + "\n" for page in pages))
    for row in found:
        print(f"{row['line']:64} {row['pages']} pages, {row['tickets']} tickets ({row['goal']}): {row['ok']}")
    versions = {name: _version(name) for name in ("prometheus", "prometheus-alertmanager")}
    result = {
        "what": "notifications of a night's events, on a real Prometheus and Alertmanager with the shipped rules",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"latentwatch": __version__, "python": platform.python_version(), **versions},
        "times_as_fast": FACTOR,
        "rows": found,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["ok"] for row in found) else 1


def _version(name: str) -> str:
    said = subprocess.run([program(name), "--version"], capture_output=True, text=True, check=True)
    return (said.stdout + said.stderr).split("version ")[1].split()[0]


if __name__ == "__main__":
    sys.exit(main())
