"""`hf:` references go through the hub client, here against a local cache: no test reaches a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from latentwatch.errors import WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist.build import build
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import SourceOptions, open_source

from tests.support.parity import GOLDEN
from tests.support.sources import document, hook, source, write_yaml

hub = pytest.importorskip("huggingface_hub")
COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one repository, in the layout that the client writes; the client is offline."""
    repository = tmp_path / "hub" / "models--owner--tiny-saes"
    shutil.copytree(GOLDEN / "saelens_jumprelu_none_b_dec", repository / "snapshots" / COMMIT / "layer_3")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_hub_reference_reads_from_the_cache(cache: Path, revision: str) -> None:
    location = Location(f"hf:owner/tiny-saes{revision}/layer_3", Path())
    source = open_source("saelens", location, HookPoint(3), SourceOptions())
    assert source.about.width == 24
    assert source.rows([0]).w_KD.shape == (1, 16)


def test_two_names_of_one_revision_are_one_source(cache: Path, tmp_path: Path) -> None:
    rows = [{"index": 1, "id": "again", "label": "x"}]
    content = document(
        hook(
            3,
            source("saelens", "hf:owner/tiny-saes@main/layer_3"),
            source("saelens", f"hf:owner/tiny-saes@{COMMIT}/layer_3", rows),
        )
    )
    with pytest.raises(WatchlistRefused, match="watched already at"):
        build(write_yaml(tmp_path / "w.yaml", content), tmp_path / "out.safetensors")


@pytest.mark.parametrize("path", ["layer_9/../layer_3", "./layer_3"])
def test_a_path_in_the_hub_is_written_out(cache: Path, path: str) -> None:
    with pytest.raises(WatchlistRefused, match="Write the path out"):
        open_source("saelens", Location(f"hf:owner/tiny-saes/{path}", Path()), HookPoint(3), SourceOptions())


@pytest.mark.parametrize(
    "text", ["hf:owner/tiny-saes/layer_9", "hf:owner/other/layer_3", "hf:owner/tiny-saes@v2/layer_3", "hf:owner"]
)
def test_what_the_hub_does_not_give_is_refused(cache: Path, text: str) -> None:
    with pytest.raises(WatchlistRefused) as refusal:
        open_source("saelens", Location(text, Path()), HookPoint(3), SourceOptions())
    assert text in refusal.value.what
    assert refusal.value.instead


def test_a_folder_path_in_place_of_a_file_says_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "sae").mkdir()
    with pytest.raises(WatchlistRefused, match="only an empty folder"):
        Location("sae", tmp_path).file("cfg.json")
    with pytest.raises(WatchlistRefused, match="no file there"):
        Location("missing.pt", tmp_path).file()
