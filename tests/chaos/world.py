"""Real processes to break (engines with their exporters, collectors, a proxy between them), and the reconciliation."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch.cli import main
from latentwatch.watchlist import file as watchlist_file
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos import stand_in
from tests.support.engines import ROOT
from tests.support.streams import probe, sparse, watchlist

_STEPS_FOR_A_RATIO = 50
CATCH_UP_SECONDS = 60.0
"""Where nothing arrived for so long, nothing will. On a busy machine thousands of steps may wait after a fault; on a
free one they arrive within a second."""
FEATURES = (*(sparse(f"f{i}") for i in range(stand_in.SPARSE)), *(probe(f"p{i}") for i in range(stand_in.DENSE)))


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


# Each collector is forked from one process that has imported all of it: a start costs milliseconds of processor time
# instead of seconds, so that a hundred of them fit into minutes and kills meet a collector at work.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["latentwatch.cli", "latentwatch.collector.service"])


def serve(arguments: list[str], log: str, clock: str) -> None:
    """A collector process's whole life. `clock`: a file with the seconds that its wall clock is set off by, or none."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if clock:
        true_time = time.time
        # Setting the machine's own clock would break everything else that runs on it.
        time.time = lambda: true_time() + float(Path(clock).read_text())
    sys.exit(main(arguments))


class Collector:
    """A collector process that can be killed and started again on the same state."""

    def __init__(self, folder: Path, watched: Path, name: str = "c", clock: str = "", more: Sequence[str] = ()) -> None:
        self.socket = folder / f"{name}.sock"
        self.state = folder / f"{name}-state"
        self._log = folder / f"{name}.log"
        self._clock = clock
        self._more = more
        self._watched = watched
        self.peak_mib = 0.0
        self.process: Any = None

    def start(self, *, wait: bool = True) -> None:
        self._began = self._log.stat().st_size if self._log.exists() else 0
        arguments = ["collector", "--watchlist", str(self._watched), "--listen", f"unix://{self.socket}"]
        arguments += ["--http", "127.0.0.1:0", "--state", str(self.state), *self._more]
        self.process = _FORKS.Process(target=serve, args=(arguments, str(self._log), self._clock))
        self.process.start()
        if wait:
            self.ready()

    def ready(self) -> None:
        until(lambda: "metrics " in self._said() or not self.process.is_alive(), "the collector to start")
        assert self.process.is_alive(), self._said()
        self.url = next(line.split()[1] for line in self._said().splitlines() if line.startswith("  metrics "))

    def kill(self) -> None:
        self._note_memory()
        self.process.kill()
        self.process.join()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        self._note_memory()
        self.process.terminate()
        self.process.join(30)
        assert self.process.exitcode == 0, self._said()

    def totals(self) -> Totals:
        with urllib.request.urlopen(self.url, timeout=20) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        self._note_memory()
        samples = [sample for family in families for sample in family.samples]

        def sum_of(name: str, **labels: str) -> int:
            return int(sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items()))

        tokens = {(s.labels["state"], s.labels["reason"]): 0 for s in samples if s.name == "latentwatch_tokens_total"}
        for s in samples:
            if s.name == "latentwatch_tokens_total":
                tokens[s.labels["state"], s.labels["reason"]] += int(s.value)
        return Totals(
            tokens={key: count for key, count in tokens.items() if count},
            fires=sum_of("latentwatch_feature_fired_tokens_total"),
            finished=sum_of("latentwatch_requests_total", outcome="finished"),
            ended=sum_of("latentwatch_requests_total"),
            open=sum_of("latentwatch_open_requests"),
            unannounced=sum_of("latentwatch_engine_unannounced_requests_total"),
            restarts=sum_of("latentwatch_engine_exporter_restarts_total"),
            excess=sum_of("latentwatch_accounting_excess_tokens_total"),
            given_up=sum_of("latentwatch_engine_lost_tokens_total"),
            gaps=sum_of("latentwatch_collector_lost_sequences_total"),
            duplicates=sum_of("latentwatch_collector_duplicates_total"),
            durable=bool(sum_of("latentwatch_state_durable")),
        )

    def _said(self) -> str:
        return self._log.read_text()[self._began :] if self._log.exists() else ""

    def _note_memory(self) -> None:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            mib = next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
            self.peak_mib = max(self.peak_mib, mib)


@dataclass(frozen=True)
class Totals:
    """What one collector counted."""

    tokens: dict[tuple[str, str], int]
    """By state and reason."""
    fires: int
    finished: int
    ended: int
    """Requests, however they ended."""
    open: int
    unannounced: int
    """Requests of which only the sums of their tokens are told."""
    restarts: int
    excess: int
    given_up: int
    """What the sender says it gave up with the books. A collector may find a part of it missing again, when a request
    ends whose beginning it saw: dropped{lost}."""
    gaps: int
    duplicates: int
    durable: bool

    @property
    def accounted(self) -> int:
        """Every token that is counted somewhere, once."""
        again = self.tokens.get(("dropped", "lost"), 0) if self.given_up else 0
        return sum(self.tokens.values()) - again + self.given_up


class Engine:
    """An engine process."""

    def __init__(self, folder: Path, config: stand_in.Config, settings: dict[str, str]) -> None:
        """Args: settings: environment of the engine and its exporter."""
        self._steps = Path(config.steps_file)
        self._log = folder / "engine.log"
        # One thread for the stand-in's model: a second one would be waited for when other processes have the cores.
        settings = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **settings}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                stand_in.arguments(config),
                cwd=ROOT,
                env=settings,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._read("READY")

    @property
    def exporter(self) -> int | None:
        """Its process; None while there is none."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        # The last one: those before it have ended, and are not waited for yet.
        return int(children[-1]) if children else None

    def until_exporter_reads(self) -> None:
        """Wait until an exporter that is not the one of before has imported everything and takes up the ring."""
        before = self.exporter
        until(lambda: self.exporter not in (before, None) or self._reads(before), "an exporter")
        until(lambda: self._reads(self.exporter), "an exporter that reads")

    @staticmethod
    def _reads(process: int | None) -> bool:
        """Whether it has gRPC's threads, which it starts when it has the ring."""
        try:
            return len(list(Path(f"/proc/{process}/task").iterdir())) > 3
        except OSError:
            return False

    def kill_exporter(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Wherever it is: importing, resuming, or at work."""
        deadline = time.monotonic() + 60
        while (process := self.exporter) is None or _is_dead(process):
            assert time.monotonic() < deadline, "the engine starts no exporter"
            time.sleep(0.001)
        os.kill(process, number)

    def stop(self, collectors: list[Collector], earlier: int = 0) -> dict[str, int]:
        """End its requests and let what waits in its exporter arrive; what it handed over.

        Args: earlier: tokens that engines before it handed over, which are waited for as well.
        """
        handed = self._tell("stop")
        arrived, deadline = (-1, -1), 0.0
        while True:
            totals = [collector.totals() for collector in collectors]
            counted = sum(t.accounted for t in totals), sum(t.ended + t.unannounced for t in totals)
            if counted[0] >= earlier + handed["tokens"] and counted[1] >= handed["ended"]:
                break
            if counted > arrived:
                arrived, deadline = counted, time.monotonic() + CATCH_UP_SECONDS
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        # It ends when it has nothing more to read.
        self._process.communicate(timeout=60)
        return handed

    def die(self, how: str = "die") -> dict[str, int]:
        """Kill it; what it handed over. See engine.py for `how`."""
        handed = self._tell(how)
        self._process.wait(60)
        return handed

    def _tell(self, word: str) -> dict[str, int]:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        handed: dict[str, int] = json.loads(self._read("DONE"))
        return handed

    def steps(self) -> Any:
        return np.load(self._steps)

    def _read(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise AssertionError(f"the engine ended early: {self._log.read_text()}")


def _is_dead(process: int) -> bool:
    """Gone, or not waited for yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


class Proxy:
    """Between exporters and a collector's socket; can cut, or fall silent without closing anything."""

    def __init__(self, upstream: Path) -> None:
        self.upstream = upstream
        self.silent = False
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection."""
        for pair in list(self._pairs):
            for end in pair:
                with contextlib.suppress(OSError):
                    # An RST instead of a FIN, as from a router that forgot the connection.
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(str(self.upstream))
            except OSError:
                near.close()
                continue
            self._pairs.add((near, far))
            threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                for end in select.select([near, far], [], [], 1.0)[0]:
                    while self.silent:
                        # Nothing is read either, so that what was sent waits in the system as on a dead link.
                        time.sleep(0.02)
                    data = end.recv(1 << 16)
                    if not data:
                        raise OSError
                    (far if end is near else near).sendall(data)
        self._pairs.discard((near, far))
        near.close()
        far.close()


@dataclass
class World:
    """One folder of processes, and the moments at which something was broken."""

    folder: Path
    watched: Path
    sha256: str
    collectors: list[Collector] = field(default_factory=list)
    faults: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each fault, on the monotonic clock."""

    def collector(self, name: str = "c", clock: str = "", more: Sequence[str] = ()) -> Collector:
        """Args: more: of its command line."""
        made = Collector(self.folder, self.watched, name, clock, more)
        self.collectors.append(made)
        return made

    def engine(self, target: str, settings: dict[str, str] | None = None, **more: Any) -> Engine:
        steps = self.folder / f"steps-{time.monotonic_ns()}.npy"
        return Engine(self.folder, stand_in.Config(target, self.sha256, str(steps), **more), settings or {})

    @contextlib.contextmanager
    def fault(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.faults.append((began, time.monotonic()))


@contextlib.contextmanager
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="lwchaos"))
    path = folder / "w.safetensors"
    made = World(folder, path, watchlist_file.write(watchlist(FEATURES), path).sha256)
    try:
        yield made
    finally:
        for collector in made.collectors:
            if collector.process is not None and collector.process.is_alive():
                collector.signal(signal.SIGCONT)
                collector.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[tuple[Path, str]]:
    """A folder with little room, and how that is done: a tmpfs, or where none may be mounted a limit on file sizes."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield folder, "tmpfs" if mounted.returncode == 0 else "RLIMIT_FSIZE"
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def filled(disk: Path, process: int) -> Iterator[None]:
    """No room on this disk, or no file of the process may grow."""
    if disk.is_mount():
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        yield
        filler.unlink()
        return
    soft, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (0, hard))
    yield
    resource.prlimit(process, resource.RLIMIT_FSIZE, (soft, hard))


@dataclass(frozen=True)
class Books:
    """What engines handed over against what collectors counted. Tokens throughout."""

    fault: str
    faults: int
    sent: int
    merged: int
    """Scored, inherited or unseen."""
    shed: int
    """Counted as dropped by a reason."""
    lost: int
    """Known only from what was missing when their request ended, beyond what a sender counted as given up."""
    doubled: int
    """Counted more than once."""
    unbooked: int
    """In no state at any collector, nor given up and counted."""
    ended: int
    """Requests that ended at the engines."""
    open: int
    """Of those, the ones that ended at no collector, and are not counted as unannounced; and those that are open at
    one although every engine's have ended."""
    fires_sent: int
    fires_merged: int
    step_time_ratio: float | None
    """How much longer steps were during the faults than without one, load of the machine taken out: see below."""
    dropped: dict[str, int]
    """`shed` by reason."""
    collector_peak_mib: float

    def line(self) -> str:
        ratio = "-" if self.step_time_ratio is None else f"{self.step_time_ratio:.3f}"
        return (
            f"{self.fault:28} faults {self.faults:4}  sent {self.sent:9}  merged {self.merged:9}  shed {self.shed:7}  "
            f"lost {self.lost:3}  doubled {self.doubled:3}  unbooked {self.unbooked:3}  "
            f"ended {self.ended:5}  open {self.open:3}  step time x{ratio}  "
            f"collector {self.collector_peak_mib:.0f} MiB  {self.dropped or ''}"
        )


def reconcile(
    fault: str, made: World, handed: list[dict[str, int]], totals: list[Totals], engines: list[Engine]
) -> Books:
    sent = sum(h["tokens"] for h in handed)
    ended = sum(h["ended"] for h in handed)
    given_up = sum(counted.given_up for counted in totals)
    missing = sum(counted.tokens.get(("dropped", "lost"), 0) for counted in totals)
    accounted = sum(counted.accounted for counted in totals)
    dropped = {"given_up": given_up} if given_up else {}
    for counted in totals:
        for (state, reason), count in counted.tokens.items():
            if state == "dropped" and not (reason == "lost" and counted.given_up):
                dropped[reason] = dropped.get(reason, 0) + count
    shed = sum(dropped.values())
    return Books(
        fault=fault,
        faults=len(made.faults),
        sent=sent,
        merged=accounted - shed,
        shed=shed,
        lost=max(0, missing - given_up),
        doubled=max(0, accounted - sent) + sum(counted.excess for counted in totals),
        unbooked=max(0, sent - accounted),
        ended=ended,
        open=max(0, ended - sum(counted.ended + counted.unannounced for counted in totals))
        + sum(counted.open for counted in totals),
        fires_sent=sum(h["fires"] for h in handed),
        fires_merged=sum(counted.fires for counted in totals),
        step_time_ratio=step_time_ratio(made.faults, engines),
        dropped=dropped,
        collector_peak_mib=round(max(c.peak_mib for c in made.collectors), 1),
    )


def step_time_ratio(faults: list[tuple[float, float]], engines: list[Engine]) -> float | None:
    """The median step during the faults by the median step outside of them, each in units of its own model's part.

    The stand-in's model is the same work in every step, in the same thread right before the monitor's part: what else
    the machine does at that time slows both. A step that waits for anything of ours is longer by itself.
    """
    steps = np.concatenate([engine.steps() for engine in engines])
    began, relative = steps[:, 0], steps[:, 2] / steps[:, 1]
    during = np.zeros(len(steps), bool)
    for begin, end in faults:
        during |= (began >= begin) & (began < end)
    if min(during.sum(), (~during).sum()) < _STEPS_FOR_A_RATIO:
        return None
    return round(float(np.median(relative[during]) / np.median(relative[~during])), 4)
