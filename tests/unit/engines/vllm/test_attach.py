"""Which worker reports, and which engine modes are refused by name."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentwatch.engines.vllm.attach import Attachment, _as_the_sender_sees_it
from latentwatch.engines.vllm.settings import PluginSettings
from latentwatch.errors import EngineRefused, RefusalReason
from latentwatch.facts import IDENTITY_TEXT_CHARACTERS
from latentwatch.handover.exporter_config import WatchedFeature
from latentwatch.names import Severity
from latentwatch.watchlist.file import Limit

from tests.support import tiny
from tests.support.fake_model import Worker, lone_forward, scheduled
from tests.support.streams import probe, sparse


def attached(worker: Any, folder: Any) -> Attachment:
    """Loaded and warmed up, without a collector: no process is started."""
    path = folder / "w.safetensors"
    tiny.watchlist(path)
    attachment = Attachment(worker, PluginSettings(str(path), "", "here", disabled=False), lone_forward)
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


def hooks_of(worker: Any) -> int:
    return sum(len(module._forward_hooks) for module in worker.model.modules())


def raising(*_args: Any) -> Any:
    raise RuntimeError("no kernel image is available")


def test_a_forward_of_the_proof_that_raises_is_a_failed_check_and_leaves_nothing(tmp_path, monkeypatch):
    worker: Any = Worker()
    monkeypatch.setattr(worker.model, "forward", raising)
    refusal = attached(worker, tmp_path)._refusal
    assert refusal is not None and refusal.reason == "check_failed"
    assert "RuntimeError: no kernel image is available" in str(refusal)
    assert hooks_of(worker) == 0


def test_a_canary_that_raises_is_a_failed_check_and_the_hooks_go(tmp_path):
    worker: Any = Worker()
    worker.model_runner._dummy_run = raising
    attachment = attached(worker, tmp_path)
    assert attachment._refusal is not None and attachment._refusal.reason == "check_failed"
    assert attachment._tap is not None and attachment._failures == 0
    assert hooks_of(worker) == 0


def test_a_canary_that_raises_leaves_a_compiled_graph_what_it_calls(tmp_path):
    """The op stands in it and takes the module's buffers; it raises nowhere, so it may stay."""
    worker: Any = Worker()
    worker.model_runner._dummy_run = raising
    worker.model_config.enforce_eager = False
    attachment = attached(worker, tmp_path)
    assert attachment._refusal is not None and attachment._refusal.reason == "check_failed"
    assert hooks_of(worker) == 2
    worker.model(torch.ones(3, tiny.D_MODEL))


def test_buffers_that_cannot_be_read_are_a_failed_check_and_every_step_is_still_told(tmp_path, monkeypatch):
    worker: Any = Worker()
    monkeypatch.setattr("latentwatch.engines.vllm.step_tap.HostBuffers", raising)
    attachment = attached(worker, tmp_path)
    assert attachment._refusal is not None and attachment._refusal.reason == "check_failed"
    assert attachment._tap is not None
    assert worker.execute_model(scheduled({"a": 3}, new=[("a", 3)], starts={"a": 0})) == "the engine's own result"
    assert attachment._failures == 0


def ngram(config: Any) -> None:
    config.speculative_config = SimpleNamespace(method="ngram")


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
        (lambda c: setattr(c, "speculative_config", SimpleNamespace(method="eagle")), "speculative decoding"),
        (lambda c: (ngram(c), setattr(c.scheduler_config, "async_scheduling", True)), "speculative decoding"),
    ],
)
def test_a_mode_whose_rows_cannot_be_told_is_refused_by_name(change, named, tmp_path):
    worker: Any = Worker()
    change(worker.vllm_config)
    refusal = attached(worker, tmp_path)._refusal
    assert refusal is not None and refusal.reason == "engine_mode"
    assert named in str(refusal)


def test_ngram_drafts_are_followed_where_the_batch_says_which_rows_are_true(tmp_path):
    worker: Any = Worker()
    ngram(worker.vllm_config)
    assert attached(worker, tmp_path)._refusal is None


def test_ngram_drafts_on_a_runner_that_assumes_their_acceptance_are_refused(tmp_path):
    worker: Any = Worker()
    ngram(worker.vllm_config)
    del worker.model_runner.input_batch
    assert "speculative decoding" in str(attached(worker, tmp_path)._refusal)


class Alone(Worker):
    """A rank that would wait for the others in every forward."""

    def __init__(self, *, eager: bool) -> None:
        super().__init__()
        self.model_config.enforce_eager = eager
        self.parallel_config.world_size = 2

    def _forward(self, rows: int) -> None:
        raise AssertionError("a forward of one rank alone waits for the others for ever")


@pytest.mark.parametrize("eager", [True, False])
def test_no_rank_makes_a_forward_alone_and_only_a_compiled_graph_must_have_shown_the_op(eager, tmp_path):
    refusal = attached(Alone(eager=eager), tmp_path)._refusal
    assert (refusal.reason if refusal else "") == ("" if eager else "canary_dead")


@pytest.mark.parametrize(
    ("feature", "seen"),
    [
        (
            sparse("a", limit=Limit("max", 3.0), severity=Severity.CRITICAL),
            WatchedFeature(Severity.CRITICAL, 3.0, False),
        ),
        (sparse("b"), WatchedFeature(Severity.WARNING, -math.inf, False)),
        (probe("c", limit=Limit("rolling_mean", 0.5, 4)), WatchedFeature(Severity.CRITICAL, 0.5, True)),
        (probe("d"), WatchedFeature(Severity.CRITICAL, math.inf, True)),
    ],
    ids=["limit", "sparse without one", "rolling mean", "dense without one"],
)
def test_the_exporter_is_told_whose_scores_to_shed_last(feature, seen):
    assert _as_the_sender_sees_it(feature) == seen


def test_a_long_reason_for_not_being_armed_is_no_longer_than_a_collector_takes(tmp_path, monkeypatch):
    """Else the engine that has most to say would never be heard."""
    worker: Any = Worker()
    attachment = attached(worker, tmp_path)
    attachment._refusal = EngineRefused("m", found="x" * 5000, instead="y", reason=RefusalReason.ENGINE_MODE)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0"))
    worker.vllm_config.model_config.served_model_name = "m"
    worker.vllm_config.parallel_config = SimpleNamespace(data_parallel_rank=0, data_parallel_index=0)
    assert len(attachment._identity("").not_armed_text) == IDENTITY_TEXT_CHARACTERS


def test_steps_too_large_for_any_ring_are_refused_by_name_before_anything_is_hooked(tmp_path):
    worker: Any = Worker()
    worker.vllm_config.scheduler_config.max_num_batched_tokens = 1 << 24
    attachment = attached(worker, tmp_path)
    assert attachment._refusal is not None and attachment._refusal.reason == "ring_geometry"
    assert attachment._ring is not None and not attachment._hooks
