"""From the tap over ring, exporter and wire to the collector's state: what a request brings costs no other request
its monitoring."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from latentwatch.client_ids import bounded_id
from latentwatch.engines.vllm import trace_context
from latentwatch.engines.vllm.step_tap import StepTap
from latentwatch.exporter.ledger import Ledger
from latentwatch.handover.ring import Geometry, Ring
from latentwatch.step.batch import EngineCounters, StepBatch
from latentwatch.transport import codec
from latentwatch.transport.sink import ReceivedBatch

from tests.support.fake_model import scheduled

ANY_TEXT = st.text(st.characters(codec=None), max_size=20) | st.text("\u4e00\ud800x", min_size=250, max_size=9000)
EXTRA = st.none() | st.dictionaries(
    st.sampled_from((trace_context.KEY, trace_context.RESPONSE_KEY, trace_context.UNTRACED_KEY, "kv_transfer_params")),
    ANY_TEXT | st.integers() | st.none() | st.lists(st.integers(), max_size=3) | st.floats(),
)
NOT_EXTRA = st.integers() | ANY_TEXT | st.lists(st.integers(), max_size=3)


def runner(starts: dict[str, int]) -> Any:
    at = np.array([*starts.values(), 0], np.int32)
    batch = SimpleNamespace(req_ids=list(starts), num_reqs=len(starts), num_computed_tokens_cpu=at)
    return SimpleNamespace(input_batch=batch, execute_model_state=None)


def delivered(steps: list[tuple[dict[str, int], Any]]) -> list[StepBatch]:
    """What a collector reads off the wire after these steps."""
    ring = Ring.create(Geometry(max_requests=8, max_rows=32, features=1, dense=0, hook_points=1))
    tap, ledger, batches = StepTap(ring, (), on_gpu=False), Ledger(armed=False, drafts=False), []
    for starts, output in steps:
        tap.after_step(runner(starts), output)
        while (raw := ring.peek()) is not None:
            batch = ledger.settle(raw, EngineCounters())
            ring.release()
            batches.append(_wired(len(batches) + 1, batch))
    return batches


@settings(max_examples=60, deadline=None)
@given(ANY_TEXT.filter(lambda name: name != "good"), ANY_TEXT, EXTRA | NOT_EXTRA)
@example("\ud800", "\udfff" * 300, {trace_context.RESPONSE_KEY: "\ud800"})
@example("x" * 70_000, "y" * 70_000, ["no mapping"])
def test_the_request_beside_it_is_told_whole(name: str, adapter: str, extra: Any):
    output = scheduled({name: 2, "good": 3}, new=[(name, 2), ("good", 3)])
    hostile = output.scheduled_new_reqs[0]
    hostile.lora_request = SimpleNamespace(lora_name=adapter)
    hostile.sampling_params = SimpleNamespace(extra_args=extra)
    ended = {name: (1, False), "good": (1, False)}
    batches = delivered([({name: 0, "good": 0}, output), ({}, scheduled({}, finished=ended))])
    opened = {each.handle: each for batch in batches for each in batch.opened}
    tokens = dict.fromkeys(opened, 0)
    for batch in batches:
        for segment in batch.segments_S:
            tokens[int(segment["handle"])] += int(segment["count"])
    assert tokens == {1: 2, 2: 3}
    assert opened[2].request_id == "good" and opened[1].request_id == bounded_id(name)
    assert sorted(each.handle for batch in batches for each in batch.closed) == [1, 2]
    assert max(len(opened[1].request_id), len(opened[1].adapter), len(opened[1].response_id)) <= 256


def _wired(number: int, batch: StepBatch) -> StepBatch:
    decoded = codec.decode_request(codec.encode_batch(number, batch))
    assert isinstance(decoded, ReceivedBatch)
    return decoded.batch
