"""Grafana's boards on live data: a Prometheus that scrapes a collector and a gateway, through an incident."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.evidence import EvidenceSettings
from latentwatch.collector.service import CollectorSettings, ForwardSettings, Service
from latentwatch.drift.detection import Budget
from latentwatch.watchlist import file as watchlist_file

from tests.support.drift import random_baseline
from tests.support.engines import ROOT
from tests.support.live_page import Traffic, toy_watchlist
from tests.support.stack import ask, eventually, prometheus
from tests.support.streams import hello, received
from tests.support.wire import in_loop

BOARDS: Final[dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "dashboards/grafana").glob("*.json"))
}
"""By the file's name."""
WATCHED: Final = toy_watchlist(64)
SPARSE: Final = next(feature.id for feature in WATCHED.features if feature.limit and not feature.dense)
"""A dense feature has no firing rate."""


@contextlib.contextmanager
def live(folder: Path) -> Iterator[str]:
    """URL of a Prometheus that has scraped a collector under load, through an incident, for some seconds."""
    watched = watchlist_file.write(WATCHED, folder / "toy.safetensors")
    baseline = dataclasses.replace(
        random_baseline(WATCHED.features, sha256=watched.sha256), created_seconds=time.time() - 86_400
    )
    settings = CollectorSettings(
        folder / "toy.safetensors",
        (f"unix://{folder}/c.sock",),
        "127.0.0.1:0",
        state=folder / "state",
        evidence=EvidenceSettings(folder / "evidence"),
        drift=DriftSettings(baseline, Budget(window_seconds=1.0)),
        forward=ForwardSettings(f"unix://{folder}/g.sock", "pod-0"),
    )
    service = Service(settings)
    gateway = Service(CollectorSettings(folder / "toy.safetensors", (f"unix://{folder}/g.sock",), "127.0.0.1:0"))
    who = hello(model_name="llama", watchlist_sha256=watched.sha256)
    traffic = Traffic(watched, running=6)
    traffic.incident, traffic.cached_share = True, 0.3

    async def feed() -> None:
        for sequence, batch in enumerate(traffic.steps(), start=1):
            service.core.ingest.observe(who, received(sequence, batch), time.time())
            await asyncio.sleep(0.05)

    async def begin() -> asyncio.Task[None]:
        await gateway.start()
        await service.start()
        service.core.ingest.hello(who, time.time())
        return asyncio.create_task(feed())

    async def end(feeding: asyncio.Task[None]) -> None:
        feeding.cancel()
        await service.stop()
        await gateway.stop()

    feeding = in_loop(begin())
    targets = [made.http_url.removeprefix("http://") for made in (service, gateway)]
    try:
        # Slow enough for a machine that others use too.
        with prometheus(folder, {"latentwatch": targets}, interval="2s") as url:
            firing = 'ALERTS{alertname="LatentwatchCriticalExceedance",alertstate="firing"}'
            eventually(lambda: ask(url, "query", query=firing)["result"])
            yield url
    finally:
        in_loop(end(feeding))


def substituted(text: str, feature: str = SPARSE) -> str:
    """Grafana's macros and variables, as with everything chosen."""
    values = {
        "$__rate_interval": "10s",
        "$__range": "60s",
        "$job": "latentwatch",
        "$instance": ".*",
        "$model_name": ".*",
        "$feature": feature,
    }
    for name, value in values.items():
        text = text.replace(name, value)
    assert "$" not in text, text
    return text
