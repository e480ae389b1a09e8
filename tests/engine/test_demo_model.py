"""The demo model as it is served: bfloat16, compiled, real prompts. Same answers (I3), Hugging Face's scores (I2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch.watchlist import file as watchlist_file

from tests.engine.conftest import monitored
from tests.support.engines import ROOT, EngineResult, run_engine
from tests.support.oracle import expected_scores, residual_streams
from tests.support.recording import Scores

pytestmark = pytest.mark.engine

ASSETS = ROOT / "monitor/latentwatch/demo/assets"
ENGINE = {"model": str(ASSETS / "model"), "dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 32}


def prompts() -> list[dict[str, Any]]:
    """Held-out prompts of the demo, ordinary ones and feared ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    lines = [
        line for name in ("ordinary", "incidents") for line in (ASSETS / f"{name}.jsonl").read_text().splitlines()[:30]
    ]
    encoded = [
        tokenizer.apply_chat_template(json.loads(line)["messages"], add_generation_prompt=True, return_dict=True)
        for line in lines
    ]
    return [{"prompt": list(ids["input_ids"]), "max_tokens": 48, "stop": [tokenizer.eos_token_id]} for ids in encoded]


class Run:
    """The same wave with the monitor and without."""

    def __init__(self, folder: Path) -> None:
        self.waves = [prompts()]
        self.watchlist = watchlist_file.read(ASSETS / "demo.watchlist.safetensors")
        with monitored(folder) as engine:
            self.on = engine.run(ASSETS / "demo.watchlist.safetensors", engine=ENGINE, waves=self.waves)
            scores = engine.sink.requests(self.watchlist)
        self.scores: list[Scores] = [
            scores[key] for key in sorted(scores, key=lambda name: int(name.partition("-")[0]))
        ]
        self.off: EngineResult = run_engine(folder, engine=ENGINE, waves=self.waves)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("demo-model"))


def test_answers_in_bfloat16_are_identical_with_the_monitor_on_and_off(run: Run):
    assert run.on.outputs == run.off.outputs


def test_scores_in_bfloat16_are_as_near_to_float32_as_hugging_faces_own_bfloat16(run: Run):
    """Median error of the probes over all positions, against Hugging Face in float32. Control: the position before."""
    dense = ~run.watchlist.sparse_F
    layers = [rows.hook_point.layer for rows in run.watchlist.hooks]
    ours, theirs, shifted = [], [], []
    for item, output, scores in zip(run.waves[0], run.on.outputs, run.scores, strict=True):
        fed = (item["prompt"] + output)[:-1]
        exact, _ = expected_scores(run.watchlist, residual_streams(ASSETS / "model", fed, layers, "float32"))
        rounded, _ = expected_scores(run.watchlist, residual_streams(ASSETS / "model", fed, layers, "bfloat16"))
        seen = sorted(scores.at)
        found = np.stack([scores.at[position] for position in seen])
        ours.append(np.abs(found - exact[seen])[:, dense])
        theirs.append(np.abs(rounded - exact)[:, dense])
        shifted.append(np.abs(found[1:] - exact[[position - 1 for position in seen[1:]]])[:, dense])
    error, reference, control = (float(np.median(np.concatenate(e))) for e in (ours, theirs, shifted))
    assert error <= 1.5 * reference
    assert control > 10 * error
