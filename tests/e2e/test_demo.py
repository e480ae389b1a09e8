"""`latentwatch demo` as a stranger runs it: real vLLM, collector, Prometheus, Alertmanager, and what they agree on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import program

pytestmark = [pytest.mark.e2e, pytest.mark.engine]
ROOT = Path(__file__).parents[2]
DEMO = (sys.executable, "-m", "latentwatch", "demo", "--model", "tiny")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run with 20 seconds of traffic; its working folder and what it printed."""
    program("prometheus")
    program("prometheus-alertmanager")
    folder = tmp_path_factory.mktemp("demo")
    argv = [*DEMO, "--traffic-seconds", "20"]
    return folder, subprocess.run(argv, cwd=folder, env=environment(), capture_output=True, text=True, timeout=550)


@pytest.fixture(scope="module")
def figures(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    folder, process = ran
    path = folder / "demo-report.json"
    assert path.exists(), process.stdout + process.stderr
    return dict(json.loads(path.read_text()))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_demo_passes_all_its_own_checks(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert ran[1].returncode == 0, ran[1].stdout + ran[1].stderr


def test_every_token_that_vllm_fed_is_accounted_for_and_none_was_dropped(figures: dict[str, Any]) -> None:
    tokens = figures["tokens"]
    fed = tokens["engine_prompt"] + tokens["engine_output"] - tokens["engine_finished_requests"]
    assert fed == tokens["engine"] > 1000
    assert tokens["scored"] + tokens["inherited"] + tokens["unseen"] == fed
    assert tokens["dropped"] == 0


def test_critical_exceedances_are_the_incidents_only(figures: dict[str, Any]) -> None:
    assert figures["exceedances"]["critical_outside"] == 0
    assert figures["exceedances"]["feared_requests_caught"] > 0


def test_the_page_arrives_within_seconds_of_the_first_anomalous_token(figures: dict[str, Any]) -> None:
    # Loose, since this machine may be busy with other tests; on an idle one both are below a few seconds.
    assert 0.0 < figures["seconds_to_metrics"] < 6.0
    assert figures["seconds_to_metrics"] < figures["seconds_to_page"] < 15.0


def test_the_page_about_it_names_the_feature_in_words(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    page = (ran[0] / "demo-out" / "report.html").read_text()
    assert re.search(r"latentwatch-demo: The model is [a-z ]+ went over its critical limit", page)


def test_the_report_needs_nothing_from_the_network(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    page = (ran[0] / "demo-out" / "report.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=|@import|<script", page)


def test_no_process_of_the_demo_is_left(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert_nothing_left(ran[0], ran[1].stdout)


def test_ctrl_c_while_vllm_starts_leaves_no_process(tmp_path: Path) -> None:
    log = tmp_path / "stdout"
    with log.open("wb") as out:
        running = subprocess.Popen(
            [*DEMO, "--no-prometheus"],
            cwd=tmp_path,
            env=environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    engine_log = tmp_path / "demo-out" / "logs" / "vllm.log"
    deadline = time.monotonic() + 120
    while not (engine_log.exists() and engine_log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130, log.read_text()
    assert_nothing_left(tmp_path, log.read_text())


def test_a_damaged_watchlist_is_refused_before_anything_starts(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from latentwatch.demo.run import commands\n"
        f"commands.ASSETS = Path({str(tmp_path)!r})\n"
        "from latentwatch.cli import main; sys.exit(main(['demo', '--model', 'tiny']))"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "demo.watchlist.safetensors").write_text("cut")
    for name in ("ordinary.jsonl", "incidents.jsonl"):
        (tmp_path / name).write_text('{"topic": "t", "messages": [{"role": "user", "content": "Hello."}]}\n')
    argv = [sys.executable, "-c", script]
    refused = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "not a whole watchlist file" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "demo-out").exists()


def assert_nothing_left(folder: Path, output: str) -> None:
    """No process mentions a port that the demo printed, nor the socket that the exporter connects to."""
    ports = re.findall(r"http://127\.0\.0\.1:(\d+)", output)
    sockets = re.findall(r"unix://(\S+)", (folder / "demo-out" / "logs" / "collector.log").read_text())
    assert sockets
    needles = [f"127.0.0.1:{port}" for port in ports] + [f"--port {port}" for port in ports] + sockets
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        assert not any(needle in line for needle in needles), line
