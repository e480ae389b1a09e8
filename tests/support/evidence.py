"""A core that writes evidence into a folder, and records made by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from latentwatch.collector.core import Core
from latentwatch.collector.evidence_buffer import EvidenceScope, watched
from latentwatch.evidence.records import FIRE_RECORD, Activations, Ended, Exceeded, Record, RecordedRequest, row_record
from latentwatch.evidence.store import Retention, Store
from latentwatch.facts import FEATURE_STAT, Exceedance, FeatureSummary, RequestInfo, RequestProgress
from latentwatch.names import Outcome, Phase
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


def records(
    requests: Sequence[Tokens], *, scope: EvidenceScope = "exceeded", schedule: Schedule | None = None
) -> list[Record]:
    """What a collector hands over of these requests."""
    found: list[Record] = []
    core = Core(watchlist(FEATURES), evidence=[found.extend], evidence_scope=scope)
    core.ingest.hello(hello(), NOW)
    batches = (schedule or Schedule.one_step(requests)).batches(FEATURES)
    for sequence, batch in enumerate(batches, start=1):
        core.ingest.observe(hello(), received(sequence, batch), NOW + sequence)
    return found


def one_request(
    number: int, *, request_id: str = "", seconds: float = NOW, activations: int = 50, exceedances: int = 1
) -> list[Record]:
    """A request by itself, with random activations."""
    rng = np.random.default_rng(number)
    named = request_id or f"chatcmpl-made-{number:012d}-0123abcd"
    info = RequestInfo(named, "pod-0/0", "toy", "0", seconds, opening_seen=True, prompt_tokens=10)
    info = replace(info, response_id=named.rpartition("-")[0])
    request = RecordedRequest(number, info)
    fires, rows = np.zeros(activations, FIRE_RECORD), np.zeros(activations, row_record(2))
    fires["position"] = rows["position"] = np.arange(activations)
    fires["value"], rows["score"] = rng.random(activations), rng.normal(0, 1, (activations, 2))
    exceeded: list[Record] = [
        Exceeded(request, Exceedance(feature % 2 * 2, Phase.OUTPUT, feature, 5.0 + feature, seconds + feature))
        for feature in range(exceedances)
    ]
    return [
        *exceeded,
        Activations(request, fires, rows),
        Ended(
            request,
            RequestProgress(Outcome.FINISHED, seconds + 9, np.array([0, 50, 0, 0, 0]), 41, 50),
            FeatureSummary(np.zeros(1, FEATURE_STAT), exceedances, 0),
            activations_lost=0,
        ),
    ]
