"""A pipeline that writes evidence into a folder, and records made by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from latentwatch.collector.evidence_buffer import Keep, watched
from latentwatch.collector.pipeline import Pipeline
from latentwatch.evidence.records import FIRE_RECORD, Activations, Ended, Exceedance, Record, Request, row_record
from latentwatch.evidence.store import Retention, Store
from latentwatch.names import Outcome, Phase
from latentwatch.step.batch import FEATURE_DTYPE
from latentwatch.watchlist.file import Limit

from tests.support.streams import Schedule, Tokens, hello, probe, received, sparse, watchlist

FEATURES = (
    sparse("jailbreak", limit=Limit("max", 4.0)),
    sparse("weather"),
    probe("deceive", limit=Limit("rolling_mean", 0.5, 4)),
    probe("mood"),
)
NOW = 1_763_800_000.0  # 2025-11-22


@contextlib.contextmanager
def store(folder: Path, retention: Retention | None = None) -> Iterator[Store]:
    made = Store(folder, watched(watchlist(FEATURES)), retention or Retention())
    try:
        yield made
    finally:
        made.close()


def records(requests: Sequence[Tokens], *, keep: Keep = "exceeded", schedule: Schedule | None = None) -> list[Record]:
    """What a pipeline hands over of these requests."""
    found: list[Record] = []
    pipeline = Pipeline(watchlist(FEATURES))
    pipeline.record_to([found.extend], keep)
    pipeline.hello(hello(), NOW)
    batches = (schedule or Schedule.one_step(requests)).batches(FEATURES)
    for sequence, batch in enumerate(batches, start=1):
        pipeline.observe(hello(), received(sequence, batch), NOW + sequence)
    return found


def one_request(
    number: int, *, request_id: str = "", seconds: float = NOW, activations: int = 50, exceedances: int = 1
) -> list[Record]:
    """A request by itself, with random activations."""
    rng = np.random.default_rng(number)
    request = Request(
        key=number,
        request_id=request_id or f"chatcmpl-made-{number:012d}-0123abcd",
        replica="pod-0/0",
        model_name="toy",
        engine="0",
        adapter="",
        traceparent="",
        opened_seconds=seconds,
        opening_seen=True,
    )
    fires, rows = np.zeros(activations, FIRE_RECORD), np.zeros(activations, row_record(2))
    fires["position"] = rows["position"] = np.arange(activations)
    fires["value"], rows["score"] = rng.random(activations), rng.normal(0, 1, (activations, 2))
    crossed: list[Record] = [
        Exceedance(request, feature % 2 * 2, seconds + feature, feature, Phase.OUTPUT, 5.0 + feature)
        for feature in range(exceedances)
    ]
    return [
        *crossed,
        Activations(request, fires, rows),
        Ended(
            request,
            seconds + 9,
            Outcome.FINISHED,
            10,
            41,
            50,
            (50, 0, 0, 0),
            exceedances,
            np.zeros(1, FEATURE_DTYPE),
            0,
            0,
        ),
    ]
