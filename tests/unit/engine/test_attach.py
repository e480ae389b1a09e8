"""Which worker reports, and which engine modes are refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from monitor.engine.attach import Attachment
from monitor.engine.settings import Settings
from tests.support import tiny
from tests.support.fake_model import Worker


def attached(worker: Any, folder: Any) -> Attachment:
    """Loaded and warmed up, without a collector: no process is started."""
    path = folder / "w.safetensors"
    tiny.watchlist(path)
    attachment = Attachment(worker, Settings(str(path), "", "here", disabled=False))
    worker.load_model()
    worker.compile_or_warm_up_model()
    return attachment


@pytest.mark.parametrize(("rank", "world", "reports"), [(0, 1, True), (0, 2, True), (1, 2, False), (2, 2, True)])
def test_one_rank_of_an_engine_reports(rank, world, reports, tmp_path):
    """Ranks 2 and 3 belong to the second engine of a data-parallel server."""
    worker: Any = Worker()
    worker.rank, worker.parallel_config.world_size = rank, world
    attachment = attached(worker, tmp_path)
    assert (attachment._tap is not None) == reports
    assert bool(attachment.salt) == reports


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2), "pipeline parallelism"),
        (lambda c: setattr(c.parallel_config, "use_ubatching", True), "micro-batching (DBO)"),
        (lambda c: setattr(c.parallel_config, "prefill_context_parallel_size", 2), "prefill context parallelism"),
        (lambda c: setattr(c.parallel_config, "use_sequence_parallel_moe", True), "sequence-parallel MoE"),
        (lambda c: setattr(c.compilation_config.pass_config, "enable_sp", True), "sequence parallelism"),
        (lambda c: setattr(c.cache_config, "kv_sharing_fast_prefill", True), "KV-sharing fast prefill"),
        (lambda c: setattr(c.model_config, "runner_type", "pooling"), "pooling models"),
        (lambda c: setattr(c, "speculative_config", SimpleNamespace(method="ngram")), "speculative decoding"),
    ],
)
def test_a_mode_whose_rows_cannot_be_told_is_refused_by_name(change, named, tmp_path):
    worker: Any = Worker()
    change(worker.vllm_config)
    refusal = attached(worker, tmp_path)._refusal
    assert refusal is not None and refusal.reason == "engine_mode"
    assert named in str(refusal)
