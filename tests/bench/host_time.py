"""Host time per engine step, without the op: `make bench-host-time` writes results/host-time.json.

Replays scheduler outputs with the fields and types of vLLM's: n requests decode, every sixteenth gets a KV block, one
ends and one begins. On the engine's thread that is the row map, the events and the hand-over to the ring; in the
exporter the decoding of the events, layout and ledger with their scores (1 % of 240 sparse features, 16 probes, 4 hook
points) and what is kept for the prefix cache. Medians over steps, so that a busy machine disturbs them less.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from latentwatch import __version__
from latentwatch.engines.vllm import request_ends
from latentwatch.engines.vllm.kv_cache import KvCache
from latentwatch.engines.vllm.step_tap import StepTap
from latentwatch.exporter.ledger import Ledger
from latentwatch.exporter.score_cache import ScoreCache
from latentwatch.handover.ring import Geometry, Ring
from latentwatch.step.batch import FIRE_DTYPE, EngineCounters

from tests.support.engines import ROOT

RESULT = ROOT / "tests/bench/results/host-time.json"
REQUESTS = (8, 64, 256)
STEPS = 400
WARM_UP = 50
PROMPT = 200
BLOCK_SIZE = 16
BLOCKS = 65536
SPARSE, DENSE, HOOKS, FIRING = 240, 16, 4, 0.01


class Scheduler:
    """Steps of `running` decoding requests, of which one ends and one begins each time."""

    def __init__(self, running: int) -> None:
        self._next = 0
        self._block = 0
        self._running: list[str] = []
        self._at: dict[str, int] = {}
        self._begun = [self._new() for _ in range(running)]

    def step(self) -> tuple[Any, Any]:
        """(SchedulerOutput, runner as it is right after the forward)."""
        new, self._begun = self._begun, [self._new()]
        ended = {self._running.pop(0): (16, False)} if self._running else {}
        cached, blocks = list(self._running), []
        for name in cached:
            self._at[name] += 1
            blocks.append(([self._take(1)[0]],) if self._at[name] % BLOCK_SIZE == 0 else None)
        self._running += [request.req_id for request in new]
        output = SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=cached,
                resumed_req_ids=set(),
                new_block_ids=blocks,
                num_computed_tokens=[self._at[name] for name in cached],
            ),
            finished_req_ids=set(ended),
            num_scheduled_tokens=dict.fromkeys(self._running, 1),
            total_num_scheduled_tokens=len(self._running),
        )
        setattr(output, request_ends.ATTRIBUTE, ended)
        batch = SimpleNamespace(
            req_ids=self._running,
            num_reqs=len(self._running),
            num_computed_tokens_cpu=np.array([self._at[name] for name in self._running], np.int32),
        )
        return output, SimpleNamespace(input_batch=batch, execute_model_state=None)

    def _new(self) -> Any:
        self._next += 1
        name = f"chatcmpl-{self._next:032x}-{self._next:08x}"
        # All but the last prompt token were found in the cache, so that every row of a step is one token.
        self._at[name] = PROMPT - 1 + self._next % BLOCK_SIZE
        return SimpleNamespace(
            req_id=name,
            prompt_token_ids=[0] * (self._at[name] + 1),
            num_computed_tokens=self._at[name],
            block_ids=(self._take(2 + PROMPT // BLOCK_SIZE),),
            lora_request=None,
            sampling_params=None,
        )

    def _take(self, count: int) -> list[int]:
        self._block += count
        return [(self._block - i) % BLOCKS for i in range(count)]


def scores(rng: np.random.Generator, rows: int) -> tuple[Any, Any, Any]:
    """Random activations, probe scores and norms of a step, as the ring holds them."""
    row, feature = np.nonzero(rng.random((rows, SPARSE)) < FIRING)
    fires = np.empty(len(row), FIRE_DTYPE)
    fires["row"], fires["feature"], fires["act"] = row, feature, 1.0
    return fires, rng.normal(size=(rows, DENSE)).astype(np.float16), np.ones((rows, HOOKS), np.float32)


def measure(running: int) -> dict[str, Any]:
    """One row: quantiles in microseconds."""
    geometry = Geometry(max_requests=1024, max_rows=2048, features=SPARSE + DENSE, dense=DENSE, hook_points=HOOKS)
    ring = Ring.create(geometry)
    reader = Ring(ring.fd, geometry, create=False)
    tap = StepTap(ring, (), on_gpu=False, cache=KvCache(group=0, blocks=BLOCKS, block_size=BLOCK_SIZE))
    kept = ScoreCache(blocks=BLOCKS, block_size=BLOCK_SIZE, dense=DENSE, hook_points=HOOKS)
    ledger = Ledger(armed=True, drafts=False, score_cache=kept)
    scheduler, rng = Scheduler(running), np.random.default_rng(0)
    # One after the other, as they are in processes of their own and do not share a cache line.
    engine, steps = [], []
    for _ in range(WARM_UP + STEPS):
        output, runner = scheduler.step()
        engine.append(_microseconds(lambda o=output, r=runner: tap.after_step(r, o)))
        raw = reader.peek()
        assert raw is not None
        steps.append(dataclasses.replace(raw, requests_Q=raw.requests_Q.copy()))
        reader.release()
    exporter = []
    for raw in steps:
        fires, dense, norm = scores(rng, raw.rows)
        told = dataclasses.replace(raw, scored_rows=raw.rows, fires_N=fires, dense_TP=dense, norm_TH=norm)
        exporter.append(_microseconds(lambda told=told: ledger.settle(told, EngineCounters())))
    row: dict[str, Any] = {"running_requests": running, "steps": STEPS}
    for name, values in (("engine", engine), ("exporter", exporter)):
        p20, p50, p80 = np.percentile(values[WARM_UP:], [20, 50, 80])
        quantiles = zip(("p20", "p50", "p80"), (p20, p50, p80), strict=True)
        row |= {f"{name}_us_{quantile}": round(float(value), 1) for quantile, value in quantiles}
    return row


def _microseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1000


def main() -> None:
    rows = [measure(running) for running in REQUESTS]
    for row in rows:
        print(row)
    RESULT.write_text(
        json.dumps(
            {
                "what": "host time per engine step without the op: engine thread, and exporter's layout and ledger",
                "date": datetime.date.today().isoformat(),
                "hardware": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
                "versions": {
                    "latentwatch": __version__,
                    "numpy": np.__version__,
                    "python": platform.python_version(),
                },
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"wrote {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
