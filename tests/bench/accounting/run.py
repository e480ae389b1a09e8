"""Every mode of the engine against the three invariants: `make bench-accounting` writes results/accounting.json."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from monitor import __version__
from monitor.watchlist import card
from tests.bench.accounting import checks, models
from tests.bench.accounting.checks import Account
from tests.bench.accounting.modes import ENGINES, SMALL, Engine
from tests.bench.accounting.workload import Request
from tests.support.engines import ROOT, cache_root
from tests.support.recording import RecordingCollector, RecordingSink

RESULT = ROOT / "tests/bench/results/accounting.json"
MAX_ERROR = 2e-3
"""Largest error of a score that counts as right: dense scores travel as float16, whose resolution is 1e-3."""


class Drivers:
    """Processes that run engines, one per PYTHONPATH: what stands there is loaded when Python starts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def run(self, job: dict[str, Any]) -> Any:
        """One engine's run. Raises RuntimeError with the end of its log where it failed."""
        paths = [self._folder / name for name in ("job.json", "result.json", "engine.log")]
        job_path, result, log = paths
        result.unlink(missing_ok=True)
        job_path.write_text(json.dumps(job))
        driver = self._driver({k: v for k, v in job["env"].items() if not k.startswith("LATENTWATCH_")})
        assert driver.stdin is not None and driver.stdout is not None
        driver.stdin.write(" ".join(map(str, paths)) + "\n")
        driver.stdin.flush()
        while driver.stdout.readline() not in ("done\n", ""):
            pass
        if not result.exists():
            raise RuntimeError(f"the engine failed:\n{log.read_text(errors='replace')[-5000:]}")
        return json.loads(result.read_text())

    def _driver(self, env: dict[str, str]) -> subprocess.Popen[str]:
        path = env.get("PYTHONPATH", "")
        if path not in self._processes:
            self._processes[path] = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.accounting.drive"],
                cwd=ROOT,
                env={**os.environ, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        return self._processes[path]

    def close(self) -> None:
        for process in self._processes.values():
            process.communicate()


def rows_of(engine: Engine, folder: Path, drivers: Drivers) -> list[dict[str, Any]]:
    """Run one engine with and without the monitor; one row per label of its workload."""
    model = models.checkpoint(engine.architecture, folder)
    watchlist_path = models.watchlist(engine.architecture, model)
    requests = engine.workload().requests
    cache = {"cold": folder / "cold", "stale": folder / "stale", "warm": cache_root()}[engine.cache]
    job = {
        "engine": {**SMALL, "model": str(model), **engine.arguments},
        "requests": [request.to_job() for request in requests],
        "adapters": {n: str(p) for n, p in models.adapters(model, engine.adapters).items()} if engine.adapters else {},
        "env": {**engine.env, "VLLM_CACHE_ROOT": str(cache)},
    }
    # First without: a stale graph is one that a server without the monitor left behind.
    off = drivers.run({**job, "env": {**job["env"], "LATENTWATCH_DISABLE": "1"}})
    with tempfile.TemporaryDirectory(prefix="lw") as short, RecordingCollector(Path(short) / "c.sock") as collector:
        watched = {"LATENTWATCH_WATCHLIST": str(watchlist_path), "LATENTWATCH_COLLECTOR": collector.target}
        on = drivers.run({**job, "env": {**job["env"], **watched}})
        collector.wait_closed(len(requests), seconds=60.0)
        sink = collector.sink
    identical = [r["outputs"] for r in on["requests"]] == [r["outputs"] for r in off["requests"]]
    accounts = _accounts(requests, on, sink, card.read(watchlist_path))
    refusal = _refusal(engine, sink)
    return [
        _row(engine, label, accounts_of_label, identical, refusal, on["metrics"], watchlist_path, model, len(requests))
        for label, accounts_of_label in accounts.items()
    ]


def _accounts(
    requests: list[Request], on: Any, sink: RecordingSink, watchlist: card.Watchlist
) -> dict[str, list[Account]]:
    """By label: every request of the run with what the collector was told of it."""
    scores = {int(name.partition("-")[0]): told for name, told in sink.requests(watchlist).items()}
    made: dict[str, list[Account]] = defaultdict(list)
    for i, (request, ran) in enumerate(zip(requests, on["requests"], strict=True)):
        computed = ran["computed"] if ran["aborted"] else len(request.prompt) + max(0, len(ran["outputs"]) - 1)
        made[request.label].append(Account(request, ran["outputs"], computed, ran["aborted"], scores[i]))
    return made


def _refusal(engine: Engine, sink: RecordingSink) -> str:
    """The reason with which the engine was not armed, "" where it was. It must be the one that the mode expects."""
    (text,) = {hello.not_armed_text for hello in sink.hellos}
    assert engine.refused in text and bool(engine.refused) == bool(text), f"{engine.name}: {text!r}"
    return text


def _row(
    engine: Engine,
    label: str,
    accounts: list[Account],
    identical: bool,
    refusal: str,
    metrics: dict[str, float],
    watchlist_path: Path,
    model: Path,
    of_run: int,
) -> dict[str, Any]:
    watchlist = card.read(watchlist_path)
    wrong = [found for account in accounts if (found := checks.unbalanced(account))]
    preempted = int(metrics.get("vllm:num_preemptions", 0))
    assert preempted or not engine.preempts, f"{engine.name}: nothing was preempted"
    errors = np.concatenate(
        [checks.score_errors(account, watchlist, _model_of(account, model)) for account in accounts]
    )
    row = {
        "mode": label or engine.name,
        "architecture": engine.architecture,
        "requests": len(accounts),
        "tokens": dict(sorted(checks.states(accounts).items())),
        "aborted": sum(account.aborted for account in accounts),
        "preemptions": preempted,
        "drafts_accepted": int(metrics.get("vllm:spec_decode_num_accepted_tokens", 0)),
        "i1_exact": not wrong,
        "i2_max_error": None if refusal else float(f"{errors.max():.2g}"),
        "i2_positions": len(errors),
        "i2_positions_beyond": int((errors > MAX_ERROR).sum()),
        "i3_identical": identical,
        "refused": refusal,
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(row), *wrong[:3], sep="\n  ", flush=True)
    return row


def _model_of(account: Account, model: Path) -> Path:
    adapter = account.request.adapter
    return models.adapters(model, (adapter,))[adapter] / "merged" if adapter else model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression over name/architecture")
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="accounting") as name:
        drivers = Drivers(Path(name))
        for engine in ENGINES:
            if not re.search(chosen.only, f"{engine.name}/{engine.architecture}"):
                continue
            try:
                rows += rows_of(engine, Path(name), drivers)
            except Exception:
                traceback.print_exc()
                failed.append(f"{engine.name}/{engine.architecture}")
        drivers.close()
    _write(rows)
    if failed:
        print("no result for", *failed, sep="\n  ")
    return int(bool(failed) or not all(passed(row) for row in rows))


def passed(row: dict[str, Any]) -> bool:
    """Whether all that holds for an engine that is armed holds in this row; of one that is refused, I1 and I3."""
    return bool(row["i1_exact"] and row["i3_identical"] and not row["i2_positions_beyond"])


def _write(rows: list[dict[str, Any]]) -> None:
    """Put rows into the result, in the place of older ones of the same mode and architecture."""
    import torch
    import transformers
    import vllm

    old = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    kept = {(row["mode"], row["architecture"]): row for row in [*old, *rows]}
    RESULT.write_text(
        json.dumps(
            {
                "what": "accounting in every engine mode: I1 sums, I2 scores against Hugging Face, I3 answers on = off",
                "date": datetime.date.today().isoformat(),
                "hardware": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
                "versions": {
                    "latentwatch": __version__,
                    "vllm": vllm.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "python": platform.python_version(),
                },
                "rows": list(kept.values()),
            },
            indent=1,
        )
        + "\n"
    )
    print(f"wrote {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
