"""Every mode of the engine against the three invariants: `make bench-accounting` writes results/accounting.json.

Some engines run at a time, each in processes of its own with a time limit. One that fails is a row that fails, and the
others go on; the result is written after each. A whole run begins with an empty table, `--only` adds to the one there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch import __version__
from latentwatch.step.batch import RequestOpened
from latentwatch.watchlist import file as watchlist_file

from tests.bench.accounting import checks, models
from tests.bench.accounting.checks import Account
from tests.bench.accounting.drive import COUNTERS
from tests.bench.accounting.modes import ENGINES, SMALL, Engine
from tests.bench.accounting.workload import Request
from tests.support import server
from tests.support.engines import ROOT, cache_root
from tests.support.recording import RecordingCollector, RecordingSink

RESULT = ROOT / "tests/bench/results/accounting.json"
LIMIT_SECONDS = 400.0
"""For one engine from its start to its end; a busy machine takes two minutes for the longest."""
PREEMPTIONS, DRAFTED, ACCEPTED = COUNTERS
_ORACLE = threading.Lock()
"""Hugging Face's models are kept between requests, with hooks that belong to one forward at a time."""
MAX_ERROR = 2e-3
"""Largest error of a score that counts as right: dense scores travel as float16, whose resolution is 1e-3."""


class Drivers:
    """Processes that run engines, one at a time each. Those of one environment are alike: PYTHONPATH and what vLLM
    reads at its import are the driver's own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, list[subprocess.Popen[str]]] = defaultdict(list)

    def run(self, job: dict[str, Any], folder: Path, seconds: float) -> Any:
        """One engine's run. Raises RuntimeError with the end of its log where it failed or took longer."""
        paths = [folder / name for name in ("job.json", "result.json", "engine.log")]
        job_path, result, log = paths
        result.unlink(missing_ok=True)
        job_path.write_text(json.dumps(job))
        own = ("LATENTWATCH_", "VLLM_CACHE_ROOT")
        key = json.dumps({name: value for name, value in job["env"].items() if not name.startswith(own)})
        with self._lock:
            driver = self._idle[key].pop() if self._idle[key] else _driver(json.loads(key))
        assert driver.stdin is not None and driver.stdout is not None
        driver.stdin.write(" ".join(map(str, paths)) + "\n")
        driver.stdin.flush()
        with _Limit(seconds, driver):
            while (line := driver.stdout.readline()) not in ("done\n", ""):
                pass
        if line:
            with self._lock:
                self._idle[key].append(driver)
        if not result.exists():
            why = "failed" if line else f"was ended after {seconds:.0f} s"
            raise RuntimeError(f"the engine {why}:\n{log.read_text(errors='replace')[-5000:]}")
        return json.loads(result.read_text())

    def close(self) -> None:
        for process in (process for idle in self._idle.values() for process in idle):
            process.communicate()


def _driver(env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.bench.accounting.drive"],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


class _Limit:
    """Ends a process and all that it started when the `with` lasts too long."""

    def __init__(self, seconds: float, process: subprocess.Popen[str]) -> None:
        self._timer = threading.Timer(seconds, self._end, [process.pid])

    @staticmethod
    def _end(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()


def rows_of(engine: Engine, shared: Path, folder: Path, drivers: Drivers) -> list[dict[str, Any]]:
    """Run one engine with and without the monitor; one row per label of its workload.

    Args: shared: where the checkpoints lie.   folder: of this run alone.
    """
    model = models.checkpoint(engine.architecture, shared)
    watchlist_path = models.watchlist(engine.architecture, model)
    requests = engine.workload().requests
    adapters = models.adapters(model, engine.adapters) if engine.adapters else {}
    cache = shared / engine.cache if engine.cache else cache_root()
    job = {
        "engine": {**SMALL, "model": str(model), **engine.arguments},
        "requests": [request.to_job() for request in requests],
        "adapters": {name: str(path) for name, path in adapters.items()},
        "keep_async": engine.keep_async,
        # Not pinned to cores: engines share those of the machine, and two ranks have but one NUMA node.
        "env": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **engine.env, "VLLM_CACHE_ROOT": str(cache)},
    }

    def run(env: dict[str, str], collector: RecordingCollector | None = None, **changes: Any) -> Any:
        changed = {**job, "env": {**job["env"], **env}, **changes}
        if not engine.served:
            return drivers.run(changed, folder, LIMIT_SECONDS)
        told = (lambda: collector.wait_closed(len(requests), seconds=60.0)) if collector else (lambda: None)
        return server.run(changed, folder, LIMIT_SECONDS, told)

    # First without: a stale graph is one that a server without the monitor left behind.
    off = run({"LATENTWATCH_DISABLE": "1"})
    with tempfile.TemporaryDirectory(prefix="lw") as short, RecordingCollector(Path(short) / "c.sock") as collector:
        watched = {"LATENTWATCH_WATCHLIST": str(watchlist_path), "LATENTWATCH_COLLECTOR": collector.target}
        on = run(watched, collector)
        collector.wait_closed(len(requests), seconds=60.0)
        sink = collector.sink
    if engine.says:
        assert engine.says in (folder / "engine.log").read_text(errors="replace"), f"its log does not say {engine.says}"
    if engine.plain_fault:
        alone = run(
            {"LATENTWATCH_DISABLE": "1"},
            requests=[{**request.to_job(), "wave": i, "arrive": 0} for i, request in enumerate(requests)],
        )
        assert _answers(alone) != _answers(off), "alone or together the answers are the same: compare the scores"
    identical = {request.label: True for request in requests}
    for request, with_monitor, without in zip(requests, _answers(on), _answers(off), strict=True):
        identical[request.label] &= with_monitor == without
    accounts = _accounts(requests, on, sink, watchlist_file.read(watchlist_path))
    _check_occurred(engine, on, sink, [account for label in accounts.values() for account in label])
    refusal = _refusal(engine, sink)
    return [
        _row(engine, label, of_label, on, identical[label], refusal, watchlist_file.read(watchlist_path), model)
        for label, of_label in accounts.items()
    ]


def _answers(result: Any) -> list[Any]:
    """Tokens of each request, and its embedding from a pooling model."""
    return [(request["outputs"], request.get("embedding")) for request in result["requests"]]


def _accounts(
    requests: list[Request], on: Any, sink: RecordingSink, watchlist: watchlist_file.Watchlist
) -> dict[str, list[Account]]:
    """By label: every request of the run with what the collector was told of it."""
    scores = {_index(told.opened): told for told in sink.requests(watchlist).values()}
    made: dict[str, list[Account]] = defaultdict(list)
    for i, (request, ran) in enumerate(zip(requests, on["requests"], strict=True)):
        computed = ran.get("computed") if ran["aborted"] else len(request.prompt) + max(0, len(ran["outputs"]) - 1)
        made[request.label].append(Account(request, ran["outputs"], computed, ran["aborted"], scores[i]))
    return made


def _index(opened: RequestOpened) -> int:
    """Ours, from what a request is called: the script names it so, and a client in X-Request-Id."""
    return int((opened.response_id or opened.request_id).removeprefix("cmpl-").partition("-")[0])


def _check_occurred(engine: Engine, on: Any, sink: RecordingSink, accounts: list[Account]) -> None:
    """Whether the mode was what it says. Raises AssertionError."""
    metrics = on["metrics"]
    assert metrics.get(PREEMPTIONS) or not engine.preempts, "nothing was preempted"
    accepted, drafted = (int(metrics.get(name, 0)) for name in (ACCEPTED, DRAFTED))
    assert not engine.drafts or min(accepted, drafted - accepted) > 100, f"{accepted} of {drafted} drafts accepted"
    surplus = max((batch.counters.surplus_tokens for batch in sink.batches if batch.counters), default=0)
    assert surplus or not engine.keep_async, "no row was computed past an end: is the scheduling asynchronous?"
    assert sink.errors == []
    assert (
        len({account.scores.engine for account in accounts}) == len({h.engine for h in sink.hellos}) == engine.engines
    )
    if engine.served:
        for i, (account, answer) in enumerate(zip(accounts, on["requests"], strict=True)):
            assert account.scores.opened.response_id == answer["response_id"], f"request {i}"
            assert account.scores.opened.traceparent == server.traceparent(i), f"request {i}"
        first = [account.scores.closed for account in accounts if account.request.wave == 0]
        told, counted = sum(closed.total_tokens + 1 for closed in first if closed), sum(metrics.values())
        assert told == counted, f"{told} tokens told, vLLM counts {counted}"


def _refusal(engine: Engine, sink: RecordingSink) -> str:
    """The reason with which the engine was not armed, "" where it was. It must be the one that the mode expects."""
    (text,) = {hello.not_armed_text for hello in sink.hellos}
    assert engine.refused in text and bool(engine.refused) == bool(text), f"{engine.name}: {text!r}"
    return text


def _row(
    engine: Engine,
    label: str,
    accounts: list[Account],
    on: Any,
    identical: bool,
    refusal: str,
    watchlist: watchlist_file.Watchlist,
    model: Path,
) -> dict[str, Any]:
    wrong = [found for account in accounts if (found := checks.unbalanced(account))]
    compared = [] if engine.plain_fault else accounts
    with _ORACLE:
        errors = np.concatenate(
            [np.empty(0), *(checks.score_errors(account, watchlist, _model_of(account, model)) for account in compared)]
        )
    states = checks.states(accounts)
    assert not refusal or list(states) == ["unseen/not_armed"], f"refused, and yet {states}"
    metrics = on["metrics"]
    row = {
        "mode": label or engine.name,
        "architecture": engine.architecture,
        "requests": len(accounts),
        "tokens": dict(sorted(states.items())),
        "aborted": sum(account.aborted for account in accounts),
        "preemptions": int(metrics.get(PREEMPTIONS, 0)),
        "drafts_accepted": int(metrics.get(ACCEPTED, 0)),
        "drafts_rejected": int(metrics.get(DRAFTED, 0) - metrics.get(ACCEPTED, 0)),
        "i1_exact": not wrong,
        "i2_max_error": float(f"{errors.max():.2g}") if len(errors) else None,
        "i2_positions": len(errors),
        "i2_positions_beyond": int((errors > MAX_ERROR).sum()),
        "i3_identical": identical,
        "refused": refusal,
        "note": engine.note or engine.plain_fault,
        "failed": "; ".join(wrong[:3]),
        "date": datetime.date.today().isoformat(),
    }
    return row


def _failure(engine: Engine, error: Exception) -> dict[str, Any]:
    """The row of an engine that gave none."""
    return {
        "mode": engine.name,
        "architecture": engine.architecture,
        "requests": 0,
        "tokens": {},
        "i1_exact": False,
        "i2_max_error": None,
        "i2_positions_beyond": 0,
        "i3_identical": False,
        "refused": "",
        "note": "",
        "failed": f"{type(error).__name__}: {str(error)[-300:]}",
        "date": datetime.date.today().isoformat(),
    }


def _model_of(account: Account, model: Path) -> Path:
    adapter = account.request.adapter
    return models.adapters(model, (adapter,))[adapter] / "merged" if adapter else model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression over name/architecture")
    parser.add_argument("--at-once", type=int, default=2, help="engines that run at a time")
    chosen = parser.parse_args()
    engines = [engine for engine in ENGINES if re.search(chosen.only, f"{engine.name}/{engine.architecture}")]
    groups = [list(group) for _, group in groupby(engines, key=lambda engine: engine.cache or id(engine))]
    old = json.loads(RESULT.read_text())["rows"] if chosen.only and RESULT.exists() else []
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    with ExitStack() as stack:
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="accounting")))
        # Made here, one after the other: what runs at once only reads them.
        for engine in engines:
            model = models.checkpoint(engine.architecture, shared)
            models.watchlist(engine.architecture, model)
            if engine.adapters:
                models.adapters(model, engine.adapters)
        pool = stack.enter_context(ThreadPoolExecutor(chosen.at_once))
        drivers = Drivers()
        for done in as_completed([pool.submit(_rows_of_group, group, shared, drivers) for group in groups]):
            for row in done.result():
                print(
                    f"{time.monotonic() - began:5.0f} s {'pass' if passed(row) else 'FAIL'}",
                    json.dumps(row),
                    flush=True,
                )
                rows.append(row)
            _write([*old, *rows])
        drivers.close()
    print(f"wrote {RESULT.relative_to(ROOT)}")
    return int(not rows or not all(passed(row) for row in rows))


def _rows_of_group(group: Iterable[Engine], shared: Path, drivers: Drivers) -> list[dict[str, Any]]:
    """The rows of engines that run one after the other."""
    rows: list[dict[str, Any]] = []
    for engine in group:
        try:
            with tempfile.TemporaryDirectory(prefix="engine") as folder:
                rows += rows_of(engine, shared, Path(folder), drivers)
        except Exception as error:
            # Whatever it is, it is this mode's result; the others go on.
            traceback.print_exc()
            rows.append(_failure(engine, error))
    return rows


def passed(row: dict[str, Any]) -> bool:
    """Whether all that holds for an engine that is armed holds in this row; of one that is refused, I1 and I3."""
    return bool(row["i1_exact"] and row["i3_identical"] and not row["i2_positions_beyond"])


def _write(rows: list[dict[str, Any]]) -> None:
    """Write the result, in the order of the table; of one mode and architecture the last row."""
    import torch
    import transformers
    import vllm

    kept = {(row["mode"], row["architecture"]): row for row in rows}
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
                "rows": [kept[key] for key in sorted(kept, key=lambda key: (not key[1].startswith("Llama"), key))],
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
