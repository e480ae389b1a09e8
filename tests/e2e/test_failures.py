"""What dies, dies alone (I4): the real attachment, exporter process and collector process around a stand-in worker.

The worker's steps are made up, so that hundreds pass in a second; everything behind them is what runs in production.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from latentwatch.engines.vllm.attach import Attachment
from latentwatch.engines.vllm.settings import PluginSettings
from prometheus_client.parser import text_string_to_metric_families

from tests.support import tiny
from tests.support.engines import ROOT
from tests.support.fake_model import Worker, lone_forward, scheduled

pytestmark = pytest.mark.e2e

PROMPT = 5


class Collector:
    """A collector process that can be killed and started again at the same addresses."""

    def __init__(self, folder: Path, watchlist: Path) -> None:
        self.target = f"unix://{folder}/c.sock"
        self._watchlist = watchlist
        self._log = folder / "collector.log"
        self.url = ""
        self.start()

    def start(self) -> None:
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "latentwatch", "collector", "--watchlist", str(self._watchlist)),
                    *("--listen", self.target, "--http", "127.0.0.1:0"),
                ],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until(lambda: "metrics" in self._log.read_text(), "the collector to start")
        self.url = next(line.split()[1] for line in self._log.read_text().splitlines() if "metrics " in line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def sum(self, name: str, **labels: str) -> float:
        """The samples of a metric with these labels, added up."""
        with urllib.request.urlopen(self.url) as response:
            families = text_string_to_metric_families(response.read().decode())
        samples = (sample for family in families for sample in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


class Engine:
    """A worker with the monitor attached, and a request that decodes one token a step."""

    def __init__(self, watchlist: Path, target: str) -> None:
        self.worker: Any = Worker()
        self.attachment = Attachment(
            self.worker, PluginSettings(str(watchlist), target, "fake", disabled=False), lone_forward
        )
        self.worker.load_model()
        self.worker.compile_or_warm_up_model()
        self._requests = 0

    def request(self, output_tokens: int, during: Callable[[int], None] = lambda step: None) -> None:
        """One request from its prompt to its end. `during` is called before each step of its decoding."""
        self._requests += 1
        name = f"r{self._requests}"
        self.step(scheduled({name: PROMPT}, starts={name: 0}, new=[(name, PROMPT)]))
        for step in range(output_tokens - 1):
            during(step)
            self.step(scheduled({name: 1}, starts={name: PROMPT + step}))
        self.step(scheduled({}, finished={name: (output_tokens, False)}))

    def step(self, output: Any) -> None:
        assert self.worker.execute_model(output) == "the engine's own result"

    @property
    def exporter(self) -> Any:
        return self.attachment._exporter.process


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lw") as name:
        yield Path(name)


@pytest.fixture
def watchlist(folder: Path) -> Path:
    path = folder / "w.safetensors"
    tiny.watchlist(path)
    return path


@pytest.fixture
def collector(folder: Path, watchlist: Path) -> Iterator[Collector]:
    running = Collector(folder, watchlist)
    yield running
    running.kill()


@pytest.fixture
def engine(watchlist: Path, collector: Collector) -> Iterator[Engine]:
    running = Engine(watchlist, collector.target)
    yield running
    running.worker.shutdown()
    running.exporter.wait(15)


def closed(collector: Collector) -> float:
    return collector.sum("latentwatch_requests_total")


def test_a_collector_that_dies_midway_costs_no_step_and_no_later_token(engine: Engine, collector: Collector):
    """Killed in the middle of a request and back later: what no collector had acknowledged arrives at the new one."""
    engine.request(20)
    until(lambda: closed(collector) == 1, "the first request")
    assert collector.sum("latentwatch_tokens_total", state="scored") == PROMPT + 19

    def kill_once(step: int) -> None:
        if step == 10:
            until(
                lambda: collector.sum("latentwatch_tokens_total", state="scored") >= PROMPT * 2 + 19,
                "the second request",
            )
            collector.kill()

    engine.request(20, during=kill_once)
    engine.request(20)
    collector.start()
    until(lambda: closed(collector) == 2, "the requests that closed while the collector was away")
    scored, dropped = (collector.sum("latentwatch_tokens_total", state=state) for state in ("scored", "dropped"))
    assert dropped == 0
    # All of the third request, and of the second what the first collector had not acknowledged.
    assert PROMPT + 19 < scored <= 2 * (PROMPT + 19)
    engine.request(20)
    until(lambda: closed(collector) == 3, "a request after its return")
    assert collector.sum("latentwatch_engine_reconnects_total") == 1


def test_an_exporter_that_is_killed_is_started_again_and_its_loss_is_counted(engine: Engine, collector: Collector):
    engine.request(20)
    until(lambda: closed(collector) == 1, "the first request")
    first = engine.exporter.pid

    def kill_once(step: int) -> None:
        if step == 10:
            time.sleep(0.5)  # it has taken what was handed over, and holds the last step until the next one arrives
            os.kill(first, signal.SIGKILL)
            engine.exporter.wait()
            time.sleep(1.1)  # the attachment looks after its exporter once a second

    engine.request(40, during=kill_once)
    assert engine.exporter.pid != first
    until(lambda: closed(collector) == 2, "the request that it died in")
    tokens = {s: collector.sum("latentwatch_tokens_total", state=s) for s in ("scored", "unseen", "dropped")}
    assert sum(tokens.values()) == 2 * PROMPT + 19 + 39
    assert tokens["dropped"] == 0
    assert collector.sum("latentwatch_engine_exporter_restarts_total") == 1


def test_an_engine_with_another_watchlist_is_refused_and_the_refusal_is_counted(folder: Path, collector: Collector):
    other = folder / "other.safetensors"
    tiny.watchlist(other, seed=1)
    engine = Engine(other, collector.target)
    engine.request(5)
    until(lambda: collector.sum("latentwatch_streams_refused_total", reason="watchlist_mismatch") >= 1, "the refusal")
    assert collector.sum("latentwatch_tokens_total") == 0
    engine.worker.shutdown()
    engine.exporter.wait(15)


def test_a_monitor_that_keeps_failing_takes_itself_off_and_the_engine_never_notices(engine: Engine, caplog: Any):
    def broken(*_: Any) -> None:
        raise RuntimeError("a vLLM that this version does not know")

    engine.attachment._tap.after_step = broken
    engine.request(10)
    assert engine.attachment._tap is None
    assert "takes itself off" in caplog.text
    engine.exporter.wait(15)


def test_an_exporter_whose_engine_never_gets_to_serve_ends_by_itself(watchlist: Path, collector: Collector):
    worker: Any = Worker()
    attachment = Attachment(
        worker, PluginSettings(str(watchlist), collector.target, "fake", disabled=False), lone_forward
    )
    worker.load_model()
    exporter = attachment._exporter.process
    assert exporter.poll() is None
    exporter.stdin.close()  # what the system does for an engine that dies
    assert exporter.wait(15) == 0


def test_an_exporter_outlives_its_engine_just_long_enough_to_deliver(watchlist: Path, collector: Collector):
    """The engine is killed outright: what lies in the ring still arrives, then the exporter ends by itself."""
    code = (
        "import sys, os, signal; from pathlib import Path; from tests.e2e.test_failures import Engine; "
        "e = Engine(Path(sys.argv[1]), sys.argv[2]); e.request(200); print(e.exporter.pid, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(watchlist), collector.target], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    exporter = int(child.stdout.readline())
    assert child.wait(60) == -signal.SIGKILL
    until(lambda: closed(collector) == 1, "what lay in the ring")
    assert collector.sum("latentwatch_tokens_total", state="scored") == PROMPT + 199
    until(lambda: not Path(f"/proc/{exporter}").exists(), "the exporter to end")


def serve_once(watchlist: Path, target: str) -> None:
    """A worker's whole life, with one request."""
    engine = Engine(watchlist, target)
    engine.request(20)
    engine.worker.shutdown()
    engine.exporter.wait(15)


FROM_THREADS = """
import multiprocessing, os, sys
from pathlib import Path
from latentwatch.transport.sender import Sender
from tests.e2e.test_failures import serve_once
from tests.support.wire import hello

watchlist, target, method = sys.argv[1:]
sender = Sender(target, hello())
sender.start()
sender._lock.acquire()
worker = multiprocessing.get_context(method).Process(target=serve_once, args=(Path(watchlist), target))
worker.start()
worker.join(90)
os._exit(worker.exitcode)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_may_be_forked_or_spawned_by_a_process_with_threads(
    method: str, watchlist: Path, collector: Collector
):
    """vLLM does either; the process that it comes from holds gRPC's threads here, and a lock of ours."""
    arguments = [sys.executable, "-c", FROM_THREADS, str(watchlist), collector.target, method]
    subprocess.run(arguments, cwd=ROOT, check=True, timeout=120)
    until(lambda: closed(collector) == 1, "its request")
    assert collector.sum("latentwatch_tokens_total", state="scored") == PROMPT + 19
