"""At build time a source's own library says whether its rows are right; where it cannot be asked, the card says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from latentwatch.arrays import F64
from latentwatch.errors import WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import agreement, canonical, upstream, verify
from latentwatch.watchlist.build import build
from latentwatch.watchlist.file import Watchlist
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import Source, SourceOptions, open_source

from tests.support import foreign
from tests.support.parity import GOLDEN
from tests.support.sources import F, document, hook, saelens, source, write_yaml


def built(tmp_path: Path) -> Watchlist:
    return build(
        write_yaml(tmp_path / "w.yaml", document(hook(2, source("saelens", "sae", 4)))), tmp_path / "out.safetensors"
    )


@pytest.fixture
def sae(tmp_path: Path) -> Source:
    saelens(tmp_path / "sae")
    return open_source("saelens", Location("sae", tmp_path), HookPoint(2), SourceOptions())


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[F64], F64]], None]:
    """Install a library that encodes as the given function does."""

    def install(encode: Callable[[F64], F64]) -> None:
        monkeypatch.setattr(upstream, "load", lambda *_: upstream.Upstream("a library 1.0", encode))

    return install


def float32(sae: Source, x_TD: F64) -> F64:
    """What a library gives: float32 sums."""
    rows = sae.rows(range(F))
    assert rows.offset_D is not None
    x, w, bias = (np.float32(array) for array in (x_TD - rows.offset_D, rows.w_KD, rows.bias_K))
    u = x @ w.T
    return np.float64(np.where(u > np.float32(rows.gate_K), np.maximum(u + bias, 0), 0))


def test_a_library_that_agrees_stands_on_the_card(
    tmp_path: Path, sae: Source, library: Callable[[Callable[[F64], F64]], None]
) -> None:
    library(lambda x_TD: float32(sae, x_TD))
    assert built(tmp_path).features[0].source["checked_against"] == "a library 1.0"


@pytest.mark.parametrize("how", ["scaled", "shifted", "gate", "one row", "another order", "nan", "width", "error"])
def test_a_library_that_disagrees_refuses_the_source(
    tmp_path: Path, sae: Source, library: Callable[[Callable[[F64], F64]], None], how: str
) -> None:
    def wrong(x_TD: F64) -> F64:
        act_TF = float32(sae, x_TD)
        if how == "scaled":
            return act_TF * 1.01
        if how == "shifted":
            return float32(sae, x_TD + 0.01)
        if how == "gate":
            return np.maximum(
                act_TF, canonical.authors(dataclasses.replace(sae.rows(range(F)), gate_K=-np.inf * np.ones(F)), x_TD)
            )
        if how == "width":
            return act_TF[:, 1:]
        if how == "error":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        if how == "one row":
            act_TF[:, 2] += 0.1
        return np.full_like(act_TF, np.nan) if how == "nan" else act_TF[:, ::-1] if how == "another order" else act_TF

    library(wrong)
    with pytest.raises(WatchlistRefused, match=r"a library 1\.0 gives") as refusal:
        built(tmp_path)
    assert refusal.value.reason == "source_numbers"
    assert not (tmp_path / "out.safetensors").exists()


def test_where_nobody_can_be_asked_the_card_says_so_and_verify_does_not_mind_another_judge(
    tmp_path: Path, sae: Source, monkeypatch: pytest.MonkeyPatch, library: Callable[[Callable[[F64], F64]], None]
) -> None:
    with monkeypatch.context() as away:
        away.setattr(upstream, "load", lambda *_: upstream.Upstream("sae-lens is not installed", None))
        made = built(tmp_path)
    assert made.features[0].source["checked_against"] == "unverified: sae-lens is not installed"
    library(lambda x_TD: float32(sae, x_TD))
    assert verify.differences(made, tmp_path / "w.yaml") == []


@pytest.mark.parametrize("name", foreign.names())
def test_every_installed_library_agrees_with_its_golden_cases(name: str, tmp_path: Path) -> None:
    """scikit-learn is always there with skops; where the others are, they judge too."""
    if name.startswith("sklearn"):
        pytest.importorskip("skops")
    words = foreign.fixture(name, tmp_path).judged()
    assert words.startswith("scikit-learn") if name.startswith("sklearn") else words


def test_a_library_that_cannot_read_a_file_is_no_judge_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> upstream.Encode:
        raise RuntimeError("no such tensor\nin this file")

    monkeypatch.setitem(upstream._LOADERS, "sklearn_probe", ("scikit-learn", fails))
    made = foreign.Fixture("sklearn_probe", GOLDEN / "sklearn_probe_pipeline", "probe.skops", 3, {"trained_on": "h.3"})
    pytest.importorskip("skops")
    assert "cannot read it (RuntimeError: no such tensor in this file)" in made.judged()
    monkeypatch.setitem(upstream._LOADERS, "sklearn_probe", ("no-such-package", fails))
    assert made.judged() == "unverified: no-such-package is not installed"


def test_random_tokens_are_the_same_each_time_and_of_several_lengths() -> None:
    x_TD = agreement.tokens(16)
    np.testing.assert_array_equal(x_TD, agreement.tokens(16))
    np.testing.assert_array_equal(x_TD, x_TD.astype(np.float32))
    lengths = np.linalg.norm(x_TD, axis=1)
    assert lengths.max() > 300 * lengths.min()


@pytest.mark.parametrize("error", [AttributeError("no _gate"), ImportError("no triton"), NotImplementedError("on CPU")])
def test_a_library_that_fails_for_a_reason_of_its_own_is_no_judge(
    tmp_path: Path, sae: Source, library: Callable[[Callable[[F64], F64]], None], error: Exception
) -> None:
    def fail(_: F64) -> F64:
        raise error

    library(fail)
    said = built(tmp_path).features[0].source["checked_against"]
    assert said == f"unverified: a library 1.0 cannot be asked ({type(error).__name__}: {error})"


def test_a_direction_in_float16_is_judged_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    direction_D = np.linspace(0.1, 3, F, dtype=np.float16)

    def project(hidden: F64, direction: F64) -> F64:  # as repeng.extract of 0.4.0
        return np.asarray((hidden @ direction) / np.linalg.norm(direction))

    vector = SimpleNamespace(directions={3: direction_D})
    library = SimpleNamespace(ControlVector=SimpleNamespace(import_gguf=lambda _: vector))
    library.project_onto_direction = project
    monkeypatch.setattr(upstream.importlib, "import_module", lambda _: library)
    about = SimpleNamespace(notes={"direction": "direction.3"})
    encode = upstream._repeng(None, SimpleNamespace(about=about, files=["v.gguf"]))  # type: ignore[arg-type] # stand-ins
    exact_D = direction_D.astype(np.float64)
    x_TD = agreement.tokens(F)
    np.testing.assert_allclose(encode(x_TD)[:, 0], x_TD @ exact_D / np.linalg.norm(exact_D), rtol=1e-6, atol=1e-6)
