"""`watchlist verify --activations` says whether the scores are the library's, and whether the SAE fits the stream."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from latentwatch.errors import WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical, upstream, verify
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.build import build
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import SourceOptions, open_source

from tests.support.parity import GOLDEN, cases
from tests.support.sources import D, F, document, hook, probe, saelens, source, write_yaml


@pytest.fixture
def good_sae(tmp_path: Path) -> np.ndarray:
    """An SAE that explains its stream: every token is a sum of a few decoder rows. Gives recorded tokens [T, D]."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(D, D)))[0]
    w_dec = np.concatenate([directions, -directions])[:F]
    weights = {
        "W_enc": w_dec.T,
        "W_dec": w_dec,
        "b_enc": np.zeros(F),
        "b_dec": np.zeros(D),
        "threshold": np.full(F, 0.5),
    }
    saelens(tmp_path / "sae")
    float32 = {name: np.ascontiguousarray(array, np.float32) for name, array in weights.items()}
    safetensors.numpy.save_file(float32, tmp_path / "sae" / "sae_weights.safetensors")
    codes = rng.exponential(3, size=(500, F)) * (rng.random((500, F)) < 0.2) * (np.arange(F) < D)
    return np.asarray(codes @ w_dec)


def measured(tmp_path: Path, x: np.ndarray, content: dict[str, Any] | None = None) -> list[verify.Measured]:
    yaml_path = write_yaml(tmp_path / "w.yaml", content or document(hook(2, source("saelens", "sae", 8))))
    build(yaml_path, tmp_path / "out.safetensors")
    safetensors.numpy.save_file({"x": x.astype(np.float32)}, tmp_path / "x.safetensors")
    return list(
        verify.measure(watchlist_file.read(tmp_path / "out.safetensors"), yaml_path, [tmp_path / "x.safetensors"])
    )


def test_a_sound_watchlist_has_small_errors_and_explains_its_stream(tmp_path: Path, good_sae: np.ndarray) -> None:
    (one,) = measured(tmp_path, good_sae)
    assert one.max_abs_error <= 1e-5 * max(1, one.largest)
    assert one.gate_flips == 0
    assert one.unexplained is not None
    assert one.unexplained < 0.1
    assert one.l0 == pytest.approx(0.2 * D, rel=0.3)
    assert one.problems == []


def test_recordings_of_another_place_are_told_by_the_variance_they_leave(tmp_path: Path, good_sae: np.ndarray) -> None:
    """The scores agree even on a wrong stream, so agreement alone would let a wrong hook point through."""
    elsewhere = np.random.default_rng(1).normal(size=good_sae.shape) * 0.05 + 3
    (one,) = measured(tmp_path, elsewhere)
    assert one.max_abs_error <= 1e-4
    assert any("unexplained" in problem for problem in one.problems)


def test_rows_of_another_sae_are_told_by_their_scores(tmp_path: Path, good_sae: np.ndarray) -> None:
    measured(tmp_path, good_sae)
    built = watchlist_file.read(tmp_path / "out.safetensors")
    saelens(tmp_path / "sae", seed=5)
    (one,) = verify.measure(built, tmp_path / "w.yaml", [tmp_path / "x.safetensors"])
    assert any("scores" in problem for problem in one.problems)
    assert any("PROBLEM" in line for line in verify.report(one))


def test_an_l0_far_from_the_declared_one_is_a_problem(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "gemma_scope", tmp_path, dirs_exist_ok=True)
    path = "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_71"
    x = safetensors.numpy.load_file(tmp_path / "expected.safetensors")["x"]
    (one,) = measured(tmp_path, x, document(hook(3, source("gemma_scope", path, 4))))
    assert one.declared_l0 == 71
    assert any("71 are declared" in problem for problem in one.problems)


def test_probes_are_compared_by_their_scores_alone(tmp_path: Path, good_sae: np.ndarray) -> None:
    probe(tmp_path / "p.safetensors")
    (one,) = measured(
        tmp_path,
        good_sae,
        document(hook(2, source("linear_probe", "p.safetensors", options={"trained_on": "resid_post.2"}))),
    )
    assert (one.l0, one.unexplained, one.gate) == (None, None, "none")
    assert one.problems == []


def test_a_recording_without_its_hook_point_is_refused_where_there_are_several(
    tmp_path: Path, good_sae: np.ndarray
) -> None:
    probe(tmp_path / "p.safetensors")
    content = document(
        *(
            hook(i, source("linear_probe", "p.safetensors", prefix=f"p{i}.", options={"trained_on": f"resid_post.{i}"}))
            for i in (1, 2)
        )
    )
    with pytest.raises(WatchlistRefused, match="names no hook_point"):
        measured(tmp_path, good_sae, content)


def test_the_librarys_own_encode_is_asked_where_it_is_installed(
    tmp_path: Path, good_sae: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(tmp_path, good_sae)
    built = watchlist_file.read(tmp_path / "out.safetensors")
    wrong = upstream.Upstream("sae-lens 6.54.12", lambda x_TD: np.ones((len(x_TD), F)))
    monkeypatch.setattr(upstream, "load", lambda *_: wrong)
    (one,) = verify.measure(built, tmp_path / "w.yaml", [tmp_path / "x.safetensors"])
    assert one.compared_with == "sae-lens 6.54.12"
    assert one.problems


def with_decoder() -> list[str]:
    return [name for name in cases() if not name.startswith(("circuit", "control", "persona", "sklearn"))]


@pytest.mark.parametrize("case", with_decoder())
def test_every_sae_has_a_decoder_of_the_streams_width_except_transcoders(case: str) -> None:
    import json

    spec = json.loads((GOLDEN / case / "case.json").read_text())
    made = open_source(
        spec["format"],
        Location(spec["path"], GOLDEN / case),
        HookPoint(spec["layer"]),
        SourceOptions(**spec.get("options", {})),
    )
    if "transcoder" in made.about.architecture:
        assert made.decoder is None
        return
    assert made.decoder is not None
    assert made.decoder.rows([0, 5]).shape == (2, 16)
    assert made.decoder.bias().shape == (16,)


def test_the_authors_formula_equals_the_folded_rows_where_nothing_is_rounded() -> None:
    made = open_source(
        "saelens", Location(".", GOLDEN / "saelens_gated_layer_norm_b_dec"), HookPoint(3), SourceOptions()
    )
    x = safetensors.numpy.load_file(GOLDEN / "saelens_gated_layer_norm_b_dec" / "expected.safetensors")["x"]
    rows = made.rows(range(24))
    folded = canonical.activations(*canonical.fold(rows), x.astype(np.float64))
    np.testing.assert_allclose(canonical.authors(rows, x.astype(np.float64)), folded, atol=2e-5)
