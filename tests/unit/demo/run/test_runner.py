"""The runner with stand-ins for the collector and vLLM; tests/e2e/test_demo.py runs it with the real ones."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from latentwatch.demo.run import runner

from tests.support.programs import program

ROOT = Path(__file__).parents[4]


def demo(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *args), cwd=folder, env=environment(env), capture_output=True, text=True)


def command(folder: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "tests.support.stub_demo", str(folder), *args]


def environment(more: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "monitor"), str(ROOT))), **more}


def processes_mentioning(text: str) -> list[str]:
    """Command lines of the processes of this machine that mention a text."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if text in line]


def ports_in(text: str) -> set[str]:
    return set(re.findall(r"http://127\.0\.0\.1:(\d+)", text))


def assert_nothing_left(output: str) -> None:
    for port in ports_in(output):
        assert not processes_mentioning(f"--port {port}")
        assert not processes_mentioning(f"127.0.0.1:{port}")


def test_a_run_in_which_all_holds_exits_0_and_leaves_both_reports(tmp_path: Path) -> None:
    ran = demo(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = json.loads((tmp_path / "demo-report.json").read_text())
    assert figures["tokens"]["engine"] == figures["tokens"]["scored"] == 14 * figures["requests"]
    assert figures["exceedances"]["inside"] == figures["exceedances"]["feared_requests"] > 0
    assert figures["exceedances"]["critical_outside"] == 0
    assert figures["seconds_to_metrics"] is not None
    assert figures["paging"] == "--no-prometheus was given"
    assert "every check held" in (tmp_path / "out" / "report.html").read_text()
    assert_nothing_left(ran.stdout)


def test_tokens_that_the_collector_lost_fail_the_run(tmp_path: Path) -> None:
    ran = demo(tmp_path, STUB_LOSES="3")
    assert ran.returncode == 1
    assert "✗ every token accounted for" in ran.stdout
    assert json.loads((tmp_path / "demo-report.json").read_text())["passed"] is False
    assert "a check failed" in (tmp_path / "out" / "report.html").read_text()


def test_a_child_that_dies_midway_ends_the_run_with_the_end_of_its_log_and_the_others_too(tmp_path: Path) -> None:
    ran = demo(tmp_path, STUB_DIES_AFTER="3")
    assert ran.returncode == 1
    assert "vLLM: it ended with exit code 7" in ran.stdout
    assert "| the engine ran out of patience" in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr
    assert_nothing_left(ran.stdout)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_in_the_middle_ends_everything_and_says_so_with_the_exit_code(
    tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "stdout"
    running = start(tmp_path, log, "--seconds", "60")
    wait_for(log, "vLLM ")
    time.sleep(1.0)
    running.send_signal(number)
    running.wait(30)
    # The stub's main() raises; the command line's turns it into 130.
    assert running.returncode != 0
    assert "KeyboardInterrupt" in log.read_text()
    assert_nothing_left(log.read_text())


def test_keep_leaves_everything_running_until_ctrl_c(tmp_path: Path) -> None:
    log = tmp_path / "stdout"
    running = start(tmp_path, log, "--keep")
    text = wait_for(log, "Ctrl-C ends it")
    (live_page,) = re.findall(r"live page +http://127\.0\.0\.1:(\d+)/", text)
    time.sleep(0.5)
    assert running.poll() is None
    assert processes_mentioning(f"--port {live_page}")
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 0
    assert_nothing_left(text)


def test_the_page_comes_through_the_real_prometheus_and_alertmanager(tmp_path: Path) -> None:
    program("prometheus")
    program("prometheus-alertmanager")
    # Long enough for the watchdog too: Prometheus sends an alert safely only some seconds after its start.
    ran = demo(tmp_path, "--prometheus", "--seconds", "12")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = json.loads((tmp_path / "demo-report.json").read_text())
    assert figures["paging"] == "shown"
    assert 0.0 < figures["seconds_to_page"] < 15.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "latentwatch-demo: Deceiving went over its critical limit" in page
    assert "dead-mans-switch" in page
    assert_nothing_left(ran.stdout)


def start(folder: Path, log: Path, *args: str) -> subprocess.Popen[bytes]:
    """Start in a process group of its own, as a shell does, with SIGINT not ignored as it is for background jobs."""
    with log.open("wb") as out:
        return subprocess.Popen(
            command(folder, *args),
            cwd=folder,
            env=environment({}),
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def wait_for(log: Path, text: str) -> str:
    for _ in range(600):
        if text in log.read_text():
            return log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{text!r} not in:\n{log.read_text()}")


def test_complaints_are_our_own_and_each_stands_once(tmp_path: Path) -> None:
    (tmp_path / "vllm.log").write_text(
        "(Worker pid=7) ERROR 11-22 03:28:00 latentwatch: the exporter ended with code 1\n"
        "(Worker pid=7) ERROR 11-22 03:28:05 latentwatch: the exporter ended with code 1\n"
        "(Worker pid=7) INFO 11-22 03:28:05 latentwatch: armed 53 features\n"
        "(Worker pid=7) WARNING 11-22 03:28:05 Triton is not installed\n"
    )
    (tmp_path / "collector.log").write_text("03:28 WARNING latentwatch.transport.receiver: stream refused, watchlist\n")
    assert runner.complaints(tmp_path) == [
        "collector: 03:28 WARNING latentwatch.transport.receiver: stream refused, watchlist",
        "vllm: (Worker pid=7) ERROR 11-22 03:28:05 latentwatch: the exporter ended with code 1",
    ]
