"""An engine that has only the edge of one: steps of made-up scores into the real ring, for the real exporter.

`python -m tests.chaos.engine CONFIG` runs steps until standard input says how to end: "stop" lets its requests run
out, "die" kills the process between two steps, "vanish" lets its requests run out and kills the exporter, once that has
read the ring, and itself. Each time it says what it handed over, to be compared with what collectors counted. After
"stop" it keeps its exporter until another line of input comes.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch.engines.vllm.exporter_process import ExporterChild
from latentwatch.facts import EngineIdentity
from latentwatch.handover.events import Closed, Opened, encode_events
from latentwatch.handover.exporter_config import ExporterConfig, WatchedFeature
from latentwatch.handover.ring import REQUEST_DTYPE, Geometry, Ring
from latentwatch.names import Reason, Severity

PROMPT_TOKENS = 8
SPARSE, DENSE, HOOKS = 32, 1, 1
FIRING_RATE = 0.05
_COMPUTE = np.random.default_rng(0).random((192, 192), np.float32)
"""Multiplied with itself in each step: about a millisecond of work that the monitor might slow down."""


@dataclass(frozen=True)
class Config:
    """What one engine process is told."""

    collector: str
    watchlist_sha256: str
    steps_file: str
    """Where the times of its steps go: float64 [steps, 3], seconds: begin, the model's part, the whole."""
    replica: str = "chaos/0"
    requests: int = 8
    steps_per_second: float = 100.0


class Engine:
    """Requests of a fixed prompt and growing lengths, one row a step once their prompt is in."""

    def __init__(self, config: Config) -> None:
        geometry = Geometry(config.requests, config.requests * PROMPT_TOKENS, SPARSE + DENSE, DENSE, HOOKS)
        self.ring = Ring.create(geometry)
        self.tokens = self.fires = self.closed = 0
        self.computed_seconds = 0.0
        """What the model's part of the last step took: the monitor has no part in it."""
        self._rng = np.random.default_rng(os.getpid())
        self._handles = self._step = 0
        self._owed: list[Opened | Closed] = []
        self._position = np.zeros(config.requests, np.int64)
        self._end = np.zeros(config.requests, np.int64)
        self._exporter = ExporterChild(self.ring)
        self._exporter.configure(
            ExporterConfig(
                engine_pid=os.getpid(),
                ring_fd=self.ring.fd,
                geometry=geometry,
                collector=config.collector,
                drafts=False,
                cached_reason=Reason.PREFIX_CACHE,
                cached_blocks=None,
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
        """One forward of every open request; False where none is left and none may begin."""
        began = time.monotonic()
        for _ in range(4):
            _COMPUTE @ _COMPUTE
        self.computed_seconds = time.monotonic() - began
        for slot in np.flatnonzero((self._end > 0) & (self._position >= self._end)).tolist():
            self._owed.append(Closed(slot, int(self._end[slot]) - PROMPT_TOKENS + 1, False))
            self._end[slot] = 0
            self.closed += 1
        for slot in np.flatnonzero(self._end == 0).tolist() if admit else ():
            self._handles += 1
            name = f"chatcmpl-{self._handles}-0123abcd"
            self._owed.append(Opened(slot, self._handles, name, PROMPT_TOKENS, 0, False, "", ""))
            self._position[slot], self._end[slot] = 0, PROMPT_TOKENS + 5 + self._handles % 40
        running = np.flatnonzero(self._end > 0)
        count = np.where(self._position[running] == 0, PROMPT_TOKENS, 1)
        rows = int(count.sum())
        if rows or self._owed:
            self._hand_over(running, count, rows)
        self._position[running] += count
        self.tokens += rows
        self._step += rows > 0
        self._exporter.restart_if_ended(time.monotonic())
        return bool(rows)

    def rest(self) -> None:
        """No more steps; the last ones are settled."""
        while self._owed:
            self._hand_over(np.empty(0, np.int64), np.empty(0, np.int64), 0)
            time.sleep(0.01)

    def close(self) -> None:
        """Let the exporter deliver what it can in the time that it has, and end."""
        self.ring.close()
        self._exporter.process.wait(60)

    @property
    def exporter(self) -> int:
        """Its process."""
        return self._exporter.process.pid

    def vanish(self) -> None:
        """Kill the exporter once it has read the ring, then this process."""
        while self.ring.reserve(leave_free=self.ring.slots - 1) is None:
            time.sleep(0.01)
        self._exporter.process.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    def _hand_over(self, running: Any, count: Any, rows: int) -> None:
        slot = self.ring.reserve(leave_free=2 if rows else 0)
        if slot is None:
            self.ring.count_dropped()
            return
        events = encode_events(self._owed)
        self._owed = []
        slot.events[: len(events)] = np.frombuffer(events, np.uint8)
        slot.requests_Q[: len(running)] = np.rec.fromarrays(
            (running, self._position[running], count), dtype=REQUEST_DTYPE
        )
        row, feature = np.nonzero(self._rng.random((rows, SPARSE)) < FIRING_RATE)
        fires = slot.fires_N[: len(row)]
        fires["row"], fires["feature"], fires["act"] = row, feature, 1.0
        slot.dense_TP[:rows] = 0.5
        slot.norm_TH[:rows] = 1.0
        self.ring.commit(
            slot,
            step=self._step + 1,
            time_unix_nano=time.time_ns(),
            requests=len(running),
            rows=rows,
            scored_rows=rows,
            fires=len(row),
            silent=False,
            events=len(events),
        )
        self.fires += len(row)


def main() -> None:
    config = Config(**json.loads(sys.argv[1]))
    engine = Engine(config)
    said: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: said.put(sys.stdin.readline().strip()), daemon=True).start()
    print("READY", engine.exporter, flush=True)
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
        "tokens": engine.tokens,
        "fires": engine.fires,
        "closed": engine.closed,
        "ring_dropped_steps": engine.ring.dropped_steps,
    }
    print("DONE", json.dumps(handed), flush=True)
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "vanish":
        engine.vanish()
    sys.stdin.readline()
    engine.close()


def arguments(config: Config) -> list[str]:
    """The command line of an engine process."""
    return [sys.executable, "-m", "tests.chaos.engine", json.dumps(asdict(config))]


if __name__ == "__main__":
    main()
