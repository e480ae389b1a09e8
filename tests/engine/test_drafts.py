"""Speculative decoding with n-gram drafts on the real engine: of a draft's rows only what was accepted is a score."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from latentwatch.watchlist import file as watchlist_file

from tests.engine.conftest import SMALL, monitored
from tests.support import tiny
from tests.support.engines import EngineResult
from tests.support.oracle import expected_scores, residual_streams
from tests.support.recording import RecordingSink

pytestmark = pytest.mark.engine

NGRAM: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
ENGINE = {**SMALL, "dtype": "float32", "enforce_eager": True, "speculative_config": NGRAM}


def waves() -> list[list[dict[str, Any]]]:
    """Phrases over and over, of which the drafter finds the next token; the model agrees with it now and then."""
    rng = np.random.default_rng(4)
    phrases = [rng.integers(3, tiny.VOCABULARY, size=7) for _ in range(10)]
    return [[{"prompt": np.resize(phrase, 30 + 3 * i).tolist(), "max_tokens": 90} for i, phrase in enumerate(phrases)]]


class Run(NamedTuple):
    result: EngineResult
    sink: RecordingSink


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.looping_llama(tmp_path_factory.mktemp("looping"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path, watchlist_path: Path) -> Run:
    with monitored(tmp_path_factory.mktemp("drafts")) as engine:
        return Run(engine.run(watchlist_path, engine={"model": str(model), **ENGINE}, waves=waves()), engine.sink)


def rejected(run: Run) -> float:
    return (
        run.result.metrics["vllm:spec_decode_num_draft_tokens"]
        - run.result.metrics["vllm:spec_decode_num_accepted_tokens"]
    )


def test_many_drafts_were_accepted_and_many_rejected(run: Run):
    assert run.result.metrics["vllm:spec_decode_num_accepted_tokens"] > 50
    assert rejected(run) > 50


def test_every_position_is_scored_once_with_the_score_of_the_token_that_was_accepted(
    run: Run, watchlist: watchlist_file.Watchlist, model: Path
):
    scores = run.sink.requests(watchlist)
    ordered = [scores[key] for key in sorted(scores, key=lambda name: int(name.partition("-")[0]))]
    layers = [rows.hook_point.layer for rows in watchlist.hooks]
    for item, output, found in zip(waves()[0], run.result.outputs, ordered, strict=True):
        fed = (item["prompt"] + output)[:-1]
        assert sorted(found.at) == list(range(len(fed)))
        act_TF, margin_TF = expected_scores(watchlist, residual_streams(model, fed, layers, "float32"))
        clear = np.abs(margin_TF) >= 1e-3
        got_TF = np.stack([found.at[position] for position in range(len(fed))])
        np.testing.assert_allclose(got_TF[clear], act_TF[clear], atol=1e-3, rtol=1e-3)


def test_rejected_rows_are_counted_as_surplus_and_never_delivered(run: Run):
    """Of a request's last step, whose drafts were cut off by its end, vLLM counts otherwise than the books."""
    surplus = max(batch.counters.surplus_tokens for batch in run.sink.batches)
    assert abs(surplus - rejected(run)) <= NGRAM["num_speculative_tokens"] * len(run.result.outputs)
