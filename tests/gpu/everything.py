"""All that needs a GPU, in one call: tests, sanitizer, kernel benchmark, shape sweep, engine tests, engine benchmark.

    python -m tests.gpu.everything [--steps NAME,...] [--minutes N] [--results FOLDER] [--logs FOLDER]
    python -m tests.gpu.everything --cpu-check

Each step runs in a process of its own with its own time; one that fails stops no other. A summary goes to the screen
and, with the steps' own output, to the folder of logs. Benchmarks take up where an earlier call stopped.

Needed: torch with CUDA and Triton; for the engine steps also vLLM (0.26 or newer), transformers and the [engine] and
[collector] extras. The plugin need not be installed: where its entry point is missing, one is made for the children.
`--cpu-check` runs those parts of every step that need no GPU, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from latentwatch import __version__

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINT = "[vllm.general_plugins]\nlatentwatch = latentwatch.engines.vllm.plugin:register\n"
PYTEST = ("-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider")


class Step(NamedTuple):
    """A command (arguments of python), its share of the time, and what it needs."""

    name: str
    command: Callable[[Path, float], tuple[str, ...]]
    share: float
    needs_vllm: bool = False


def _results(module: str, file: str, *more: str) -> Callable[[Path, float], tuple[str, ...]]:
    return lambda folder, minutes: ("-m", module, "--out", str(folder / file), "--minutes", f"{minutes:.2f}", *more)


STEPS = (
    Step("kernel-tests", lambda _f, _m: (*PYTEST, "tests/gpu/test_score.py", "tests/gpu/test_compact.py"), 0.14),
    Step("sanitizer", lambda _f, _m: (*PYTEST, "tests/gpu/test_sanitizer.py"), 0.10),
    Step("engine-tests", lambda _f, _m: (*PYTEST, "tests/gpu/test_engine.py"), 0.12, needs_vllm=True),
    Step("kernel-bench", _results("tests.bench.kernels.run", "kernels-gpu.json"), 0.24),
    Step("engine-bench", _results("tests.bench.engine_gpu.run", "engine-gpu.json"), 0.30, needs_vllm=True),
    Step("sweep", _results("tests.bench.kernels.sweep", "kernels-sweep.json"), 0.10),
)
CPU_CHECKS = (
    Step("interpreter-and-ahead-of-time", lambda _f, _m: (*PYTEST, "tests/unit/kernels"), 0.4),
    Step("gpu-tests-are-skipped-with-a-reason", lambda _f, _m: (*PYTEST, "tests/gpu"), 0.1),
    Step("kernel-bench", lambda _f, _m: ("-m", "tests.bench.kernels.run", "--check"), 0.1),
    Step("engine-bench", lambda _f, _m: ("-m", "tests.bench.engine_gpu.run", "--check"), 0.4, needs_vllm=True),
)


def run(steps: list[Step], results: Path, logs: Path, minutes: float) -> list[dict[str, Any]]:
    """Run the steps and say what became of each: "passed", "failed ...", "out of time ..." or "not run: <why>"."""
    logs.mkdir(parents=True, exist_ok=True)
    summary = []
    whole = sum(step.share for step in steps)
    with tempfile.TemporaryDirectory(prefix="lw") as extra:
        environment = _environment(Path(extra))
        for step in steps:
            # What an earlier step left over is shared out among those that follow.
            began = time.monotonic()
            if step.needs_vllm and importlib.util.find_spec("vllm") is None:
                outcome = "not run: vLLM is not installed here"
            else:
                command = step.command(results, 0.85 * minutes * step.share / whole)
                outcome = _run_one(command, logs / f"{step.name}.log", minutes * step.share / whole, environment)
            spent = (time.monotonic() - began) / 60
            minutes, whole = max(0.1, minutes - spent), max(1e-9, whole - step.share)
            summary.append({"step": step.name, "outcome": outcome, "minutes": round(spent, 2)})
            print(f"{step.name}: {outcome} ({spent:.1f} min)", flush=True)
            (logs / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _run_one(command: tuple[str, ...], log: Path, minutes: float, environment: dict[str, str]) -> str:
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            # Its own engines and collectors are in its session and go with it.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"out of time, see {log.name}"
    tail = log.read_text(errors="replace").strip().splitlines()[-8:]
    print("\n".join(f"    {line}" for line in tail), flush=True)
    return "passed" if code == 0 else f"failed with code {code}, see {log.name}"


def _environment(extra: Path) -> dict[str, str]:
    """The children's: this checkout importable, and the plugin's entry point in sight of vLLM."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    names = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "latentwatch" not in names:
        info = extra / f"latentwatch-{__version__}.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_text(ENTRY_POINT)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: latentwatch\nVersion: {__version__}\n")
        paths.insert(0, str(extra))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    # A step decides for itself which kernels it interprets.
    environment.pop("TRITON_INTERPRET", None)
    return environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-check", action="store_true", help="the parts that need no GPU; nothing is measured")
    parser.add_argument("--steps", default="", help="only these, with commas (default: all, in this order)")
    parser.add_argument("--minutes", type=float, default=120.0, help="for all steps together (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "tests/bench/results", help="where figures go")
    parser.add_argument("--logs", type=Path, default=ROOT / ".cache/gpu", help="where the steps' output goes")
    options = parser.parse_args()
    steps = CPU_CHECKS if options.cpu_check else STEPS
    names = options.steps.split(",") if options.steps else [step.name for step in steps]
    unknown = set(names) - {step.name for step in steps}
    if unknown:
        parser.error(f"unknown steps {sorted(unknown)}; known are {[step.name for step in steps]}")
    chosen = [step for step in steps if step.name in names]
    if options.cpu_check:
        with tempfile.TemporaryDirectory(prefix="lw") as folder:
            summary = run(chosen, Path(folder), options.logs, options.minutes)
    else:
        import torch

        if not torch.cuda.is_available():
            sys.exit("no GPU: torch sees no CUDA device. On this machine --cpu-check runs what needs none.")
        summary = run(chosen, options.results, options.logs, options.minutes)
    sys.exit(any(row["outcome"] != "passed" for row in summary))


if __name__ == "__main__":
    main()
