"""An engine that has only the edge of one: a stand-in's steps through the real tap and ring, for the real exporter.

`python -m tests.chaos.engine CONFIG` runs steps until standard input says how to end: "stop" lets its requests run
out, "die" kills the process between two steps, "vanish" lets its requests run out and kills the exporter, once that has
read the ring, and itself. Each time it says what it computed, to be compared with what collectors counted. After "stop"
it keeps its exporter until another line of input comes.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import torch
from latentwatch.engines.vllm import exporter_process, step_tap
from latentwatch.engines.vllm.arming import ArmedHook
from latentwatch.engines.vllm.exporter_process import ExporterChild, RestartBackoff
from latentwatch.engines.vllm.kv_cache import KvCache
from latentwatch.engines.vllm.step_tap import StepTap
from latentwatch.facts import EngineIdentity
from latentwatch.handover.exporter_config import CachedBlocks, ExporterConfig, WatchedFeature
from latentwatch.handover.ring import Geometry, Ring
from latentwatch.names import Reason, Severity

from tests.chaos.scheduler import BLOCK, POOL, ROWS, Scheduler, Step, colour
from tests.chaos.stand_in import DENSE, HOOKS, SPARSE, Config
from tests.support import tiny

_COMPUTE = np.random.default_rng(0).random((192, 192), np.float32)
"""Multiplied with itself in each step: about a millisecond of work that the monitor might slow down."""
_CHECK_SECONDS = 0.02
_IDLE_SECONDS = 0.01


class Engine:
    """A scheduler's steps, one forward each."""

    def __init__(self, config: Config) -> None:
        geometry = Geometry(config.requests, config.slot_rows, SPARSE + DENSE, DENSE, HOOKS)
        self.ring = Ring.create(geometry)
        self.scheduler = Scheduler(config.requests, np.random.default_rng(config.seed or os.getpid()))
        self.computed_seconds = 0.0
        """What the model's part of the last step took: the monitor has no part in it."""
        path = Path(config.steps_file).with_suffix(".safetensors")
        watched = tiny.watchlist(path, layers=(1,), sparse=SPARSE, dense=DENSE)
        self._hook = ArmedHook(watched.hooks[0], torch.zeros(ROWS, SPARSE + DENSE), torch.zeros(ROWS, 3))
        self._hook.reset()
        cache = KvCache(group=0, blocks=POOL, block_size=BLOCK)
        step_tap.MAX_OWED = config.max_owed
        self._tap = StepTap(self.ring, (self._hook,), on_gpu=False, cache=cache)
        exporter_process.CHECK_SECONDS = _CHECK_SECONDS
        exporter_process.STUCK_SECONDS = config.stuck_seconds
        self._exporter = ExporterChild(self.ring, RestartBackoff(0.01, config.restart_seconds, 1.0))
        self._exporter.configure(
            ExporterConfig(
                engine_pid=os.getpid(),
                ring_fd=self.ring.fd,
                geometry=geometry,
                collector=config.collector,
                drafts=False,
                cached_reason=Reason.PREFIX_CACHE,
                cached_blocks=CachedBlocks(cache.blocks, cache.block_size),
                features=(WatchedFeature(Severity.WARNING, -math.inf, False),) * SPARSE
                + (WatchedFeature(Severity.CRITICAL, math.inf, True),) * DENSE,
                identity=EngineIdentity(
                    replica=config.replica,
                    boot_id=uuid.uuid4().hex,
                    engine="0",
                    model_name="chaos",
                    watchlist_sha256=config.watchlist_sha256,
                    armed=True,
                    not_armed_reason="",
                    not_armed_text="",
                    plugin_version="0",
                    engine_version="0",
                ),
            )
        )

    def step(self, *, admit: bool) -> bool:
        """One step; False where no other one follows, because none may begin."""
        began = time.monotonic()
        for _ in range(4):
            _COMPUTE @ _COMPUTE
        self.computed_seconds = time.monotonic() - began
        step = self.scheduler.step(admit=admit)
        if step is not None:
            self._forward(step)
            self._tap.after_step(step.runner, step.output)
        self._look_after_exporter()
        return admit or self.scheduler.busy

    def rest(self) -> None:
        """No more steps; what is still owed to the ring is handed over."""
        idle = Step.idle()
        while self._tap._owed:
            self._tap.after_step(idle.runner, idle.output)
            self._look_after_exporter()
            time.sleep(_IDLE_SECONDS)

    def wait(self, until: queue.Queue[str]) -> None:
        """Idle, with an exporter, until something is said."""
        while until.empty():
            self._look_after_exporter()
            self.rest()
            time.sleep(_IDLE_SECONDS)

    def close(self) -> None:
        """Let the exporter deliver what it can in the time that it has, and end."""
        self.ring.close()
        if self._exporter.process is not None:
            self._exporter.process.wait(60)

    def vanish(self) -> None:
        """Kill the exporter once it has read the ring, then this process."""
        while self.ring.reserve(leave_free=self.ring.slots - 2) is None:
            time.sleep(_IDLE_SECONDS)
        if self._exporter.process is not None:
            self._exporter.process.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    def _look_after_exporter(self) -> None:
        if self._exporter.restart_if_ended(time.monotonic()):
            self._tap.exporter_restarted()

    def _forward(self, step: Step) -> None:
        rows, acts = step.rows, self._hook.act_TK
        acts[:rows] = 0.0
        colour_T = colour(step.token_T, step.position_T)
        fires = np.flatnonzero(colour_T < SPARSE)
        acts[fires, colour_T[fires]] = 1.0
        acts[:rows, SPARSE:] = 0.5
        self._hook.stat_T3[:rows, 0] = 1.0


def listen(said: queue.Queue[str]) -> None:
    """What standard input says, line by line, and then that it ended."""
    while line := sys.stdin.readline():
        said.put(line.strip())
    said.put("")


def main() -> None:
    config = Config(**json.loads(sys.argv[1]))
    engine = Engine(config)
    said: queue.Queue[str] = queue.Queue()
    threading.Thread(target=listen, args=(said,), daemon=True).start()
    print("READY", flush=True)
    times: list[tuple[float, float, float]] = []
    admit, word, due = True, "", time.monotonic()
    while True:
        began = time.monotonic()
        went = engine.step(admit=admit)
        times.append((began, engine.computed_seconds, time.monotonic() - began))
        if not said.empty():
            word = said.get()
            if word == "die":
                break
            admit = False
        if not went:
            engine.rest()
            break
        due += 1 / config.steps_per_second
        time.sleep(max(0.0, due - time.monotonic()))
    np.save(Path(config.steps_file), np.array(times))
    handed = {
        "tokens": engine.scheduler.tokens,
        "fires": engine.scheduler.fires,
        "ended": engine.scheduler.told,
        "ring_dropped_steps": engine.ring.dropped_steps,
        "exporter_restarts": engine.ring.restarts,
    }
    print("DONE", json.dumps(handed), flush=True)
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "vanish":
        engine.vanish()
    engine.wait(said)
    engine.close()


if __name__ == "__main__":
    main()
