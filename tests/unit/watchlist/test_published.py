"""Every YAML of docs/published-saes.md builds, from small files in the layout of the repository that it names."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml
from latentwatch.errors import WatchlistRefused
from latentwatch.watchlist.build import build
from latentwatch.watchlist.file import read
from latentwatch.watchlist.sources import FORMATS

from tests.support.parity import GOLDEN

pytest.importorskip("huggingface_hub")
PAGE = Path(__file__).parents[3] / "docs" / "published-saes.md"
BLOCKS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)]
COMMIT = "0" * 40
WIDTH, LAYER = 16, 3
"""Of the golden files, which the formats' own libraries wrote."""
FILES = {
    "gemma_scope_2": "gemma_scope_2/resid_post/layer_3_width_16k_l0_big",
    "saelens": "saelens_batchtopk_inference",
    "llama_scope": "llama_scope",
    "goodfire": "goodfire/Llama-3.1-8B-Instruct-SAE-l19.pth",
    "sparsify": "sparsify_topk/layers.3",
    "qwen_scope": "qwen_scope/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5/layer3.sae.pt",
    "dictionary_learning": "dictionary_learning_batchtopk",
}
"""What stands for a format's published folder or file."""


def wide(values: np.ndarray, d_model: int) -> np.ndarray:
    """The tensor with every axis of the golden width as wide as the model."""
    for axis, size in enumerate(values.shape):
        if size == WIDTH:
            values = np.repeat(values, d_model // WIDTH, axis)
    return np.array(values, order="C")


def copied(source: Path, target: Path, d_model: int, layer: int) -> None:
    """A golden file as it would be for this model and layer."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".json":
        text = source.read_text().replace(f".{LAYER}.", f".{layer}.").replace(f"layer_{LAYER}", f"layer_{layer}")
        text = re.sub(rf": {WIDTH}(?=[,}}])", f": {d_model}", text)
        target.write_text(text.replace(f'"layer": {LAYER}', f'"layer": {layer}'))
    elif source.suffix == ".safetensors":
        tensors = {name: wide(values, d_model) for name, values in safetensors.numpy.load_file(source).items()}
        safetensors.numpy.save_file(tensors, target)
    else:
        state = torch.load(io.BytesIO(source.read_bytes()), weights_only=True)
        torch.save({name: torch.from_numpy(wide(value.numpy(), d_model)) for name, value in state.items()}, target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a client that is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def publish(hub: Path, source: dict[str, Any], d_model: int, layer: int) -> None:
    """The repository of a source in the cache, in the client's own layout."""
    owner, name, *path = source["path"].removeprefix("hf:").split("/")
    repository = hub / f"models--{owner}--{name}"
    golden = GOLDEN / FILES[source["format"]]
    there = repository.joinpath("snapshots", COMMIT, *path)
    for file in [golden] if golden.is_file() else [f for f in golden.rglob("*") if f.is_file()]:
        if file.name not in ("case.json", "expected.safetensors"):
            copied(file, there if file == golden else there / file.relative_to(golden), d_model, layer)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize("block", BLOCKS, ids=[block["name"] for block in BLOCKS])
def test_a_yaml_of_the_page_builds_as_it_stands(block: dict[str, Any], hub: Path, tmp_path: Path) -> None:
    (hook,) = block["hook_points"]
    (source,) = hook["sources"]
    d_model = block["model"]["d_model"]
    publish(hub, source, d_model, int(hook["hook_point"].removeprefix("resid_post.")))
    rng = np.random.default_rng(0)
    safetensors.numpy.save_file(
        {"x": rng.normal(size=(512, d_model)).astype(np.float32)}, tmp_path / "recorded.safetensors"
    )
    (tmp_path / "watchlist.yaml").write_text(yaml.safe_dump(block))
    build(tmp_path / "watchlist.yaml", tmp_path / "out.safetensors")
    watchlist = read(tmp_path / "out.safetensors")
    assert [str(rows.hook_point) for rows in watchlist.hooks] == [hook["hook_point"]]
    (feature,) = watchlist.features
    assert feature.gate == ("calibrated" if "calibration" in source else "exact")


def test_the_page_shows_every_format_that_it_names() -> None:
    shown = {source["format"] for block in BLOCKS for hook in block["hook_points"] for source in hook["sources"]}
    named = set(re.findall(r"`(\w+)`", PAGE.read_text())) & set(FORMATS)
    assert shown == set(FILES) == named - {"gemma_scope"}, "Gemma Scope is built in test_sources.py"


def test_the_published_sae_of_the_smallest_smollm2_is_refused_by_its_place(hub: Path, tmp_path: Path) -> None:
    """It is of the MLP's output; what the page says of it stays true."""
    source: dict[str, Any] = {"format": "sparsify", "path": "hf:EleutherAI/sae-SmolLM2-135M-64x/layers.15.mlp"}
    publish(hub, source, 576, 15)
    feature = {"index": 5, "id": "x", "label": "y", "severity": "info"}
    source |= {"calibration": {"activations": "recorded.safetensors"}, "features": [feature]}
    block = {
        "name": "mlp",
        "model": {"name": "s", "architecture": "LlamaForCausalLM", "d_model": 576, "layers": 30, "vocab_size": 49152}
        | {"dtypes": ["float32"]},
        "hook_points": [{"hook_point": "resid_post.15", "sources": [source]}],
    }
    (tmp_path / "watchlist.yaml").write_text(json.dumps(block))
    with pytest.raises(WatchlistRefused, match=r"layers\.15\.mlp"):
        build(tmp_path / "watchlist.yaml", tmp_path / "out.safetensors")
