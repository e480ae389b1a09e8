"""Models that nobody here wrote: scored exactly wherever their stream is, or refused; never wrong, and never harmed."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch.names import Reason, TokenState

from tests.bench.accounting.models import COMMON
from tests.engine.conftest import SMALL, monitored
from tests.support import tiny
from tests.support.engines import ROOT, EngineResult, random_prompts, run_engine
from tests.support.oracle import expected_scores, residual_streams
from tests.support.recording import RecordingSink

pytestmark = pytest.mark.engine

ENGINE = {**SMALL, "dtype": "float32"}
WAVES = [random_prompts(6, vocabulary=tiny.VOCABULARY, longest=60, seed=3, max_tokens=6)]


def run(folder: Path, model: Path, architecture: str, **changes: Any) -> tuple[EngineResult, RecordingSink, Any]:
    path = folder / "w.safetensors"
    watchlist = tiny.watchlist(path, architecture=architecture)
    with monitored(folder) as engine:
        result = engine.run(path, waves=WAVES, engine={"model": str(model), **ENGINE, **changes})
        return result, engine.sink, watchlist


def assert_exact(result: EngineResult, sink: RecordingSink, watchlist: Any, model: Path) -> None:
    """Every position of every request, at both hook points, is what Hugging Face's hidden states give."""
    assert [hello.not_armed_text for hello in sink.hellos] == [""]
    scores = sink.requests(watchlist)
    ordered = [scores[key] for key in sorted(scores, key=lambda request_id: int(request_id.partition("-")[0]))]
    dense = ~watchlist.sparse_F
    for item, output, found in zip(WAVES[0], result.outputs, ordered, strict=True):
        fed = (item["prompt"] + output)[:-1]
        assert {state for state, _, _ in found.tokens} == {TokenState.SCORED}
        streams = residual_streams(model, fed, [rows.hook_point.layer for rows in watchlist.hooks], "float32")
        act_TF, _ = expected_scores(watchlist, streams)
        norm_TH = np.stack([np.linalg.norm(x_TD, axis=1) for x_TD in streams], axis=1)
        assert sorted(found.at) == list(range(len(fed)))
        for position, found_F in found.at.items():
            np.testing.assert_allclose(found.norm_at[position], norm_TH[position], rtol=1e-3)
            np.testing.assert_allclose(found_F[dense], act_TF[position, dense], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
def test_a_model_on_the_transformers_backend_is_scored_exactly(eager: bool, model: Path, tmp_path: Path):
    """Its stream is [1, T, D]."""
    result, sink, watchlist = run(tmp_path, model, "LlamaForCausalLM", model_impl="transformers", enforce_eager=eager)
    assert_exact(result, sink, watchlist, model)


OTHERS: dict[str, dict[str, Any]] = {
    # A layer takes a residual and returns (whole stream, what it was before): the sum is not the stream.
    "Exaone4": {"sliding_window": 64, "sliding_window_pattern": 4},
    # The same in a layer whose final norm takes both, as vLLM's fused norms do.
    "Cohere": {"logit_scale": 1.0},
}


@pytest.mark.parametrize("prefix", OTHERS)
def test_a_layer_that_returns_the_whole_stream_and_a_stale_half_is_scored_exactly(prefix: str, tmp_path: Path):
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **OTHERS[prefix]})
    made = getattr(transformers, f"{prefix}ForCausalLM")(config).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "model")
    result, sink, watchlist = run(tmp_path, tmp_path / "model", f"{prefix}ForCausalLM")
    assert_exact(result, sink, watchlist, tmp_path / "model")


@dataclass(frozen=True)
class Hostile:
    """A model whose layers return what no hook reads, after so many forwards; with and without the monitor."""

    plain: EngineResult
    watched: EngineResult
    sink: RecordingSink

    def books(self) -> Counter[tuple[int, int]]:
        """Tokens by state and reason."""
        books: Counter[tuple[int, int]] = Counter()
        for batch in self.sink.batches:
            for segment in batch.segments_S:
                books[int(segment["state"]), int(segment["reason"])] += int(segment["count"])
        return books


def hostile(folder: Path, model: Path, *, after: int) -> Hostile:
    path = os.pathsep.join([str(ROOT / "tests/support/hostile_layers"), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "HOSTILE_AFTER": str(after)}
    engine = {"model": str(model), **ENGINE, "enforce_eager": True}
    plain = run_engine(folder, engine=engine, waves=WAVES, env=env)
    watchlist = folder / "w.safetensors"
    tiny.watchlist(watchlist)
    with monitored(folder) as watched:
        return Hostile(plain, watched.run(watchlist, engine=engine, waves=WAVES, env=env), watched.sink)


def fed(result: EngineResult) -> int:
    return sum(len(item["prompt"]) for item in WAVES[0]) + sum(len(output) - 1 for output in result.outputs)


def test_layers_that_return_something_else_later_fail_no_request_and_show_in_the_books(model: Path, tmp_path: Path):
    # Of the forwards before it, three are of the start.
    run = hostile(tmp_path, model, after=8)
    assert run.watched.outputs == run.plain.outputs
    assert [hello.not_armed_text for hello in run.sink.hellos] == [""]
    books = run.books()
    assert set(books) == {(TokenState.SCORED, Reason.NONE), (TokenState.UNSEEN, Reason.OP_SILENT)}
    assert sum(books.values()) == fed(run.watched)


def test_layers_that_return_no_rows_from_the_start_are_refused_by_name_and_the_server_serves(
    model: Path, tmp_path: Path
):
    run = hostile(tmp_path, model, after=0)
    assert run.watched.outputs == run.plain.outputs
    assert [hello.not_armed_reason for hello in run.sink.hellos] == ["stream_unproven"]
    assert "residual stream at resid_post.1 (LlamaDecoderLayer)" in run.sink.hellos[0].not_armed_text
    assert run.books() == {(TokenState.UNSEEN, Reason.NOT_ARMED): fed(run.watched)}
