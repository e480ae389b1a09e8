"""Labels of others keep their source, and a damaged list is refused instead of shifting every label by one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from latentwatch.errors import WatchlistRefused
from latentwatch.watchlist import labels
from latentwatch.watchlist.build import build
from latentwatch.watchlist.location import Location

from tests.support.sources import document, hook, saelens, source, write_yaml


def neuronpedia(folder: Path, layer: str | None = "2-res-16k") -> Path:
    """An export: `index` is text, batches are in text order, and a feature may have several explanations."""
    described = [
        ("10", "lies about\n capabilities", "gpt-4o-mini"),
        ("0", "full stops", "gpt-4o-mini"),
        ("10", "a second opinion", "other"),
    ]
    rows = [
        {"modelId": "tiny", "layer": layer, "index": index, "description": text, "explanationModelName": model}
        for index, text, model in described
    ]
    (folder / "explanations").mkdir(parents=True)
    with gzip.open(folder / "explanations" / "batch-0.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_a_neuronpedia_export_is_read_by_its_text_index(tmp_path: Path) -> None:
    neuronpedia(tmp_path / "export")
    got = labels.load("neuronpedia", Location("export", tmp_path))
    assert got == {
        0: labels.Label("full stops", "Neuronpedia, gpt-4o-mini"),
        10: labels.Label("lies about capabilities", "Neuronpedia, gpt-4o-mini"),
    }


@pytest.mark.parametrize(
    ("form", "name", "text"),
    [
        ("json", "a.json", '{"3": "three", "12": "twelve"}'),
        ("json", "a.json", '[{"index": 3, "label": "three"}, {"feature": "12", "description": "twelve"}]'),
        ("csv", "a.csv", "index,label\n3,three\n12,twelve\n"),
        ("csv", "a.csv", '\ufefffeature,density,description\n12,0.1,"twelve"\n3,,three\n'),
    ],
)
def test_lists_of_several_shapes_are_read(tmp_path: Path, form: str, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    got = labels.load(form, Location(name, tmp_path))
    assert {index: label.text for index, label in got.items()} == {3: "three", 12: "twelve"}
    assert all(label.source == f"list {name}" for label in got.values())


@pytest.mark.parametrize(
    ("form", "text", "found"),
    [
        ("json", "{", "not JSON"),
        ("json", '"text"', "no labels"),
        ("json", '{"-1": "x"}', "index '-1'"),
        ("json", '{"1": ""}', "label ''"),
        ("json", '{"1": ["x"]}', "label"),
        ("json", "[3]", "entry 0"),
        ("csv", "index,label\nx,three\n", "line 2 has index 'x'"),
        ("csv", "a,b\n1,2\n", "line 2"),
        ("csv", "", "no labels"),
    ],
)
def test_a_damaged_list_is_refused_with_its_place(tmp_path: Path, form: str, text: str, found: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(WatchlistRefused) as refusal:
        labels.load(form, Location("list", tmp_path))
    assert found in str(refusal.value)


def test_a_truncated_export_is_refused(tmp_path: Path) -> None:
    path = next(neuronpedia(tmp_path / "export").glob("explanations/*"))
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(WatchlistRefused, match=r"batch-0\.jsonl\.gz line"):
        labels.load("neuronpedia", Location("export", tmp_path))


def test_search_needs_every_word_in_any_order_and_case() -> None:
    known = {i: labels.Label(text, "s") for i, text in enumerate(["Deceives the user", "the USER asks", "deceit"])}
    assert [index for index, _ in labels.search(known, "user DECEIVES")] == [0]
    assert [index for index, _ in labels.search(known, "user")] == [0, 1]


def test_a_feature_without_a_label_takes_that_of_a_list_and_keeps_who_wrote_it(tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    neuronpedia(tmp_path / "export")
    features = [{"index": 10, "id": "lies"}, {"index": 0, "id": "own", "label": "read by hand"}]
    lists = [{"format": "neuronpedia", "path": "export"}]
    content = document(hook(2, source("saelens", "sae", features, labels=lists)))
    built = build(write_yaml(tmp_path / "w.yaml", content), tmp_path / "out.safetensors")
    assert [feature.label for feature in built.features] == ["lies about capabilities", "read by hand"]
    assert [feature.evidence["label_source"] for feature in built.features] == [
        "Neuronpedia, gpt-4o-mini",
        "watchlist.yaml",
    ]
    content["hook_points"][0]["sources"][0]["features"].append({"index": 5, "id": "unknown"})
    with pytest.raises(WatchlistRefused, match="knows row 5"):
        build(write_yaml(tmp_path / "w.yaml", content), tmp_path / "out.safetensors")
