"""Prompts that are not token ids, and prompts that grow, on the real engine: the books say what vLLM computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from latentwatch.names import Outcome, Phase, TokenState
from latentwatch.watchlist import file as watchlist_file

from tests.engine.conftest import SMALL, monitored
from tests.support import tiny
from tests.support.engines import ROOT, cache_root
from tests.support.oracle import expected_scores, residual_streams
from tests.support.recording import Scores

pytestmark = pytest.mark.engine

ENGINE = {**SMALL, "dtype": "float32", "enforce_eager": True, "enable_prompt_embeds": True}
EMBEDS = [{"rows": n, "width": tiny.D_MODEL, "seed": n, "max_tokens": out} for n, out in ((40, 8), (1, 1), (33, 3))]
_RNG = np.random.default_rng(5)
SESSIONS: list[dict[str, Any]] = [
    {"turns": [_RNG.integers(3, tiny.VOCABULARY, size=n).tolist() for n in turns], "max_tokens": most, "stop": stop}
    for turns, most, stop in (
        ((5, 9, 3, 20), 6, None),
        ((30, 1, 1), 1, None),
        # Ends where the model says so, which async scheduling learns a row too late.
        ((8, 8, 8, 8), 12, list(range(0, tiny.VOCABULARY, 3))),
        ((17,), 4, None),
    )
]


class Ran(NamedTuple):
    result: dict[str, Any]
    scores: dict[str, Scores]
    """By the name that its client gave the request."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, model: Path, watchlist_path: Path) -> Ran:
    folder = tmp_path_factory.mktemp("sessions")
    with monitored(folder) as collected:
        env = {**collected.environment(watchlist_path), "VLLM_CACHE_ROOT": str(cache_root())}
        job = {"engine": {"model": str(model), **ENGINE}, "env": env, "embeds": EMBEDS, "sessions": SESSIONS}
        (folder / "job.json").write_text(json.dumps(job))
        log = folder / "engine.log"
        with log.open("w") as out:
            command = [sys.executable, "-m", "tests.support.session_run", "job.json", "result.json"]
            command[3:] = [str(folder / name) for name in command[3:]]
            code = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT, timeout=400
            ).returncode
        assert code == 0, log.read_text(errors="replace")[-6000:]
        collected.wait_closed(len(EMBEDS) + len(SESSIONS))
        scores = collected.sink.requests(watchlist_file.read(watchlist_path))
    by_name = {name.rpartition("-")[0]: each for name, each in scores.items()}
    return Ran(json.loads((folder / "result.json").read_text()), by_name)


def phases(found: Scores) -> dict[Phase, int]:
    return {phase: sum(n for (_, _, of), n in found.tokens.items() if of == phase) for phase in Phase}


def test_a_prompt_of_embeddings_is_as_long_as_its_rows(ran: Ran):
    for i, (item, outputs) in enumerate(zip(EMBEDS, ran.result["embeds"], strict=True)):
        found, rows, made = ran.scores[f"embeds-{i}"], item["rows"], len(outputs)
        assert made == item["max_tokens"] and found.opened.prompt_tokens == rows
        assert found.closed is not None and found.closed.total_tokens == rows + made - 1
        assert (found.closed.prompt_tokens, found.closed.output_tokens) == (rows, made)
        assert phases(found) == {Phase.PROMPT: rows, Phase.OUTPUT: made - 1}
        assert {state for state, _, _ in found.tokens} == {TokenState.SCORED}
        assert sorted(found.at) == list(range(rows + made - 1))


def fed(item: dict[str, Any], answers: list[list[int]]) -> tuple[list[int], list[Phase]]:
    """What a session computed, as vLLM documents it: each input, and each output without its last token."""
    tokens, phase = list[int](), list[Phase]()
    for given, said in zip(item["turns"], answers, strict=True):
        tokens += [*given, *said[:-1]]
        phase += [Phase.PROMPT] * len(given) + [Phase.OUTPUT] * (len(said) - 1)
    return tokens, phase


def test_a_session_is_closed_with_every_position_of_every_turn(ran: Ran):
    for i, (item, answers) in enumerate(zip(SESSIONS, ran.result["sessions"], strict=True)):
        found, (tokens, phase) = ran.scores[f"session-{i}"], fed(item, answers)
        assert found.closed is not None and found.closed.outcome == Outcome.FINISHED, f"session {i}"
        assert found.closed.total_tokens == sum(found.tokens.values()) == len(tokens), f"session {i}"
        assert sorted(found.at) == list(range(len(tokens))), f"session {i}"
        assert phases(found) == {each: phase.count(each) for each in Phase}, f"session {i}"
        assert found.closed.prompt_tokens == len(tokens) - len(answers[-1]) + 1, f"session {i}"
        assert found.closed.output_tokens == len(answers[-1]), f"session {i}"


def test_each_position_of_a_session_has_the_score_of_the_token_that_went_on(
    ran: Ran, watchlist: watchlist_file.Watchlist, model: Path
):
    layers = [rows.hook_point.layer for rows in watchlist.hooks]
    for i, (item, answers) in enumerate(zip(SESSIONS, ran.result["sessions"], strict=True)):
        found, (tokens, _) = ran.scores[f"session-{i}"], fed(item, answers)
        act_TF, margin_TF = expected_scores(watchlist, residual_streams(model, tokens, layers, "float32"))
        clear = np.abs(margin_TF) >= 1e-3
        got_TF = np.stack([found.at[position] for position in range(len(tokens))])
        np.testing.assert_allclose(got_TF[clear], act_TF[clear], atol=1e-3, rtol=1e-3)
