"""`latentwatch watchlist start` from the model's folder to a watchlist that an engine loads, on a small real model."""

from __future__ import annotations

import json
from pathlib import Path

import latentwatch.demo
import pytest
from latentwatch.cli import main
from latentwatch.watchlist import file as watchlist_file

from tests.support.engines import cache_root

pytestmark = pytest.mark.engine
MODEL = Path(latentwatch.demo.__file__).parent / "assets" / "model"


def start(out: Path, *options: str) -> int:
    concerns = ["--concerns", "refusal,toxicity", "--layers", "1,2"]
    return main(["watchlist", "start", "--model", str(MODEL), "--out", str(out), *concerns, *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("starter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(cache_root()))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        assert start(out) == 0
    return out


def test_the_watchlist_is_built_with_a_limit_and_figures_for_each_concern(made: Path):
    watchlist = watchlist_file.read(made / "starter.safetensors")
    assert {feature.id for feature in watchlist.features} == {"refusal", "toxicity"}
    for feature in watchlist.features:
        assert feature.limit is not None
        assert feature.skip_first_positions >= 1
        assert "best text classifier" in str(feature.evidence["remarks"])


def test_the_figures_are_of_families_that_are_for_the_test(made: Path):
    rows = json.loads((made / "detectors.json").read_text())["rows"]
    assert {row["family"] for row in rows if row["concern"] == "toxicity"} >= {"contempt", "sneer"}
    assert {row["negatives"] for row in rows} == {"hard", "ordinary"}


def test_a_second_run_is_refused_and_with_force_captures_nothing_anew(made: Path, capsys: pytest.CaptureFixture[str]):
    assert start(made) == 2
    assert "Add --force" in capsys.readouterr().err
    assert start(made, "--force") == 0
    told = capsys.readouterr().err
    assert "going on" in told
    assert "captured part" not in told
