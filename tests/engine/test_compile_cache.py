"""The worst trap of all (a stale compiled graph scores nothing, silently) is avoided by the salt and caught by the
canary. Shown in vLLM's GPU compile mode, whose cache loads graphs without looking at plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from latentwatch.names import TokenState

from tests.engine.conftest import SMALL, monitored
from tests.support import tiny
from tests.support.engines import ROOT, EngineResult, random_prompts, run_engine

pytestmark = pytest.mark.engine

WAVES = [random_prompts(3, vocabulary=tiny.VOCABULARY, longest=30, seed=5, max_tokens=6)]
LOADED = "Directly load AOT compilation"


class Start(NamedTuple):
    """One start of an engine on the shared compile cache."""

    result: EngineResult
    not_armed_reasons: list[str]
    states: set[int]

    @property
    def loaded_from_cache(self) -> bool:
        return LOADED in self.result.log


class Starts(NamedTuple):
    """Five starts, one after the other, on one compile cache that was empty before."""

    plain_cold: Start
    unsalted: Start
    salted_cold: Start
    salted_warm: Start
    plain_warm: Start


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, model: Path, watchlist_path: Path) -> Starts:
    cache = tmp_path_factory.mktemp("compile-cache")
    keep_mode = {"PYTHONPATH": str(ROOT / "tests/support/vllm_compile_on_cpu")}
    arguments: dict[str, Any] = {"engine": {"model": str(model), **SMALL}, "waves": WAVES, "cache": cache}

    def plain() -> Start:
        return Start(
            run_engine(tmp_path_factory.mktemp("run"), env={**keep_mode, "LATENTWATCH_DISABLE": "1"}, **arguments),
            [],
            set(),
        )

    def watched(**env: str) -> Start:
        with monitored(tmp_path_factory.mktemp("run")) as engine:
            result = engine.run(watchlist_path, env={**keep_mode, **env}, **arguments)
            states = {int(state) for batch in engine.sink.batches for state in batch.segments_S["state"]}
            return Start(result, [hello.not_armed_reason for hello in engine.sink.hellos], states)

    return Starts(plain(), watched(UNSALTED="1"), watched(), watched(), plain())


def test_without_the_salt_the_stale_graph_is_loaded_and_the_canary_says_so(starts: Starts):
    assert starts.unsalted.loaded_from_cache
    assert starts.unsalted.not_armed_reasons == ["canary_dead"]
    assert starts.unsalted.states == {TokenState.UNSEEN}
    assert "does not hold the op" in starts.unsalted.result.log


def test_with_the_salt_the_graph_is_compiled_anew_and_scores(starts: Starts):
    assert not starts.salted_cold.loaded_from_cache
    assert starts.salted_cold.not_armed_reasons == [""]
    assert starts.salted_cold.states == {TokenState.SCORED}


def test_the_second_start_uses_the_compiled_graph_again_and_still_scores(starts: Starts):
    assert starts.salted_warm.loaded_from_cache
    assert starts.salted_warm.not_armed_reasons == [""]
    assert starts.salted_warm.states == {TokenState.SCORED}


def test_a_server_without_the_monitor_never_meets_the_watched_graph(starts: Starts):
    assert starts.plain_warm.loaded_from_cache


def test_all_five_answer_alike(starts: Starts):
    assert len({str(start.result.outputs) for start in starts}) == 1
