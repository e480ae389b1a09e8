"""Which rows of the step belong to which request, from vLLM's own arrays. Read right after the forward, never before:
the batch order is final only then.

Verified against vLLM 0.26, 0.32 and 0.33, both model runners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentwatch.arrays import Array
from latentwatch.engines.vllm.interfaces import BatchV1, BatchV2, ModelRunner, SchedulerOutput


@dataclass(frozen=True)
class RowMap:
    """The step's requests in the order of their rows in the batch."""

    request_ids: Sequence[str]
    start: Array
    """Position of each request's first row."""
    count: Array
    """Rows of each request; they are contiguous and follow one another from row 0."""


def read(runner: ModelRunner, scheduler_output: SchedulerOutput) -> RowMap:
    """The row map of the step that `runner` has just executed."""
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None)
    if batch is not None:
        return _from_v2(batch)
    return _from_v1(runner.input_batch, scheduler_output)


def _from_v2(batch: BatchV2) -> RowMap:
    n = batch.num_reqs
    return RowMap(
        request_ids=batch.req_ids[:n],
        start=batch.num_computed_tokens_np[:n],
        count=np.diff(batch.query_start_loc_np[: n + 1]),
    )


def _from_v1(batch: BatchV1, scheduler_output: SchedulerOutput) -> RowMap:
    request_ids = batch.req_ids[: batch.num_reqs]
    scheduled = scheduler_output.num_scheduled_tokens
    return RowMap(
        request_ids=request_ids,
        start=batch.num_computed_tokens_cpu[: batch.num_reqs],
        count=np.fromiter(map(scheduled.__getitem__, request_ids), np.int32, len(request_ids)),
    )


def check_runner(runner: ModelRunner) -> str:
    """ "" where the runner has the attributes that read() needs, else the name of the first one that is missing."""
    if hasattr(runner, "input_batch"):
        missing = [n for n in ("req_ids", "num_reqs", "num_computed_tokens_cpu") if not hasattr(runner.input_batch, n)]
        return missing[0] if missing else ""
    return "" if hasattr(runner, "execute_model_state") else "execute_model_state"
