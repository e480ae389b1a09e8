"""The real HTTP server: who a request was reaches the collector, also where its client left; the totals are vLLM's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from latentwatch.cli import main
from latentwatch.drift import canary
from latentwatch.names import Outcome, TokenState
from latentwatch.watchlist import file as watchlist_file

from tests.engine.conftest import SMALL, monitored
from tests.support import server, tiny
from tests.support.engines import cache_root, random_prompts
from tests.support.recording import Scores

pytestmark = pytest.mark.engine

PROMPTS = random_prompts(12, vocabulary=tiny.VOCABULARY, longest=60, seed=8)
LEAVES_AFTER_TOKENS = 2
LONG = 120
CANARIES = 2
CANARY_TOKENS = 70


def request(i: int, *, leaves: bool) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i]["prompt"],
        "max_tokens": LONG if leaves else 3 + i,
        "stop": [],
        "abort_after_outputs": LEAVES_AFTER_TOKENS if leaves else None,
    }


class Told(NamedTuple):
    """What clients and the collector saw of the same requests; the last four clients left."""

    answers: list[dict[str, Any]]
    scores: dict[str, Scores]
    """By response id."""
    counted: float
    """vLLM's prompt and generation tokens, before a client left."""
    engines: set[str]
    canary_exit: int
    canaries: dict[int | None, list[Scores]]
    """By prompt, of runs of `latentwatch canary`; None where the signature is not that of its key."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, watchlist_path: Path) -> Told:
    folder = tmp_path_factory.mktemp("server")
    model = tiny.llama(folder / "model")
    tiny.save_tokenizer(model)
    engine = {"model": str(model), **SMALL, "dtype": "float32", "enforce_eager": True}
    with monitored(folder) as collected:
        env = {**collected.environment(watchlist_path), "VLLM_CACHE_ROOT": str(cache_root())}
        with server.Server(engine, env, folder / "server.log", 300.0) as served, ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda i: served.ask(i, request(i, leaves=False)), range(8)))
            counted = sum(served.counters().values())
            answers += pool.map(lambda i: served.ask(i, request(i, leaves=True)), range(8, 12))
            canary_exit = run_canary(folder, served.port, str(model))
            collected.wait_closed(12 + 2 * CANARIES)
        scores = collected.sink.requests(watchlist_file.read(watchlist_path))
        engines = {hello.engine for hello in collected.sink.hellos}
    canaries: dict[int | None, list[Scores]] = {}
    for name in [name for name in scores if "lwcanary" in name]:
        prompt = canary.canary_prompt(canary.read_key(folder / "canary.key"), name)
        canaries.setdefault(prompt, []).append(scores.pop(name))
    by_response = {each.opened.response_id: each for each in scores.values()}
    return Told(answers, by_response, counted, engines, canary_exit, canaries)


def run_canary(folder: Path, port: int, model: str) -> int:
    """Every prompt twice. They are long enough for the prefix cache to hold them, were it not for their salt."""
    prompts = (" ".join(f"w{3 + (i + j) % 50}" for j in range(CANARY_TOKENS)) for i in range(CANARIES))
    (folder / "safe.txt").write_text("\n".join(prompts))
    argv = ["canary", "--server", f"http://127.0.0.1:{port}", "--model", model, "--make-key", "--every", "0.1"]
    files = ["--prompts", str(folder / "safe.txt"), "--key", str(folder / "canary.key")]
    return main([*argv, *files, "--runs", str(2 * CANARIES)])


def test_the_clients_request_id_and_traceparent_are_on_its_request(told: Told):
    assert {answer["response_id"] for answer in told.answers} == set(told.scores) == {f"cmpl-{i}" for i in range(12)}
    for i, answer in enumerate(told.answers):
        assert told.scores[answer["response_id"]].opened.traceparent == server.traceparent(i)


def test_every_request_balances_against_the_usage_that_its_client_was_told(told: Told):
    for answer in told.answers[:8]:
        found = told.scores[answer["response_id"]]
        assert found.closed is not None and found.closed.outcome == Outcome.FINISHED
        assert sum(found.tokens.values()) == found.closed.total_tokens == answer["usage"]["total_tokens"] - 1
    closed = [told.scores[answer["response_id"]].closed for answer in told.answers[:8]]
    assert sum(each.total_tokens + 1 for each in closed if each is not None) == told.counted


def test_a_request_whose_client_left_ends_as_aborted_where_the_engine_stopped(told: Told):
    for answer, prompt in zip(told.answers[8:], PROMPTS[8:], strict=True):
        found = told.scores[answer["response_id"]]
        assert found.closed is not None and found.closed.outcome == Outcome.ABORTED
        assert sum(found.tokens.values()) == found.closed.total_tokens
        asked = len(prompt["prompt"])
        assert asked + LEAVES_AFTER_TOKENS - 1 <= found.closed.total_tokens < asked + LONG - 1


def test_the_engine_is_named_by_its_index(told: Told):
    assert told.engines == {"0"}
    assert {each.engine for each in told.scores.values()} == {"0"}


def test_canary_runs_arrive_with_their_signature_are_computed_anew_and_score_the_same(told: Told):
    assert told.canary_exit == 0
    assert set(told.canaries) == set(range(CANARIES))
    for first, second in told.canaries.values():
        for run in (first, second):
            assert {state for state, _, _ in run.tokens} == {TokenState.SCORED}
            assert sorted(run.at) == list(range(CANARY_TOKENS))
        np.testing.assert_allclose(
            [first.at[t] for t in first.at], [second.at[t] for t in first.at], rtol=1e-4, atol=1e-5
        )
