"""The collector's throughput, latency and memory: `make bench-collector` writes results/collector.json.

A real collector process with `--state`, fed over its Unix socket by the real sender with decode steps of 256 requests.
Throughput is tokens merged per second of processor time that the collector used, read from its own /metrics, so that a
machine with other work on it measures the same. Latency is from a step's hand-over to the first scrape that shows it,
at half of that throughput (or of what the feeding process manages), with a scraper that asks all the time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch import __version__
from latentwatch.collector.core import Core
from latentwatch.collector.durability.journal import DurableSink
from latentwatch.collector.metrics_families import Families
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.export.prometheus import render
from latentwatch.names import Outcome, Phase, TokenState
from latentwatch.step.batch import FIRE_DTYPE, SEGMENT_DTYPE, RequestClosed, RequestOpened, StepBatch
from latentwatch.transport import codec
from latentwatch.transport.sender import Sender
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.file import Limit

from tests.support.engines import ROOT
from tests.support.streams import hello, sparse, watchlist

RESULT = ROOT / "tests/bench/results/collector.json"
FEATURES = (64, 256, 1024)
FIRING_RATE = 0.01
REQUESTS = 256
LIFE_STEPS = 256
"""Output tokens of each request; all of a wave begin and end together, which is the worst for latency."""


def features_of(count: int) -> list[watchlist_file.Feature]:
    """Sparse features; one in 16 has a limit, which ordinary traffic exceeds now and then."""
    return [sparse(f"f{i}", limit=Limit("max", 6.0) if i % 16 == 0 else None) for i in range(count)]


class Load:
    """Decode steps of REQUESTS requests, without end."""

    def __init__(self, features: int, seed: int = 0, life_steps: int = LIFE_STEPS) -> None:
        self._life_steps = life_steps
        rng = np.random.default_rng(seed)
        self._step = 0
        self._fires = []
        for _ in range(32):
            row, feature = np.nonzero(rng.random((REQUESTS, features)) < FIRING_RATE)
            fires = np.empty(len(row), FIRE_DTYPE)
            fires["row"], fires["feature"], fires["act"] = row, feature, rng.exponential(1.0, len(row)) + 0.01
            self._fires.append(fires)
        self._dense = np.empty((REQUESTS, 0), np.float16)
        self._norm = rng.uniform(1, 50, (REQUESTS, 1)).astype(np.float32)

    def next(self) -> StepBatch:
        wave, at = divmod(self._step, self._life_steps)
        self._step += 1
        handles = wave * REQUESTS + np.arange(1, REQUESTS + 1)
        segments = np.empty(REQUESTS, SEGMENT_DTYPE)
        segments["handle"], segments["start"], segments["count"] = handles, at, 1
        segments["state"], segments["reason"], segments["phase"] = TokenState.SCORED, 0, Phase.OUTPUT
        names = [(int(h), f"chatcmpl-{h:024d}-0123abcd") for h in handles] if at in (0, self._life_steps - 1) else []
        end = at == self._life_steps - 1
        return StepBatch(
            step=self._step,
            time_unix_nano=time.time_ns(),
            segments_S=segments,
            fires_N=self._fires[self._step % len(self._fires)],
            dense_RP=self._dense,
            norm_RH=self._norm,
            opened=tuple(RequestOpened(h, name, 0) for h, name in names) if at == 0 else (),
            closed=tuple(
                RequestClosed(h, n, 0, self._life_steps + 1, self._life_steps, Outcome.FINISHED) for h, n in names
            )
            if end
            else (),
        )


class Collector:
    """A collector process, and what its /metrics say."""

    def __init__(self, folder: Path, features: int, name: str = "c", more: Sequence[str] = ()) -> None:
        """Args: more: of its command line."""
        self.sha256 = watchlist_file.write(watchlist(features_of(features)), folder / "w.safetensors").sha256
        self.target = f"unix://{folder}/{name}.sock"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "latentwatch", "collector", "--watchlist", str(folder / "w.safetensors")),
                *("--listen", self.target, "--http", "127.0.0.1:0", "--state", str(folder / f"{name}-state")),
                *more,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._url = next(line.split()[1] for line in self._process.stdout if line.startswith("  metrics "))

    def read(self) -> dict[str, float]:
        with urllib.request.urlopen(self._url, timeout=60) as response:
            lines = response.read().decode().splitlines()
        totals: dict[str, float] = {}
        for line in lines:
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def throughput(collector: Collector, sender: Sender, load: Load, seconds: float) -> tuple[float, float, float]:
    """Tokens per second of the collector's processor time, tokens per second of the clock, and the sender's cost on
    the caller's thread, seconds per step."""
    before, began = collector.read(), time.monotonic()
    offering, steps = 0.0, 0
    while time.monotonic() - began < seconds:
        batch = load.next()
        start = time.thread_time()
        sender.offer(batch)
        offering += time.thread_time() - start
        steps += 1
        while sender.stats().buffered_bytes > 8 << 20:
            time.sleep(0.001)
    while sender.stats().buffered_batches:
        time.sleep(0.001)
    took = time.monotonic() - began
    after = collector.read()
    # Before the first hello there is no engine, and no series of one.
    tokens = after["latentwatch_tokens_total"] - before.get("latentwatch_tokens_total", 0)
    assert tokens == steps * REQUESTS
    cpu = after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]
    return tokens / cpu, tokens / took, offering / steps


def latency(
    collector: Collector, sender: Sender, load: Load, rate: float, seconds: float
) -> tuple[float, float, float]:
    """p50 and p99 from a step's hand-over to the first scrape that shows it, and the tokens per second offered."""
    base = collector.read()["latentwatch_tokens_total"]
    offered: list[float] = []
    scrapes: list[tuple[float, float]] = []
    stop = threading.Event()

    def scrape() -> None:
        while not stop.is_set():
            tokens = collector.read()["latentwatch_tokens_total"]
            scrapes.append((time.monotonic(), tokens - base))

    scraper = threading.Thread(target=scrape)
    scraper.start()
    began = time.monotonic()
    while (now := time.monotonic()) - began < seconds:
        if len(offered) * REQUESTS < rate * (now - began):
            sender.offer(load.next())
            offered.append(now)
        else:
            time.sleep(0.0005)
    took = time.monotonic() - began
    while not scrapes or scrapes[-1][1] < len(offered) * REQUESTS:
        time.sleep(0.01)
    stop.set()
    scraper.join()
    shown = np.array([tokens for _, tokens in scrapes])
    when = np.array([time for time, _ in scrapes])
    first = np.searchsorted(shown, (np.arange(len(offered)) + 1) * REQUESTS)
    p50, p99 = np.percentile(when[first] - np.array(offered), [50, 99])
    return float(p50), float(p99), len(offered) * REQUESTS / took


def exposition_seconds(features: int) -> float:
    """Median processor time of one /metrics page of one model after traffic."""
    core = Core(watchlist(features_of(features)))
    who, load = hello(), Load(features)
    core.ingest.hello(who, 1000.0)
    for sequence in range(1, 2 * LIFE_STEPS):
        core.ingest.observe(who, ReceivedBatch(sequence, load.next(), b""), 1000.0)
    families = Families(core.watchlist)
    times = []
    for _ in range(21):
        began = time.process_time()
        render(families.of(core.lookup.snapshot(1000.0), ProcessFacts(0.0, 0, 0.0)), open_metrics=False)
        times.append(time.process_time() - began)
    return float(np.median(times))


def measure(features: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lw") as name:
        collector = Collector(Path(name), features)
        sender = Sender(collector.target, hello(watchlist_sha256=collector.sha256))
        sender.start()
        load = Load(features)
        throughput(collector, sender, load, 1.0)
        per_core, per_second, offer = throughput(collector, sender, load, seconds)
        rate = min(per_core, per_second) / 2
        p50, p99, offered = latency(collector, sender, load, rate, seconds)
        resident = collector.read()["process_resident_memory_bytes"]
        sender.close()
        collector.stop()
    return {
        "features": features,
        "firing_rate": FIRING_RATE,
        "tokens_per_second_per_core": round(per_core),
        "cpu_seconds_per_million_tokens": round(1e6 / per_core, 3),
        "p50_step_to_metrics_seconds": round(p50, 4),
        "p99_step_to_metrics_seconds": round(p99, 4),
        "latency_at_tokens_per_second": round(offered),
        "exposition_seconds": round(exposition_seconds(features), 5),
        "resident_mib": round(resident / (1 << 20), 1),
        "sender_offer_microseconds": round(offer * 1e6, 1),
    }


def forwarded(features: int, seconds: float) -> dict[str, Any]:
    """Request rows that a gateway takes per second of processor time, decoding and journal included."""
    with tempfile.TemporaryDirectory(prefix="lw") as name:
        sidecar = Core(watchlist(features_of(features)), forward_boot_id="f" * 32)
        who, load = hello(), Load(features, life_steps=LIFE_STEPS)
        sidecar.ingest.hello(who, 1000.0)
        forwarder = hello(replica="sidecar", engine="", model_name="", forwards=True)
        gateway = DurableSink(Core(watchlist(features_of(features))), Path(name), 1000.0)
        gateway.hello(forwarder, 1000.0)
        rows, sequence, size, used = 0, 0, 0, 0.0
        while used < seconds:
            for _ in range(LIFE_STEPS):
                sequence += 1
                sidecar.ingest.observe(who, ReceivedBatch(sequence, load.next(), b""), 1000.0 + sequence)
            sidecar.ingest.tick(1000.0 + sequence)
            assert sidecar.outbox is not None
            for number, report in list(sidecar.outbox.reports):
                message = codec.encode_report(number, report)
                began = time.process_time()
                decoded = codec.decode_request(message)
                assert isinstance(decoded, ReceivedReport)
                gateway.merge(forwarder, decoded, 1000.0 + sequence)
                gateway.commit()
                used += time.process_time() - began
                rows, size = rows + len(report.requests), size + len(message)
                sidecar.ingest.acknowledged(number)
        gateway.close(1000.0 + sequence)
    return {"features": features, "requests_per_second_per_core": round(rows / used), "bytes_per_request": size // rows}


def fill(replicas: int, features: int) -> None:
    """Child process: a collector's state with everything that it may hold in use; prints its resident MiB."""
    core = Core(watchlist(features_of(features)))
    loads = [(hello(replica=f"pod-{i}/0", engine=str(i)), Load(features, i, life_steps=4)) for i in range(replicas)]
    for who, _ in loads:
        core.ingest.hello(who, 1000.0)
    bounds = core.bounds
    waves = -(-(bounds.closed_requests + bounds.flagged_requests) // bounds.open_requests)
    for sequence in range(1, 4 * waves + 3):
        for who, load in loads:
            core.ingest.observe(who, ReceivedBatch(sequence, load.next(), b""), 1000.0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    opened = sum(engine.open_requests for engine in core.lookup.snapshot(1000.0).engines)
    mib = pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    print(json.dumps({"replicas": replicas, "features": features, "open_requests": opened, "resident_mib": round(mib)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement (default: 10)")
    parser.add_argument("--fill", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fill:
        fill(*args.fill)
        return
    rows = []
    for features in FEATURES:
        rows.append(measure(features, args.seconds))
        print(rows[-1], flush=True)
    memory = json.loads(
        subprocess.run(
            [sys.executable, "-m", "tests.bench.collector", "--fill", "64", "1024"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
    )
    print(memory)
    gateway = [forwarded(features, args.seconds / 2) for features in FEATURES]
    print(gateway)
    write(rows, memory, gateway)
    print(f"wrote {RESULT.relative_to(ROOT)}")


def write(rows: list[dict[str, Any]], memory: dict[str, Any], gateway: list[dict[str, Any]]) -> None:
    result = {
        "what": "one collector process: throughput per core, step to /metrics, exposition, memory",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores shared with other work",
        "versions": {"latentwatch": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "load": f"{REQUESTS} requests a step, one token each, {LIFE_STEPS} steps long",
        "load_average": os.getloadavg(),
        "rows": rows,
        "memory": memory,
        "gateway": gateway,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
