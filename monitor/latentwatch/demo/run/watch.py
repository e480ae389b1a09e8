"""What the demo reads from /metrics pages: the collector's while it runs, vLLM's own counts at the end.

A small reader of the Prometheus text format for a few names: the general parser takes longer over one page than the
demo's polling interval.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import httpx

POLL_SECONDS: Final = 0.05
"""How often the collector's /metrics is read; bounds how well seconds_to_metrics is known."""

_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPE: Final = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass(frozen=True)
class EngineTokens:
    """vLLM's own counters since it started, summed over engines."""

    prompt: int
    output: int
    finished: int

    @property
    def fed(self) -> int:
        """Tokens that went through the model: the last one of each finished request is never fed back."""
        return self.prompt + self.output - self.finished


@dataclass(frozen=True)
class Sample:
    """The collector's /metrics at one moment."""

    at: float
    """Seconds since the Unix epoch, when the page had been read."""
    states: Mapping[str, int] = field(default_factory=dict)
    """Tokens by state."""
    reasons: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Tokens by state and reason, where the reason is not "none"."""
    fired: Mapping[str, int] = field(default_factory=dict)
    """Tokens on which each feature fired."""
    exceeded: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Requests over the limit by feature and severity."""

    @property
    def tokens(self) -> int:
        return sum(self.states.values())

    @property
    def exceedances(self) -> int:
        return sum(self.exceeded.values())

    @property
    def critical(self) -> int:
        return sum(count for (_, severity), count in self.exceeded.items() if severity == "critical")


def series(text: str, *names: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of every sample with one of these names."""
    for line in text.splitlines():
        if line.startswith(names) and (match := _LINE.match(line)) and match[1] in names:
            labels = {key: _unescaped(value) for key, value in _LABEL.findall(match[2] or "")}
            yield match[1], labels, float(match[3])


def read_engine(text: str) -> EngineTokens:
    """vLLM's counts from its /metrics page."""
    totals: Counter[str] = Counter()
    wanted = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
    for name, _, value in series(text, *wanted):
        totals[name] += int(value)
    return EngineTokens(*(totals[name] for name in wanted))


def read_collector(text: str, at: float) -> Sample:
    """One moment of the collector's /metrics page."""
    states: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    fired: Counter[str] = Counter()
    exceeded: Counter[tuple[str, str]] = Counter()
    wanted = ("latentwatch_tokens_total", "latentwatch_feature_fired_tokens_total", "latentwatch_exceedances_total")
    for name, labels, value in series(text, *wanted):
        if name == "latentwatch_tokens_total":
            states[labels["state"]] += int(value)
            if labels["reason"] != "none":
                reasons[labels["state"], labels["reason"]] += int(value)
        elif name == "latentwatch_feature_fired_tokens_total":
            fired[labels["feature"]] += int(value)
        else:
            exceeded[labels["feature"], labels["severity"]] += int(value)
    return Sample(at, states, reasons, fired, exceeded)


class Watch:
    """Reads the collector's /metrics every POLL_SECONDS and keeps what it saw."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url
        self.samples: list[Sample] = []

    @property
    def last(self) -> Sample:
        return self.samples[-1] if self.samples else Sample(at=0.0)

    async def poll(self) -> None:
        """Read for ever; a reading that fails leaves a gap. Cancel to stop."""
        while True:
            # A collector that died is noticed by the process group, which has its log.
            with suppress(httpx.HTTPError):
                self.samples.append(await self.read())
            await asyncio.sleep(POLL_SECONDS)

    async def read(self) -> Sample:
        """One reading now. Raises httpx.HTTPError."""
        response = await self._client.get(f"{self._url}/metrics")
        return read_collector(response.text, time.time())


def _unescaped(value: str) -> str:
    return re.sub(r'\\[\\"n]', lambda found: _ESCAPE[found[0]], value)
