"""The worst trap of all (a stale compiled graph scores nothing, silently) is avoided by the salt and caught by the
canary. Shown in vLLM's GPU compile mode, whose cache loads graphs without looking at plugins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from latentwatch.names import TokenState
from latentwatch.watchlist import file as watchlist_file

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
    scores_RP: np.ndarray
    """of the probes, in the order of the tokens"""

    @property
    def loaded_from_cache(self) -> bool:
        return LOADED in self.result.log


class Starts(NamedTuple):
    """Six starts, one after the other, on one compile cache that was empty before."""

    plain_cold: Start
    unsalted: Start
    salted_cold: Start
    salted_warm: Start
    edited_warm: Start
    plain_warm: Start


def edited(path: Path, folder: Path) -> Path:
    """The same watchlist with another label, and at each hook point the two last rows changed over."""
    whole = watchlist_file.read(path)
    hooks = []
    for rows in whole.hooks:
        order = [*range(len(rows.features) - 2), -1, -2]
        features = [replace(rows.features[k], label=f"edited: {rows.features[k].label}") for k in order]
        hooks.append(
            replace(
                rows,
                features=tuple(features),
                w_hi_KD=rows.w_hi_KD[order],
                w_lo_KD=rows.w_lo_KD[order],
                scale_6K=rows.scale_6K[:, order],
            )
        )
    watchlist_file.write(replace(whole, hooks=tuple(hooks)), folder / "edited.safetensors")
    return folder / "edited.safetensors"


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
            np.empty(0),
        )

    def watched(path: Path = watchlist_path, **env: str) -> Start:
        with monitored(tmp_path_factory.mktemp("run")) as engine:
            result = engine.run(path, env={**keep_mode, **env}, **arguments)
            batches = engine.sink.batches
            states = {int(state) for batch in batches for state in batch.segments_S["state"]}
            scores = [batch.dense_RP for batch in batches if len(batch.dense_RP)]
            reasons = [hello.not_armed_reason for hello in engine.sink.hellos]
            return Start(result, reasons, states, np.concatenate(scores) if scores else np.empty(0))

    other = edited(watchlist_path, tmp_path_factory.mktemp("edited"))
    return Starts(plain(), watched(UNSALTED="1"), watched(), watched(), watched(other), plain())


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


def test_an_edited_watchlist_of_the_same_sizes_uses_the_compiled_graph_and_scores_by_its_own_rows(starts: Starts):
    """A label costs no cold compilation; and no row of the watchlist before is left in the graph."""
    assert starts.edited_warm.loaded_from_cache
    assert starts.edited_warm.not_armed_reasons == [""]
    before_RP, after_RP = starts.salted_warm.scores_RP, starts.edited_warm.scores_RP
    assert len(before_RP) and (before_RP[:, 0] != before_RP[:, 1]).any()
    np.testing.assert_allclose(after_RP, before_RP[:, [1, 0, 3, 2]], rtol=1e-3, atol=1e-3)


def test_a_server_without_the_monitor_never_meets_the_watched_graph(starts: Starts):
    assert starts.plain_warm.loaded_from_cache


def test_all_six_answer_alike(starts: Starts):
    assert len({str(start.result.outputs) for start in starts}) == 1
