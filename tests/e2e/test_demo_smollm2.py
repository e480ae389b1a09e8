"""`latentwatch demo` on SmolLM2-135M-Instruct: books, promises and the report, in a short run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_model import smollm2

pytestmark = [pytest.mark.e2e, pytest.mark.engine]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run with 20 seconds of traffic, without Prometheus; its working folder and what it printed."""
    smollm2()
    folder = tmp_path_factory.mktemp("demo")
    argv = [
        sys.executable,
        "-m",
        "latentwatch",
        "demo",
        "--model",
        "smollm2",
        "--traffic-seconds",
        "20",
        "--no-prometheus",
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    return folder, subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def figures(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    path = ran[0] / "demo-report.json"
    assert path.exists(), ran[1].stdout + ran[1].stderr
    return dict(json.loads(path.read_text()))


@pytest.mark.timeout(950)
def test_it_passes_all_its_own_checks(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert ran[1].returncode == 0, ran[1].stdout + ran[1].stderr


def test_every_token_is_accounted_for(figures: dict[str, Any]) -> None:
    tokens = figures["tokens"]
    assert tokens["scored"] + tokens["inherited"] + tokens["unseen"] == tokens["engine"] > 1000
    assert tokens["dropped"] == 0


def test_every_critical_exceedance_is_the_incidents_or_counted_as_a_false_page(figures: dict[str, Any]) -> None:
    pages, detectors = figures["detection"]["pages"], figures["detection"]["detectors"].values()
    assert pages["true"] + pages["false"] > 0
    assert pages["false"] <= sum(one["pages"]["false"] for one in detectors)
    assert figures["exceedances"]["critical_outside"] == sum(one["pages"]["false"] for one in detectors)
    assert {one["concern"] for one in detectors} == {"harmful_request", "jailbreak_wrapper", "false_statement"}


def test_the_report_shows_the_plots_and_needs_nothing_from_the_network(
    ran: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    page = (ran[0] / "demo-out" / "report.html").read_text()
    for heading in ("What was paged about", "Caught at each false-positive rate", "What limits promised", "Where in a"):
        assert heading in page
    assert page.count('class="tokens"') >= 1
    assert not re.findall(r"(?:src|href)\s*=|@import|<script", page)
