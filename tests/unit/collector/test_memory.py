"""What one message costs a collector in memory and time, whatever its shape: it is worked on in slices."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from latentwatch.collector.core import Core
from latentwatch.errors import StreamRefused
from latentwatch.evidence.records import Record
from latentwatch.facts import FEATURE_STAT, RequestInfo, RequestProgress
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.step.batch import FIRE_DTYPE, SEGMENT_DTYPE, RequestClosed, RequestOpened, StepBatch
from latentwatch.transport import codec
from latentwatch.transport.report import Report, RequestRow
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport
from latentwatch.watchlist.file import Feature, Limit

from tests.support.streams import hello, probe, sparse, watchlist

MIB = 1 << 20
MEAN, MAXIMUM = Limit("rolling_mean", 0.5, 64), Limit("max", 0.5)
ROLLING = [sparse(f"f{i}", limit=MEAN) for i in range(96)]
RNG = np.random.default_rng(0)


def segments(handles: Sequence[int], count: int, state: TokenState = TokenState.SCORED) -> np.ndarray:
    made = np.zeros(len(handles), SEGMENT_DTYPE)
    made["handle"], made["count"], made["state"], made["phase"] = handles, count, state, Phase.PROMPT
    made["reason"] = Reason.NONE if state in (TokenState.SCORED, TokenState.INHERITED) else Reason.NOT_ARMED
    return made


def step(features: Sequence[Feature], segments_S: np.ndarray, fires: int = 0, **fields: object) -> StepBatch:
    """A step of these segments with random activations, one of each probe above its limit."""
    batch = StepBatch(1, 1, segments_S=segments_S)
    sparse_features = np.flatnonzero([not f.dense for f in features])
    chosen = np.sort(RNG.choice(batch.rows * len(sparse_features), fires, replace=False)) if fires else np.empty(0, int)
    fires_N = np.zeros(fires, FIRE_DTYPE)
    fires_N["row"] = chosen // max(1, len(sparse_features))
    fires_N["feature"] = sparse_features[chosen % max(1, len(sparse_features))] if fires else 0
    fires_N["act"] = 100.0
    return replace(
        batch,
        fires_N=fires_N,
        dense_RP=np.full((batch.rows, sum(f.dense for f in features)), 1.0, np.float16),
        norm_RH=np.ones((batch.rows, 1), np.float32),
        **fields,
    )


def opened(count: int) -> tuple[RequestOpened, ...]:
    return tuple(RequestOpened(i, f"chatcmpl-{i:032d}-0123abcd", 10) for i in range(1, count + 1))


class Measured:
    """A core with evidence and reports, what it takes to give it messages, and what its evidence was given."""

    def __init__(self, features: Sequence[Feature], *, forwards: bool = False) -> None:
        self.records = 0
        self.core = Core(
            watchlist(features),
            evidence=[self._count],
            evidence_scope="all",
            forward_boot_id="" if forwards else "0" * 32,
        )
        self.hello = hello(forwards=forwards)
        self.core.ingest.hello(self.hello, 1000.0)
        self._sequence = 0

    def _count(self, records: Sequence[Record]) -> None:
        self.records += len(records)
        assert len(records) <= 1024

    def give(self, data: Callable[[int], bytes]) -> tuple[float, float]:
        """MiB at the peak and seconds."""
        self._sequence += 1
        message = data(self._sequence)
        assert len(message) <= codec.MAX_MESSAGE_BYTES
        tracemalloc.start()
        try:
            began = time.perf_counter()
            received = codec.decode_request(message)
            if isinstance(received, ReceivedReport):
                self.core.ingest.merge(self.hello, received, 1000.0)
            else:
                assert isinstance(received, ReceivedBatch)
                self.core.ingest.observe(self.hello, received, 1000.0)
            self.core.ingest.tick(1001.0)
            return tracemalloc.get_traced_memory()[1] / MIB, time.perf_counter() - began
        finally:
            tracemalloc.stop()

    def batch(self, batch: StepBatch) -> tuple[float, float]:
        return self.give(lambda sequence: codec.encode_batch(sequence, batch))


def test_a_prefix_hit_of_128k_tokens_with_96_rolling_means_takes_some_mib_and_lets_the_loop_go_on():
    made = Measured(ROLLING)
    hit = segments([1], 131_072, TokenState.INHERITED)
    mib, seconds = made.batch(step(ROLLING, hit, 2_000, opened=opened(1)))
    assert mib < 50 and seconds < 10
    assert made.core.lookup.snapshot(0).engines[0].tokens[TokenState.INHERITED].sum() == 131_072


MANY_PROBES = [probe(f"p{i}", limit=MAXIMUM) for i in range(100)]
MANY_SPARSE = [sparse(f"s{i}", limit=MAXIMUM) for i in range(1024)]
SHAPES: dict[str, Callable[[], tuple[Sequence[Feature], StepBatch]]] = {
    "rows of one request, each with 96 rolling means": lambda: (
        ROLLING,
        step(ROLLING, segments([1], 1_000_000, TokenState.INHERITED), 5_000, opened=opened(1)),
    ),
    "rows of requests in turn": lambda: (
        ROLLING,
        step(ROLLING, segments([i % 4_000 + 1 for i in range(150_000)], 1), opened=opened(4_000)),
    ),
    "activations": lambda: (MANY_SPARSE, step(MANY_SPARSE, segments([1], 1_000), 400_000, opened=opened(1))),
    "exceedances of sparse features": lambda: (
        MANY_SPARSE,
        step(MANY_SPARSE, segments(range(1, 4_097), 1), 390_000),
    ),
    "exceedances of probes": lambda: (MANY_PROBES, step(MANY_PROBES, segments(range(1, 4_097), 1))),
    "requests that no opening told of": lambda: (
        ROLLING,
        step(ROLLING, segments(range(1, 200_001), 1, TokenState.UNSEEN)),
    ),
    "openings": lambda: (ROLLING, step(ROLLING, segments([], 0), opened=opened(55_000))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_message_of_any_shape_takes_less_than_its_bound(shape):
    features, batch = SHAPES[shape]()
    mib, seconds = Measured(features).batch(batch)
    assert mib < 250, f"{mib:.0f} MiB"
    assert seconds < 60, f"{seconds:.1f} s"


def test_four_thousand_requests_of_1024_features_that_end_together_are_closed_in_slices():
    made = Measured(MANY_SPARSE)
    made.batch(step(MANY_SPARSE, segments(range(1, 4_097), 1), 100_000, opened=opened(4_096)))
    ends = tuple(RequestClosed(i, "", 1, 1, 1, Outcome.FINISHED) for i in range(1, 4_097))
    mib, _ = made.batch(step(MANY_SPARSE, segments([], 0), closed=ends))
    assert mib < 250, f"{mib:.0f} MiB"


def test_more_events_than_an_honest_message_has_room_for_are_refused_before_they_are_unfolded():
    many = tuple(RequestOpened(1, "", 0) for _ in range(500_000))
    data = codec.encode_batch(1, StepBatch(1, 1, opened=many))
    progress = RequestProgress(None, 0.0, np.zeros(len(TokenState) + 1, np.int64))
    row = RequestRow(1, RequestInfo("", "", "", "", 0.0), progress, np.empty(0, FEATURE_STAT))
    report = codec.encode_report(1, Report(1, requests=(row,) * 66_000))
    del many
    for message in (data, report):
        assert len(message) <= codec.MAX_MESSAGE_BYTES
        tracemalloc.start()
        try:
            with pytest.raises(StreamRefused, match="more than 65536") as refused:
                codec.decode_request(message)
            assert refused.value.reason == "malformed_batch"
            assert tracemalloc.get_traced_memory()[1] < 20 * MIB
        finally:
            tracemalloc.stop()
