"""The plugin inside vLLM on a GPU, with CUDA graphs: the right tokens scored, padding never, outputs unchanged.

Dimension key: T tokens of a request, F features, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch.names import TokenState

from tests.engine.conftest import monitored
from tests.support import tiny
from tests.support.engines import EngineResult, random_prompts, run_engine
from tests.support.oracle import expected_scores, residual_streams
from tests.support.recording import Scores

WIDTH = 1024
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 32,
    "gpu_memory_utilization": 0.2,
}
BATCHES = (1, 3, 9, 20)
"""Of these only 1 is a size that graphs are captured for; the others run padded (3 as 4, 9 as 16, 20 as 24)."""
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
RUNNERS = {"v2": {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}


def llama(path: Path) -> Path:
    """A random bfloat16 Llama that is wide enough for every attention kernel."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=tiny.LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 128,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


class Run:
    """One monitored engine run over batches that pad, and the same run without the monitor."""

    def __init__(self, folder: Path, runner: str) -> None:
        model = llama(folder / "model")
        self.model = model
        self.watchlist = tiny.watchlist(folder / "w.safetensors", layers=(1, 3), d_model=WIDTH)
        self.waves = [
            random_prompts(batch, vocabulary=tiny.VOCABULARY, longest=60, seed=batch, max_tokens=24)
            for batch in BATCHES
        ]
        arguments: dict[str, Any] = {"engine": {"model": str(model), **ENGINE}, "waves": self.waves}
        env = {**ENVIRONMENT, **RUNNERS[runner]}
        with monitored(folder) as engine:
            self.on = engine.run(folder / "w.safetensors", env=env, **arguments)
            self.sink = engine.sink
        self.off: EngineResult = run_engine(folder, env=env, **arguments)

    def requests(self) -> Iterator[tuple[list[int], Scores]]:
        """(tokens that were fed to the model, scores), in the order of the workload."""
        prompts = [item["prompt"] for wave in self.waves for item in wave]
        scores = self.sink.requests(self.watchlist)
        ordered = [scores[key] for key in sorted(scores, key=lambda request_id: int(request_id.partition("-")[0]))]
        for prompt, output, found in zip(prompts, self.on.outputs, ordered, strict=True):
            yield (prompt + output)[:-1], found

    def compared(self) -> Iterator[tuple[Any, Any]]:
        """(scores that arrived, scores from Hugging Face's stream), [T, F] in float64, dense features apart."""
        layers = [rows.hook_point.layer for rows in self.watchlist.hooks]
        for fed, scores in self.requests():
            act_TF, _ = expected_scores(self.watchlist, residual_streams(self.model, fed, layers))
            yield np.stack([scores.at[position] for position in range(len(fed))]).astype(np.float64), act_TF


@pytest.fixture(scope="module", params=["v2", "v1"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), request.param)


def test_outputs_are_identical_with_the_monitor_on_and_off(run: Run) -> None:
    assert run.on.outputs == run.off.outputs


def test_padded_graphs_score_every_token_once_and_no_padding(run: Run) -> None:
    scored = 0
    for fed, scores in run.requests():
        assert sorted(scores.at) == list(range(len(fed)))
        assert {state for state, _, _ in scores.tokens} == {TokenState.SCORED}
        scored += sum(scores.tokens.values())
    assert sum(batch.rows for batch in run.sink.batches) == scored
    assert run.sink.errors == []


def test_scores_are_those_of_hugging_faces_stream_up_to_bfloat16_noise(run: Run) -> None:
    """Root mean square over all tokens; the two stacks' own bfloat16 streams differ by about 1 %."""
    pairs = list(run.compared())
    dense_F = np.flatnonzero(~run.watchlist.sparse_F)
    found = np.concatenate([act_TF for act_TF, _ in pairs])[:, dense_F]
    expected = np.concatenate([act_TF for _, act_TF in pairs])[:, dense_F]
    assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < 0.03


def test_gates_agree_with_hugging_faces_but_near_their_thresholds(run: Run) -> None:
    pairs = list(run.compared())
    sparse_F = run.watchlist.sparse_F
    found = np.concatenate([act_TF for act_TF, _ in pairs])[:, sparse_F]
    expected = np.concatenate([act_TF for _, act_TF in pairs])[:, sparse_F]
    assert ((found > 0) != (expected > 0)).mean() < 0.02
    assert 0.05 < (expected > 0).mean() < 0.95, "a watchlist on which nothing can go wrong"


def test_a_score_is_never_that_of_the_neighbouring_position(run: Run) -> None:
    """The control of the test above: shifted by one, the same scores are far off."""
    found, expected = max(run.compared(), key=lambda pair: len(pair[0]))
    dense_F = np.flatnonzero(~run.watchlist.sparse_F)
    shifted = found[:-1, dense_F] - expected[1:, dense_F]
    assert np.sqrt((shifted**2).mean() / (expected[:, dense_F] ** 2).mean()) > 0.3


def test_the_watchlist_file_is_the_one_that_was_armed(run: Run) -> None:
    assert {(hello.armed, hello.watchlist_sha256) for hello in run.sink.hellos} == {(True, run.watchlist.sha256)}
