"""An exporter is told its work whatever its size, and telling it never waits for it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import cast

import pytest
from latentwatch.engines.vllm import exporter_process
from latentwatch.engines.vllm.attach import Attachment
from latentwatch.engines.vllm.exporter_process import STUCK_SECONDS, ExporterChild, RestartBackoff
from latentwatch.engines.vllm.step_tap import StepTap
from latentwatch.facts import EngineIdentity
from latentwatch.handover.exporter_config import ExporterConfig, WatchedFeature
from latentwatch.handover.ring import Geometry, Ring
from latentwatch.names import Reason, Severity

PIPE_BYTES = 65536
GEOMETRY = Geometry(max_requests=2, max_rows=16, features=1024, dense=0, hook_points=1)


@pytest.fixture
def ring():
    made = Ring.create(GEOMETRY)
    yield made
    made.close()


def large_config(ring: Ring) -> ExporterConfig:
    """Of 1,024 features with limits of many digits, and the longest texts."""
    config = ExporterConfig(
        engine_pid=os.getpid(),
        ring_fd=ring.fd,
        geometry=GEOMETRY,
        collector="unix:///tmp/c.sock",
        drafts=False,
        cached_reason=Reason.PREFIX_CACHE,
        cached_blocks=None,
        features=tuple(WatchedFeature(Severity.CRITICAL, (i + 0.1) / 3, False) for i in range(1024)),
        identity=EngineIdentity("pod/0", "b" * 32, "0", "m", "", False, "engine_mode", "said " * 800, "0.1", "0.32"),
    )
    assert len(config.to_json()) > PIPE_BYTES
    return config


def children(monkeypatch: pytest.MonkeyPatch, program: str, spawned: list[subprocess.Popen[bytes]]) -> None:
    """Have ExporterChild start this program instead, with the arguments and files of an exporter."""
    popen = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        assert command[1:4] == ["-P", "-m", "latentwatch.exporter"]
        process = popen([sys.executable, "-c", program, *command[4:]], **options)  # type: ignore[call-overload]
        spawned.append(process)
        return process

    monkeypatch.setattr(exporter_process.subprocess, "Popen", start)


def test_telling_a_process_that_never_reads_does_not_wait(monkeypatch, ring):
    spawned: list[subprocess.Popen[bytes]] = []
    children(monkeypatch, "import time; time.sleep(60)", spawned)
    monkeypatch.setattr(exporter_process, "READY_SECONDS", 0.0)
    try:
        child = ExporterChild(ring)
        first = threading.Thread(target=child.configure, args=(large_config(ring),), daemon=True)
        first.start()
        first.join(10.0)
        assert not first.is_alive(), "it waits for a reader"
        child.process.kill()
        child.process.wait()
        again = threading.Thread(target=child.restart_if_ended, args=(1e9,), daemon=True)
        again.start()
        again.join(10.0)
        assert not again.is_alive() and len(spawned) == 2, "the engine's step waits for the restarted exporter"
    finally:
        for process in spawned:
            process.kill()
            process.wait()


def test_each_process_reads_the_whole_of_it(monkeypatch, ring, tmp_path):
    told = tmp_path / "told"
    program = f"""
import sys
from latentwatch.exporter import process
def wire(config, env):
    with open({str(told)!r}, "a") as file:
        print(config.to_json(), file=file)
    raise SystemExit(3)
process._wire = wire
process.main(int(sys.argv[1]), int(sys.argv[2]))
"""
    spawned: list[subprocess.Popen[bytes]] = []
    children(monkeypatch, program, spawned)
    config = large_config(ring)
    child = ExporterChild(ring)
    child.configure(config)
    child.process.wait(60)
    assert child.restart_if_ended(1e9)
    child.process.wait(60)
    assert [process.returncode for process in spawned] == [3, 3]
    assert [ExporterConfig.from_json(line) for line in told.read_text().splitlines()] == [config, config]


def test_an_engine_that_ends_before_it_tells_anything_lets_its_exporter_go(monkeypatch, ring):
    spawned: list[subprocess.Popen[bytes]] = []
    children(
        monkeypatch,
        "import sys; from latentwatch.exporter.process import main; sys.exit(main(*map(int, sys.argv[1:])))",
        spawned,
    )
    child = ExporterChild(ring)
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(60) == 0


def deaths(backoff: RestartBackoff, lives: list[float], now: float = 0.0) -> list[float]:
    """The waits before each start of processes that live so long, looked at every second."""
    waits = []
    backoff.started(now)
    for life in lives:
        now += life
        ended = now
        backoff.ended(now)
        while not backoff.is_due(now):
            now += 1.0
            backoff.ended(now)
        waits.append(now - ended)
        backoff.started(now)
    return waits


def test_an_exporter_that_ends_again_and_again_is_started_ever_more_rarely_and_for_ever():
    waits = deaths(RestartBackoff(), [0.5] * 5000)
    assert waits[:8] == [0, 1, 2, 4, 8, 16, 32, 60]
    assert set(waits[8:]) == {60}


def test_what_lived_well_for_a_while_is_forgiven():
    waits = deaths(RestartBackoff(), [0.5] * 8 + [60.0, 0.5, 0.5] + [59.0])
    assert waits[8:] == [0, 1, 2, 4]


def test_an_engine_starts_its_exporter_after_any_number_of_deaths_and_says_so_once(monkeypatch, ring, caplog):
    spawned: list[subprocess.Popen[bytes]] = []
    children(monkeypatch, "", spawned)
    child, now = ExporterChild(ring), 1e6
    for i in range(2, 41):
        spawned[-1].wait(60)
        while not child.restart_if_ended(now):
            now += 1.0
        assert len(spawned) == i
    spawned[-1].wait(60)
    assert ring.restarts == 39
    assert sum("the exporter ended with code" in record.getMessage() for record in caplog.records) == 1


def test_a_system_that_starts_no_process_costs_the_engine_nothing_and_is_asked_again(monkeypatch, ring):
    spawned: list[subprocess.Popen[bytes]] = []

    def refuses(*_args: object, **_options: object) -> subprocess.Popen[bytes]:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(exporter_process, "READY_SECONDS", 0.0)
    with monkeypatch.context() as limited:
        limited.setattr(exporter_process.subprocess, "Popen", refuses)
        child = ExporterChild(ring)
        child.configure(large_config(ring))
        assert not any(child.restart_if_ended(1e6 + i) for i in range(10))
    children(monkeypatch, "import sys; sys.stdin.readline()", spawned)
    now = 1e6 + 10
    while not child.restart_if_ended(now):
        now += 1.0
    assert now < 1e6 + 100 and spawned[0].wait(60) == 0


def test_an_interpreter_that_cannot_say_what_it_is_costs_the_engine_nothing(monkeypatch, ring, caplog):
    """An embedded one has no `sys.executable`, which Popen takes for a mistake of its caller."""
    monkeypatch.setattr(exporter_process.sys, "executable", None)
    child = ExporterChild(ring)
    child.configure(large_config(ring))
    assert not any(child.restart_if_ended(1e6 + i) for i in range(10))
    assert "does not start an exporter" in caplog.text


def test_the_exporter_of_an_idle_engine_is_started_again_and_the_next_step_learns_of_it(monkeypatch, ring):
    """The engine's thread does nothing here: no step comes."""
    spawned: list[subprocess.Popen[bytes]] = []
    children(monkeypatch, "import time; time.sleep(600)", spawned)
    monkeypatch.setattr(exporter_process, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(exporter_process, "READY_SECONDS", 0.0)
    attachment = Attachment.__new__(Attachment)
    child = attachment._exporter = ExporterChild(ring)
    attachment._ring, attachment._cache, attachment._hooks = ring, None, ()
    attachment._start_tap = lambda: None  # type: ignore[method-assign]
    attachment._tap = cast(StepTap, object())
    attachment._exporter_config = lambda *_: large_config(ring)  # type: ignore[method-assign]
    try:
        attachment._warmed_up()
        spawned[0].kill()
        deadline = time.monotonic() + 20.0
        while len(spawned) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(spawned) == 2 and ring.restarts == 1, "an idle engine leaves its exporter dead"
        while not child.was_restarted(0.0) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.monotonic() < deadline and not child.was_restarted(0.0), "the tap is told once"
        ring.close()
        spawned[1].kill()
        spawned[1].wait()
        time.sleep(0.5)
        assert len(spawned) == 2, "an engine that says no more starts none"
        assert "latentwatch-exporter" not in [thread.name for thread in threading.enumerate()]
    finally:
        for process in spawned:
            process.kill()
            process.wait()


def test_a_host_without_a_thread_to_spare_has_the_exporter_looked_after_by_the_steps(monkeypatch, ring, caplog):
    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    spawned: list[subprocess.Popen[bytes]] = []
    children(monkeypatch, "", spawned)
    child = ExporterChild(ring)
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", no_thread)
        child.watch()
    assert "no thread watches the exporter" in caplog.text
    spawned[0].wait(60)
    assert child.was_restarted(1e6) and not child.was_restarted(1e6)
    spawned[1].wait(60)


def write_step(ring: Ring) -> None:
    slot = ring.reserve()
    assert slot is not None
    ring.commit(slot, step=1, time_unix_nano=1, requests=0, rows=0, scored_rows=0, fires=0, silent=False, events=0)


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGSTOP], ids=["hangs", "is stopped"])
def test_an_exporter_that_reads_no_more_is_ended_and_only_then_the_next_one_started(monkeypatch, ring, number):
    spawned: list[subprocess.Popen[bytes]] = []
    children(monkeypatch, "import time; time.sleep(600)", spawned)
    try:
        child, now = ExporterChild(ring), 1e6
        spawned[0].send_signal(number)
        for _ in range(3):
            write_step(ring)
        for _ in range(int(STUCK_SECONDS) - 2):
            now += 1.0
            assert not child.restart_if_ended(now)
        assert spawned[0].poll() is None
        while spawned[0].poll() is None:
            now += 1.0
            # It dies when the system comes to it; none is started beside it until then.
            assert len(spawned) == 1
            child.restart_if_ended(now)
            time.sleep(0.01)
        if len(spawned) == 1:
            assert child.restart_if_ended(now + 1.0)
        assert spawned[0].returncode == -signal.SIGKILL
        assert [process.poll() is None for process in spawned] == [False, True]
    finally:
        for process in spawned:
            process.kill()
            process.wait()


def test_an_exporter_that_reads_slowly_or_has_nothing_to_read_is_left_alone(monkeypatch, ring):
    spawned: list[subprocess.Popen[bytes]] = []
    children(monkeypatch, "import time; time.sleep(600)", spawned)
    try:
        child, now = ExporterChild(ring), 1e6
        reader = Ring(ring.fd, GEOMETRY, create=False)
        looks = int(STUCK_SECONDS) // 2 - 2
        for turn in range(8 * looks):
            if turn < 4 * looks:
                if turn % looks == 0:
                    write_step(ring)
                    write_step(ring)
                    write_step(ring)
                    assert reader.peek() is not None
                    reader.release()
            else:
                while reader.peek() is not None:
                    # The last one waits for the next.
                    reader.release(waits=True)
            now += 3600.0
            assert not child.restart_if_ended(now)
        assert spawned[0].poll() is None
    finally:
        for process in spawned:
            process.kill()
            process.wait()


ENGINE = """
import os, subprocess, sys, time
exporter = subprocess.Popen(
    [sys.executable, "-c", f"import sys; from latentwatch.exporter.process import main; main(0, {os.getpid()})"],
    stdin=subprocess.PIPE,
)
if os.fork() == 0:
    print(os.getpid(), exporter.pid, flush=True)
    time.sleep(60)
    os._exit(0)
os._exit(0)
"""


def test_an_exporter_ends_with_its_engine_although_a_fork_of_it_has_the_pipe_too():
    engine = subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    fork, exporter = map(int, engine.stdout.readline().split())
    try:
        engine.wait(60)
        deadline = time.monotonic() + 60
        while runs(exporter):
            assert time.monotonic() < deadline, "it waits for a process that is gone"
            time.sleep(0.1)
        assert runs(fork)
    finally:
        for process in (fork, exporter):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
