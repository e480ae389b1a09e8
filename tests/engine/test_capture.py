"""What is captured for training is what serving scores: the same tokens and streams, at prefill and at decode."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch.watchlist import captured
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.captured import CaptureJob

from tests.engine.conftest import RUNNERS, SMALL, monitored
from tests.support import tiny
from tests.support.engines import cache_root, random_prompts
from tests.support.oracle import expected_scores
from tests.support.recording import Scores

pytestmark = pytest.mark.engine

SKIPPED = 3
DECODED = 12


def capture(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = {**os.environ, "VLLM_CACHE_ROOT": str(cache_root()), "HF_HUB_OFFLINE": "1", **env}
    command = [sys.executable, "-m", "latentwatch.engines.vllm.capture_process", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    """Of all lengths, so that some are cut into several steps, and steps mix prefill and decode."""
    return random_prompts(12, vocabulary=tiny.VOCABULARY, longest=100, seed=4, max_tokens=DECODED)


@pytest.fixture(scope="module")
def job(model: Path, prompts: list[dict[str, Any]]) -> CaptureJob:
    ids = tuple(tuple(item["prompt"]) for item in prompts)
    return CaptureJob(str(model), "float32", (1, 3), ids, (DECODED,) * len(ids), SKIPPED, 256)


@pytest.fixture(scope="module")
def folder(job: CaptureJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captured")
    assert not job.write(path)
    done = capture(path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert '"done": 1, "of": 1' in done.stdout
    return path


@pytest.fixture(scope="module")
def served(
    model: Path,
    watchlist: watchlist_file.Watchlist,
    watchlist_path: Path,
    prompts: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Scores]:
    with monitored(tmp_path_factory.mktemp("served")) as engine:
        engine.run(
            watchlist_path,
            env=RUNNERS["v1"],
            engine={"model": str(model), **SMALL, "dtype": "float32"},
            waves=[prompts],
        )
        scores = engine.sink.requests(watchlist)
    return [scores[key] for key in sorted(scores, key=lambda name: int(name.partition("-")[0]))]


def test_scores_of_captured_streams_are_those_that_serving_gives(
    folder: Path, job: CaptureJob, served: list[Scores], watchlist: watchlist_file.Watchlist
):
    """To 1e-3 of the largest, at every position behind the skipped ones; compiled there, eager here."""
    layers = [captured.layer(folder, job, index) for index in range(2)]
    compared = 0
    for number, scores in enumerate(served):
        start, stop = layers[0].bounds_S[number : number + 2]
        act_TF, margin_TF = expected_scores(watchlist, [one.x_TD[start:stop].astype(np.float64) for one in layers])
        assert stop - start == len(job.prompts[number]) + DECODED - 1 - SKIPPED
        largest = np.abs(act_TF).max()
        for position in range(SKIPPED, len(job.prompts[number]) + DECODED - 1):
            expected_F, found_F = act_TF[position - SKIPPED], scores.at[position]
            clear_F = np.abs(margin_TF[position - SKIPPED]) > 1e-2
            np.testing.assert_allclose(found_F[clear_F], expected_F[clear_F], atol=1e-3 * largest)
            compared += 1
    assert compared == layers[0].length_R.sum()


def test_a_run_goes_on_with_the_parts_that_are_missing(folder: Path, job: CaptureJob, tmp_path: Path):
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert captured.missing_parts(tmp_path, job) == [0]
    part = captured.part_path(folder, 0)
    captured.part_path(tmp_path, 0).write_bytes(part.read_bytes())
    assert job.write(tmp_path)
    assert captured.missing_parts(tmp_path, job) == []


def test_an_engine_that_does_not_start_is_a_refusal_in_one_line(tmp_path: Path, job: CaptureJob):
    import dataclasses
    import json

    missing = dataclasses.replace(job, model=str(tmp_path / "no-such-model"))
    missing.write(tmp_path)
    done = capture(tmp_path)
    assert done.returncode == 2
    refused = json.loads(done.stdout)["refused"]
    assert refused["what"].startswith("vLLM with model")
    assert "--dtype bfloat16" in refused["instead"]
