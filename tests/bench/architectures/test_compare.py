"""That the walk calls no wrong row exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch.watchlist.file import Watchlist

from tests.bench.architectures.compare import Comparison, compare
from tests.bench.architectures.walk import error_of, verdict
from tests.support import tiny
from tests.support.oracle import expected_scores
from tests.support.recording import Scores

TOKENS = [list(range(3, 23)), list(range(5, 40))]
TOLERANCE = 5e-3


@pytest.fixture
def watchlist(tmp_path: Path) -> Watchlist:
    return tiny.watchlist(tmp_path / "w.safetensors", sparse=2, dense=6, threshold=0.0)


@pytest.fixture
def streams() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {f"{i}-{layer}": rng.normal(size=(len(TOKENS[i]), tiny.D_MODEL)) for i in (0, 1) for layer in (1, 3)}


def told(watchlist: Watchlist, streams: dict[str, Any], shift: int = 0) -> list[Scores]:
    """What an exact monitor tells, with every score given to a position that is so much later."""
    made = []
    for i, tokens in enumerate(TOKENS):
        of_request = [np.roll(streams[f"{i}-{layer}"], shift, axis=0) for layer in (1, 3)]
        act_TF, _ = expected_scores(watchlist, of_request)
        scores = Scores(opened=None)  # type: ignore[arg-type]  # nothing here reads it
        scores.at = dict(enumerate(act_TF))
        scores.norm_at = {t: np.array([np.linalg.norm(x_TD[t]) for x_TD in of_request]) for t in range(len(tokens))}
        made.append(scores)
    return made


def compared(watchlist: Watchlist, told: list[Scores], streams: dict[str, Any]) -> Comparison:
    found = compare(watchlist, told, TOKENS, streams, TOLERANCE)
    assert found is not None
    return found


def test_scores_of_the_streams_are_exact(watchlist: Watchlist, streams: dict[str, Any]):
    found = compared(watchlist, told(watchlist, streams), streams)
    assert found.exact
    assert found.positions == 55


def test_scores_of_the_position_before_are_not(watchlist: Watchlist, streams: dict[str, Any]):
    found = compared(watchlist, told(watchlist, streams, shift=1), streams)
    assert found.beyond == 55
    assert not found.same_place


def test_scores_of_another_layer_are_not(watchlist: Watchlist, streams: dict[str, Any]):
    swapped = {f"{i}-{layer}": streams[f"{i}-{4 - layer}"] for i in (0, 1) for layer in (1, 3)}
    assert not compared(watchlist, told(watchlist, swapped), streams).exact


def test_one_missing_position_is_not_exact(watchlist: Watchlist, streams: dict[str, Any]):
    scores = told(watchlist, streams)
    del scores[1].at[7]
    found = compared(watchlist, scores, streams)
    assert (found.exact, found.beyond) == (False, 1)


def test_streams_in_which_all_positions_are_alike_prove_nothing(watchlist: Watchlist, streams: dict[str, Any]):
    alike = {name: np.ones_like(x_TD) for name, x_TD in streams.items()}
    found = compared(watchlist, told(watchlist, alike), alike)
    assert found.beyond == 0
    assert not found.exact


def test_streams_of_another_width_are_not_compared(watchlist: Watchlist, streams: dict[str, Any]):
    wide = {name: np.concatenate([x_TD, x_TD], axis=1) for name, x_TD in streams.items()}
    assert compare(watchlist, told(watchlist, streams), TOKENS, wide, TOLERANCE) is None


EXACT = Comparison(positions=55, worst=1e-3, beyond=0, median=1e-4, neighbour=2.0)
SLIGHTLY_OFF = Comparison(positions=55, worst=2e-2, beyond=3, median=1e-3, neighbour=2.0)
WRONG = Comparison(positions=55, worst=3.6, beyond=55, median=1.0, neighbour=2.0)


@pytest.mark.parametrize(
    ("hugging_face", "engine", "alike", "outcome"),
    [
        (EXACT, EXACT, 1.0, "exact"),
        (EXACT, WRONG, 1.0, "exact"),
        (SLIGHTLY_OFF, EXACT, 1.0, "exact"),
        (WRONG, EXACT, 0.4, "exact"),
        (None, EXACT, None, "exact"),
        # The same answers from another stream: what the engine's modules are given is not the stream.
        (WRONG, EXACT, 1.0, "wrong"),
        (SLIGHTLY_OFF, WRONG, 1.0, "wrong"),
        (WRONG, WRONG, 0.4, "wrong"),
        (None, None, None, "not_compared"),
    ],
)
def test_the_engines_own_word_counts_only_where_its_model_is_another(
    hugging_face: Comparison | None, engine: Comparison | None, alike: float | None, outcome: str
):
    assert verdict(hugging_face, engine, alike, "", [], TOLERANCE)["outcome"] == outcome


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("(EngineCore) ERROR ValueError: no\n  File\nRuntimeError: because\nINFO\n", "RuntimeError: because"),
        ("ValidationError: 1 error\n  Value error, no such\n    more", "ValidationError: 1 error Value error, no such"),
        ("    assert kind == 'known'\n           ^^^^\nAssertionError\n", "AssertionError: assert kind == 'known'"),
        ("killed", "killed"),
    ],
)
def test_the_reason_is_the_last_error_of_a_log(log: str, reason: str):
    assert error_of(log) == reason
