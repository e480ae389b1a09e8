"""No process of the demo outlives it, however it ends, and one that ends early is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from latentwatch.demo.run.processes import ChildFailed, ProcessGroup, free_ports

SLEEPS = (sys.executable, "-c", "import time; time.sleep(60)")
IGNORES_SIGTERM = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)",
)
HAS_A_GRANDCHILD = (
    sys.executable,
    "-c",
    "import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    "print(c.pid, flush=True); time.sleep(60)",
)


def wait_for_text(log: Path) -> str:
    for _ in range(200):
        if text := log.read_text():
            return text
        time.sleep(0.05)
    raise AssertionError(f"nothing in {log}")


def gone(pid: int) -> bool:
    """Whether a process ended, or is a zombie that only its reaper still sees."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_children_and_grandchildren_are_gone_after_the_context(tmp_path: Path) -> None:
    with ProcessGroup() as group:
        child = group.start("parent", HAS_A_GRANDCHILD, log=tmp_path / "log")
        grandchild = int(wait_for_text(tmp_path / "log"))
        group.check()
    assert child.process.returncode == -signal.SIGTERM
    assert gone(grandchild)


def test_children_are_gone_after_an_error_in_the_context(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ProcessGroup() as group:
        child = group.start("sleeper", SLEEPS, log=tmp_path / "log")
        raise RuntimeError
    assert child.process.returncode == -signal.SIGTERM


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace_time(tmp_path: Path) -> None:
    with ProcessGroup() as group:
        child = group.start("deaf", IGNORES_SIGTERM, log=tmp_path / "log", grace_seconds=0.3)
        wait_for_text(tmp_path / "log")
    assert child.process.returncode == -signal.SIGKILL


def test_children_share_one_process_group_that_is_not_ours(tmp_path: Path) -> None:
    with ProcessGroup() as group:
        groups = {os.getpgid(group.start(n, SLEEPS, log=tmp_path / n).process.pid) for n in ("a", "b")}
    assert len(groups) == 1
    assert groups != {os.getpgrp()}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_children_end_when_the_demo_itself_is_killed(tmp_path: Path, how: signal.Signals) -> None:
    script = (
        "import sys, time; from pathlib import Path; from latentwatch.demo.run.processes import ProcessGroup\n"
        "with ProcessGroup() as group:\n"
        f"    child = group.start('sleeper', {SLEEPS!r}, log=Path({str(tmp_path / 'log')!r}))\n"
        "    print(child.process.pid, flush=True); time.sleep(60)\n"
    )
    demo = start_python(script)
    assert demo.stdout is not None
    child = int(demo.stdout.readline())
    demo.send_signal(how)
    demo.wait(10)
    assert gone(child)


def start_python(script: str) -> subprocess.Popen[str]:
    argv: Sequence[str] = (sys.executable, "-c", script)
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4])


def test_a_child_that_ends_early_is_named_with_its_exit_code_and_the_end_of_its_log(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", "print('line\\n' * 50 + 'port 9464 is in use'); raise SystemExit(3)")
    with ProcessGroup() as group:
        child = group.start("collector", argv, log=tmp_path / "collector.log")
        child.process.wait(10)
        with pytest.raises(ChildFailed, match="collector: it ended with exit code 3") as failed:
            group.check()
    assert failed.value.log_tail.endswith("port 9464 is in use")
    assert len(failed.value.log_tail.splitlines()) == 15
    assert str(tmp_path / "collector.log") in failed.value.instead


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with ProcessGroup() as group, pytest.raises(ChildFailed, match="no-such-program cannot be started"):
        group.start("thing", ("/nowhere/no-such-program",), log=tmp_path / "log")


def test_free_ports_are_all_different() -> None:
    assert len(set(free_ports(20))) == 20
