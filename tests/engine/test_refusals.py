"""Bad input costs monitoring, never serving (I4, I6): one clear message, the model's own answers, counted losses."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from latentwatch.names import Reason, TokenState
from latentwatch.watchlist import checkpoint
from latentwatch.watchlist import file as watchlist_file

from tests.engine.conftest import SMALL, monitored
from tests.support import tiny
from tests.support.engines import EngineResult, random_prompts, run_engine

pytestmark = pytest.mark.engine

# Eager: nothing here depends on the compiled graph, and an eager engine starts in a third of the time.
ENGINE = {**SMALL, "dtype": "bfloat16", "enforce_eager": True}
WAVES = [random_prompts(4, vocabulary=tiny.VOCABULARY, longest=40, seed=3, max_tokens=6)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Path) -> EngineResult:
    return run_engine(tmp_path_factory.mktemp("plain"), engine={"model": str(model), **ENGINE}, waves=WAVES)


def tokens(result: EngineResult) -> int:
    return sum(len(item["prompt"]) for item in WAVES[0]) + sum(len(output) - 1 for output in result.outputs)


def truncated(path: Path, folder: Path) -> Path:
    short = folder / "short.watchlist.safetensors"
    short.write_bytes(path.read_bytes()[:-100])
    return short


def other_width(folder: Path) -> Path:
    path = folder / "wide.watchlist.safetensors"
    tiny.watchlist(path, d_model=128)
    return path


@pytest.mark.parametrize(
    ("make", "reason", "found"),
    [
        (lambda path, folder: folder / "absent.safetensors", "watchlist_missing", "cannot be read"),
        (truncated, "watchlist_format", "not a whole watchlist file"),
        (lambda path, folder: other_width(folder), "watchlist_width", "d_model 64"),
    ],
    ids=["missing", "truncated", "other-width"],
)
def test_a_bad_watchlist_leaves_the_server_serving_and_every_token_counted_as_unseen(
    make: Any, reason: str, found: str, plain: EngineResult, model: Path, watchlist_path: Path, tmp_path: Path
):
    with monitored(tmp_path) as engine:
        result = engine.run(make(watchlist_path, tmp_path), engine={"model": str(model), **ENGINE}, waves=WAVES)
        sink = engine.sink
    assert result.outputs == plain.outputs
    assert [hello.not_armed_reason for hello in sink.hellos] == [reason]
    assert found in sink.hellos[0].not_armed_text
    assert result.log.count("NOT ARMED") == 1
    books: Counter[tuple[int, int]] = Counter()
    for batch in sink.batches:
        for segment in batch.segments_S:
            books[int(segment["state"]), int(segment["reason"])] += int(segment["count"])
    assert books == {(TokenState.UNSEEN, Reason.NOT_ARMED): tokens(result)}


def test_without_a_collector_the_server_serves_and_says_once_that_it_waits(
    plain: EngineResult, model: Path, watchlist_path: Path, tmp_path: Path
):
    env = {"LATENTWATCH_WATCHLIST": str(watchlist_path), "LATENTWATCH_COLLECTOR": f"unix://{tmp_path}/nobody.sock"}
    result = run_engine(tmp_path, engine={"model": str(model), **ENGINE}, waves=WAVES, env=env)
    assert result.outputs == plain.outputs
    assert "armed 28 features" in result.log


def test_one_switch_turns_everything_off(plain: EngineResult, model: Path, watchlist_path: Path, tmp_path: Path):
    with monitored(tmp_path) as engine:
        result = engine.run(
            watchlist_path, engine={"model": str(model), **ENGINE}, waves=WAVES, env={"LATENTWATCH_DISABLE": "1"}
        )
        assert engine.sink.hellos == []
    assert result.outputs == plain.outputs
    assert "latentwatch: armed" not in result.log


def test_an_engine_mode_without_exact_rows_is_refused_by_name(model: Path, watchlist_path: Path, tmp_path: Path):
    """Late layers on a part of the rows; tokens are still counted exactly, as unseen."""
    engine_arguments = {"model": str(model), **ENGINE, "kv_sharing_fast_prefill": True}
    with monitored(tmp_path) as engine:
        result = engine.run(watchlist_path, engine=engine_arguments, waves=WAVES)
        sink = engine.sink
    assert [hello.not_armed_reason for hello in sink.hellos] == ["engine_mode"]
    assert "KV-sharing fast prefill" in sink.hellos[0].not_armed_text
    assert sum(int(batch.segments_S["count"].sum()) for batch in sink.batches) == tokens(result)


@pytest.mark.parametrize("strict", [False, True], ids=["told", "strict"])
def test_another_model_of_the_same_shape_is_told_or_refused_and_served_either_way(
    strict: bool, plain: EngineResult, model: Path, watchlist_path: Path, tmp_path: Path
):
    """The watchlist states a checkpoint whose weights came from another seed; its sizes and tensor names are equal."""
    stated = checkpoint.of_checkpoint(tiny.llama(tmp_path / "other", seed=1))
    path = tmp_path / "w.safetensors"
    watchlist_file.write(dataclasses.replace(watchlist_file.read(watchlist_path), identity=stated), path)
    env = {"LATENTWATCH_STRICT_MODEL": "1"} if strict else {}
    with monitored(tmp_path) as engine:
        result = engine.run(path, engine={"model": str(model), **ENGINE}, waves=WAVES, env=env)
        sink = engine.sink
    assert result.outputs == plain.outputs
    (hello,) = sink.hellos
    assert hello.model_match == "differs" and "are others" in hello.model_text
    assert (hello.armed, hello.not_armed_reason) == (not strict, "watchlist_model" if strict else "")
    assert "ANOTHER MODEL" in result.log
    states = {TokenState(s["state"]) for batch in sink.batches for s in batch.segments_S}
    assert states == ({TokenState.UNSEEN} if strict else {TokenState.SCORED})


def test_the_watchlists_own_model_is_the_same(model: Path, watchlist_path: Path, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    stated = checkpoint.of_checkpoint(model)
    watchlist_file.write(dataclasses.replace(watchlist_file.read(watchlist_path), identity=stated), path)
    with monitored(tmp_path) as engine:
        engine.run(path, engine={"model": str(model), **ENGINE}, waves=WAVES, env={"LATENTWATCH_STRICT_MODEL": "1"})
        (hello,) = engine.sink.hellos
    assert hello.armed and (hello.model_match, hello.model_text) == ("same", "")
