"""A scheduler with the edge of vLLM's: chunked prefills, prefix cache, preemption, aborts, rows past a request's end.

What it did is known exactly: positions of each request, and which features fire there, a function of token and
position alone, so that what is inherited fires as what was computed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.chaos.stand_in import SPARSE
from tests.support.fake_model import scheduled

BLOCK = 4
POOL = 160
ROWS = 48
"""Of a step."""
_PROMPTS = 3
_COLOURS = 37
"""More than there are features: some rows fire nothing."""


def colour(token: Any, position: Any) -> Any:
    """The feature that fires there, where there is one of that number."""
    return (7 * token + position) % _COLOURS


@dataclass
class Running:
    """One request, from its arrival on."""

    name: str
    tokens: list[int]
    prompt: int
    want: int
    runs_over: bool
    """One row is computed past its end, as asynchronous scheduling does."""
    at: int = 0
    reached: int = 0
    """First position that was never computed, nor found in the cache."""
    blocks: list[int] = field(default_factory=list)
    announced: bool = False
    done: bool = False

    @property
    def output(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def total(self) -> int:
        """Positions that count, once it has ended."""
        return len(self.tokens) - 1 if self.output else self.reached


@dataclass
class Step:
    """One step as the worker sees it."""

    output: Any
    runner: Any
    token_T: Any
    position_T: Any

    @classmethod
    def idle(cls) -> Step:
        """One that nothing is in."""
        batch = SimpleNamespace(req_ids=[], num_reqs=0, num_computed_tokens_cpu=np.empty(0, np.int32))
        runner = SimpleNamespace(input_batch=batch, execute_model_state=None)
        return cls(scheduled({}), runner, np.empty(0, np.int64), np.empty(0, np.int64))

    @property
    def rows(self) -> int:
        return len(self.token_T)


class Scheduler:
    """Up to `requests` at a time."""

    def __init__(self, requests: int, rng: np.random.Generator) -> None:
        self._requests = requests
        self._rng = rng
        self._families = [rng.integers(0, 999, size=24).tolist() for _ in range(_PROMPTS)]
        self._free = deque(range(POOL))
        self._users = np.zeros(POOL, int)
        self._cached: dict[tuple[int, ...], int] = {}
        self._key_of: dict[int, tuple[int, ...]] = {}
        self._live: list[Running] = []
        self._every: dict[str, Running] = {}
        self._ended: dict[str, tuple[int, bool]] = {}
        self._untold: list[Running] = []
        self._arrived = 0
        self.told = self._told_tokens = self._told_fires = 0

    def step(self, *, admit: bool) -> Step | None:
        """What runs next; None where nothing does this time, and there is nothing to say."""
        self._end_some()
        while admit and len(self._live) < self._requests:
            self._arrive()
        counts: dict[str, int] = {}
        starts: dict[str, int] = {}
        told: dict[str, Any] = {"new": [], "blocks": {}, "hits": {}, "resumed": set()}
        tokens: list[int] = []
        positions: list[int] = []
        for request in self._live:
            if request.blocks and self._rng.random() < 0.02 and not request.done:
                self._release(request)
                request.at = 0
            if ROWS - len(tokens) < 2 or self._rng.random() < 0.05:
                continue
            rows = self._schedule(request, ROWS - len(tokens), told)
            if rows:
                start = request.at - rows
                counts[request.name], starts[request.name] = rows, start
                tokens += request.tokens[start : start + rows]
                positions += range(start, start + rows)
                self._sample(request)
        finished, self._ended = self._ended, {}
        if not counts and not finished:
            return None
        for request in self._untold:
            self.told += 1
            self._told_tokens += request.total
            self._told_fires += _fires(request, request.total)
        self._untold = []
        batch = SimpleNamespace(
            req_ids=list(counts),
            num_reqs=len(counts),
            num_computed_tokens_cpu=np.array([starts[name] for name in counts], np.int32),
        )
        return Step(
            scheduled(counts, finished=finished, **told),
            SimpleNamespace(input_batch=batch, execute_model_state=None),
            np.array(tokens, np.int64),
            np.array(positions, np.int64),
        )

    @property
    def busy(self) -> bool:
        """Whether a request is open, or its end was not told yet."""
        return bool(self._live or self._ended)

    def token(self, name: str, position: int) -> int:
        """What stands there in this request."""
        return self._every[name].tokens[position]

    @property
    def tokens(self) -> int:
        """Positions that were computed or found in the cache: of those whose end was told, those that count."""
        return self._told_tokens + sum(request.reached for request in (*self._untold, *self._live))

    @property
    def fires(self) -> int:
        """Activations on them."""
        return self._told_fires + sum(_fires(request, request.reached) for request in (*self._untold, *self._live))

    def _end_some(self) -> None:
        for request in list(self._live):
            if request.done or (request.announced and self._rng.random() < 0.005):
                self._live.remove(request)
                self._release(request)
                self._ended[request.name] = (request.output, not request.done)
                self._untold.append(request)

    def _arrive(self) -> None:
        rng = self._rng
        self._arrived += 1
        family = self._families[int(rng.integers(_PROMPTS))]
        tokens = family[: int(rng.integers(0, 25))] + rng.integers(0, 999, size=rng.integers(1, 12)).tolist()
        name = f"chatcmpl-{self._arrived}-0123abcd"
        request = Running(name, tokens, len(tokens), int(rng.integers(1, 40)), bool(rng.random() < 0.5))
        self._live.append(request)
        self._every[name] = request

    def _schedule(self, request: Running, room: int, told: dict[str, Any]) -> int:
        """Rows of the request in this step; `at` is moved behind them."""
        fresh = not request.blocks
        if fresh:
            self._hit(request)
        hits = request.at
        count = min(len(request.tokens) - request.at, room, int(self._rng.integers(1, 17)))
        before = 0 if fresh else len(request.blocks)
        need = -(-(request.at + count) // BLOCK) - len(request.blocks)
        if need > len(self._free):
            self._release(request)
            request.at = 0
            return 0
        for _ in range(need):
            block = self._free[0]
            self._cached.pop(self._key_of.pop(block, ()), None)
            self._use(block)
            request.blocks.append(block)
        if fresh and request.announced:
            told["resumed"].add(request.name)
        if not request.announced:
            request.announced = True
            told["new"].append((request.name, request.prompt))
        if fresh:
            told["hits"][request.name] = hits
        if fresh or need > 0:
            told["blocks"][request.name] = request.blocks[before:]
        request.at += count
        request.reached = max(request.reached, request.at)
        return count

    def _hit(self, request: Running) -> None:
        while (len(request.blocks) + 1) * BLOCK < len(request.tokens):
            block = self._cached.get(tuple(request.tokens[: (len(request.blocks) + 1) * BLOCK]))
            if block is None:
                break
            self._use(block)
            request.blocks.append(block)
        request.at = len(request.blocks) * BLOCK

    def _sample(self, request: Running) -> None:
        # As vLLM: a block is in the cache as soon as it is scheduled to be full.
        for i in range(request.at // BLOCK):
            key = tuple(request.tokens[: (i + 1) * BLOCK])
            if key not in self._cached and request.blocks[i] not in self._key_of:
                self._cached[key] = request.blocks[i]
                self._key_of[request.blocks[i]] = key
        if request.at < len(request.tokens):
            return
        if request.output < request.want:
            request.tokens.append(int(self._rng.integers(0, 999)))
            if request.output < request.want or request.runs_over:
                return
        request.done = True

    def _use(self, block: int) -> None:
        if not self._users[block]:
            self._free.remove(block)
        self._users[block] += 1

    def _release(self, request: Running) -> None:
        for block in reversed(request.blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)
        request.blocks = []


def _fires(request: Running, stop: int) -> int:
    tokens = np.array(request.tokens[:stop], np.int64)
    return int((colour(tokens, np.arange(len(tokens))) < SPARSE).sum())
