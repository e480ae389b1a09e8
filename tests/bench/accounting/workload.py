"""Seeded random workloads: what each request asks, when it arrives, how it ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tests.support import tiny


@dataclass(frozen=True)
class Request:
    """One request of a script. Steps are the engine's, counted from the beginning of its wave."""

    prompt: list[int]
    max_tokens: int
    wave: int = 0
    """Waves run one after the other."""
    arrive: int = 0
    label: str = ""
    """Which row of the table it counts for."""
    stop: list[int] = field(default_factory=list)
    adapter: str = ""
    priority: int = 0
    abort_after_steps: int | None = None
    """Abort that many steps after it arrived, if the engine has computed anything of it by then."""
    abort_after_outputs: int | None = None

    def to_job(self) -> dict[str, Any]:
        return asdict(self)


class Workload:
    """A growing list of requests, wave by wave, from one generator."""

    def __init__(self, seed: int, vocabulary: int = tiny.VOCABULARY) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocabulary = vocabulary
        self.requests: list[Request] = []
        self._waves = 0

    def tokens(self, count: int) -> list[int]:
        """A random prompt of `count` tokens."""
        return [int(token) for token in self._rng.integers(3, self._vocabulary, size=count)]

    def wave(
        self,
        label: str,
        count: int,
        *,
        longest: int = 100,
        shortest: int = 3,
        prefix: list[int] | None = None,
        max_tokens: int = 16,
        per_step: float = 1.0,
        **more: Any,
    ) -> Workload:
        """Add a wave of `count` random requests; about `per_step` of them arrive at each step of the engine.

        Every other one may stop at a token, so that outputs have many lengths.
        """
        arrivals = np.floor(np.cumsum(self._rng.exponential(1 / per_step, size=count))).astype(int)
        for i, length in enumerate(self._rng.integers(shortest, longest + 1, size=count)):
            self.requests.append(
                Request(
                    prompt=[*(prefix or []), *self.tokens(int(length))],
                    max_tokens=int(self._rng.integers(1, max_tokens + 1)),
                    wave=self._waves,
                    arrive=int(arrivals[i]),
                    label=label,
                    stop=list(range(3, 60)) if i % 2 else [],
                    **more,
                )
            )
        self._waves += 1
        return self

    def vary(self, **choices: list[Any]) -> Workload:
        """Draw the named fields of the last wave's requests from lists."""
        self.requests = [
            replace(request, **{name: values[int(self._rng.integers(len(values)))] for name, values in choices.items()})
            if request.wave == self._waves - 1
            else request
            for request in self.requests
        ]
        return self
