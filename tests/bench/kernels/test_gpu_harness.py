"""The harness around the GPU runs, as far as it needs no GPU: what a person starts there must not fail on its own."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.bench.kernels import plot
from tests.bench.kernels import run as kernel_bench
from tests.bench.kernels.timing import Machine
from tests.gpu import everything
from tests.gpu.everything import Step


def test_the_kernel_benchmarks_own_arithmetic_and_baselines_hold(capsys: pytest.CaptureFixture[str]) -> None:
    kernel_bench.check()
    assert "nothing was measured" in capsys.readouterr().out


def test_a_floor_is_the_largest_of_launch_bytes_and_operations() -> None:
    machine = Machine(launch_us=2.0, bytes_per_us=1e6, flops_per_us=1e9)
    assert machine.floor_us(bytes_moved=10, flops=10) == 2.0
    assert machine.floor_us(bytes_moved=5_000_000, flops=10) == 5.0
    assert machine.floor_us(bytes_moved=10, flops=7_000_000_000) == 7.0


def test_the_plot_draws_a_line_for_each_number_of_features(tmp_path: Path) -> None:
    """From made-up rows: only the drawing is looked at."""
    rows: list[dict[str, Any]] = [
        {"d": 4096, "K": K, "T": T, "residual_add": True, "times_floor": 1.5, "speedup_vs_compile": 2.0}
        for K in (8, 64)
        for T in (1, 64, 8192)
    ]
    source = tmp_path / "made-up.json"
    source.write_text(json.dumps({"hardware": "nowhere", "rows": rows}))
    plot.main([str(source)])
    svg = ElementTree.parse(tmp_path / "made-up.svg").getroot()
    assert len([node for node in svg.iter() if node.tag.endswith("polyline")]) == 2 * 2


def steps(*programs: str) -> list[Step]:
    def command(program: str) -> Any:
        return lambda _results, _minutes: ("-c", program)

    return [Step(f"step{i}", command(program), 1.0) for i, program in enumerate(programs)]


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    chosen = steps("raise SystemExit(3)", "import time; time.sleep(60)", "print('well')")
    chosen[1] = chosen[1]._replace(share=0.01)
    summary = everything.run(chosen, tmp_path, tmp_path, minutes=2.0)
    outcomes = [row["outcome"] for row in summary]
    assert outcomes[0].startswith("failed with code 3")
    assert outcomes[1].startswith("out of time")
    assert outcomes[2] == "passed"
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_children_find_the_plugins_entry_point_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    program = (
        "from importlib.metadata import entry_points as points;"
        "assert 'latentwatch' in {p.name for p in points(group='vllm.general_plugins')}"
    )
    (row,) = everything.run(steps(program), tmp_path, tmp_path, minutes=1.0)
    assert row["outcome"] == "passed"


def test_an_unknown_step_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["everything", "--cpu-check", "--steps", "swep"])
    with pytest.raises(SystemExit):
        everything.main()
    assert "swep" in capsys.readouterr().err
