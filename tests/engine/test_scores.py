"""I1, I2 and I3 on the real CPU engine, compiled as it ships: every token, once, for the right request, and the
model's own answers unchanged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch.names import Phase, Reason, TokenState
from latentwatch.watchlist import file as watchlist_file

from tests.engine.conftest import RUNNERS, SMALL, monitored
from tests.support import tiny
from tests.support.engines import EngineResult, random_prompts, run_engine
from tests.support.oracle import expected_scores, residual_streams
from tests.support.recording import Scores

pytestmark = pytest.mark.engine

# float32, so that the comparison shows a wrong row or position and not bfloat16's noise.
ENGINE = {**SMALL, "dtype": "float32"}


def shared_prefix_prompts() -> list[dict[str, Any]]:
    """Eight prompts that share their first 64 tokens: two whole KV blocks."""
    prefix = random_prompts(1, vocabulary=tiny.VOCABULARY, longest=200, seed=9)[0]["prompt"] * 20
    return [{**item, "prompt": prefix[:64] + item["prompt"]} for item in workload(seed=2)]


def workload(seed: int) -> list[dict[str, Any]]:
    """Eight different requests; half of them may stop at a token, so that the engine runs past their end."""
    prompts = random_prompts(8, vocabulary=tiny.VOCABULARY, longest=100, seed=seed, max_tokens=12)
    return [{**item, "stop": list(range(3, 90))} if i % 2 else item for i, item in enumerate(prompts)]


class Run:
    """One monitored engine run and the same run without the monitor."""

    def __init__(self, folder: Path, model: Path, watchlist_path: Path, runner: str) -> None:
        self.waves = [workload(seed=1), shared_prefix_prompts()[:1], shared_prefix_prompts()[1:]]
        arguments: dict[str, Any] = {"engine": {"model": str(model), **ENGINE}, "waves": self.waves}
        with monitored(folder) as engine:
            self.on = engine.run(watchlist_path, env=RUNNERS[runner], **arguments)
            self.sink = engine.sink
        self.off: EngineResult = run_engine(folder, env=RUNNERS[runner], **arguments)

    def requests(self, watchlist: watchlist_file.Watchlist) -> list[tuple[list[int], Scores]]:
        """(tokens that were fed to the model, scores), in the order of the workload."""
        prompts = [item["prompt"] for wave in self.waves for item in wave]
        scores = self.sink.requests(watchlist)
        ordered = [scores[key] for key in sorted(scores, key=lambda request_id: int(request_id.partition("-")[0]))]
        fed = [(prompt + output)[:-1] for prompt, output in zip(prompts, self.on.outputs, strict=True)]
        return list(zip(fed, ordered, strict=True))


@pytest.fixture(scope="module", params=["v1", "v2"])
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path, watchlist_path: Path
) -> Run:
    return Run(tmp_path_factory.mktemp("run"), model, watchlist_path, request.param)


def test_outputs_are_identical_with_the_monitor_on_and_off(run: Run):
    assert run.on.outputs == run.off.outputs


def test_every_token_that_vllm_counted_is_accounted_for_and_none_is_dropped(
    run: Run, watchlist: watchlist_file.Watchlist
):
    total: Counter[tuple[TokenState, Reason, Phase]] = Counter()
    for fed, scores in run.requests(watchlist):
        assert scores.closed is not None
        assert sum(scores.tokens.values()) == scores.closed.total_tokens == len(fed)
        total.update(scores.tokens)
    counted = run.on.metrics["vllm:prompt_tokens"] + run.on.metrics["vllm:generation_tokens"] - len(run.on.outputs)
    assert sum(total.values()) == counted
    assert {state for state, _, _ in total} == {TokenState.SCORED, TokenState.INHERITED}
    # The second wave left the two shared blocks in the prefix cache; the seven requests of the third hit them.
    assert total[TokenState.INHERITED, Reason.NONE, Phase.PROMPT] == 7 * 64


def test_scores_computed_or_inherited_are_those_of_hugging_faces_hidden_states_at_the_same_position(
    run: Run, watchlist: watchlist_file.Watchlist, model: Path
):
    """Sparse scores to 1e-3 (they reach 30), dense ones to float16's resolution; gates equal but within 1e-3 of tau."""
    sparse = watchlist.sparse_F
    positions = 0
    for fed, scores in run.requests(watchlist):
        streams = residual_streams(model, fed, [rows.hook_point.layer for rows in watchlist.hooks], "float32")
        act_TF, margin_TF = expected_scores(watchlist, streams)
        norm_TH = np.stack([np.linalg.norm(x_TD, axis=1) for x_TD in streams], axis=1)
        for position, found_F in scores.at.items():
            expected_F = act_TF[position]
            near = np.abs(margin_TF[position]) < 1e-3
            assert ((found_F > 0) == (expected_F > 0))[sparse & ~near].all()
            np.testing.assert_allclose(found_F[sparse & ~near], expected_F[sparse & ~near], atol=1e-3)
            np.testing.assert_allclose(found_F[~sparse], expected_F[~sparse], atol=1e-3, rtol=1e-3)
            np.testing.assert_allclose(scores.norm_at[position], norm_TH[position], rtol=1e-3)
            positions += 1
    assert positions == sum(len(fed) for fed, _ in run.requests(watchlist))


def test_a_score_is_never_that_of_the_neighbouring_position(run: Run, watchlist: watchlist_file.Watchlist, model: Path):
    """The control of the test above: shifted by one, the same scores are far off."""
    fed, scores = run.requests(watchlist)[0]
    act_TF, _ = expected_scores(watchlist, residual_streams(model, fed, [1, 3], "float32"))
    shifted = max(float(np.abs(scores.at[p] - act_TF[p + 1]).max()) for p in range(len(fed) - 1))
    assert shifted > 1.0


def test_every_exporter_stream_is_whole_and_armed(run: Run, watchlist: watchlist_file.Watchlist):
    assert run.sink.errors == []
    assert {(hello.armed, hello.watchlist_sha256) for hello in run.sink.hellos} == {(True, watchlist.sha256)}
    counters = run.sink.batches[-1].counters
    assert (counters.ring_dropped_steps, counters.op_silent_steps, counters.unattributed_rows) == (0, 0, 0)
