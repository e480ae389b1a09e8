"""What a checkpoint's folder says of its model: the same however it is saved, and another for other weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from latentwatch.cli import main
from latentwatch.errors import WatchlistRefused
from latentwatch.names import ModelMatch
from latentwatch.watchlist import checkpoint
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.build import build
from latentwatch.watchlist.checkpoint import compare, of_checkpoint, plain_name

from tests.support import tiny
from tests.support.sources import LAYERS, D, document, hook, probe, source, write_yaml

Weights = dict[str, np.ndarray]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "vocab_size": 100,
    "rope_theta": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.50.0",
    "_name_or_path": "somebody/model",
}
TOKENIZER = {
    "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}


def weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    made = {"model.embed_tokens.weight": rng.normal(size=(100, D)), "lm_head.weight": rng.normal(size=(100, D))}
    for layer in range(LAYERS):
        made[f"model.layers.{layer}.mlp.up_proj.weight"] = rng.normal(size=(2 * D, D))
        made[f"model.layers.{layer}.input_layernorm.weight"] = rng.normal(size=D)
    return {name: value.astype(np.float32) for name, value in made.items()}


def saved(
    folder: Path,
    tensors: Weights | None = None,
    *,
    shards: int = 1,
    config: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    indent: int | None = None,
) -> Path:
    """A checkpoint in Hugging Face's layout."""
    folder.mkdir()
    tensors = weights() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config or CONFIG, indent=indent))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or TOKENIZER, indent=indent))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    placed = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(placed.values()):
        safetensors.numpy.save_file({n: v for n, v in tensors.items() if placed[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


@pytest.fixture
def stated(tmp_path: Path) -> Any:
    return of_checkpoint(saved(tmp_path / "stated"))


def test_one_checkpoint_is_the_same_however_it_is_saved(stated: Any, tmp_path: Path) -> None:
    assert stated.tensors == 2 + 2 * LAYERS and len(stated.samples) == stated.tensors and stated.tokenizer
    assert of_checkpoint(saved(tmp_path / "sharded", shards=3)) == stated
    again = {**CONFIG, "torch_dtype": "bfloat16", "transformers_version": "5.1", "new_default": 1}
    del again["rope_scaling"]
    laid_out_anew = saved(tmp_path / "again", shards=2, config=again, indent=1)
    assert compare(stated, laid_out_anew) == checkpoint.Comparison(ModelMatch.SAME, "")
    nested = {f"language_model.{name}": value for name, value in weights().items()}
    assert compare(stated, saved(tmp_path / "nested", nested)).match is ModelMatch.SAME
    tied = {**CONFIG, "tie_word_embeddings": True}
    without = {name: value for name, value in weights().items() if name != "lm_head.weight"}
    with_head = of_checkpoint(saved(tmp_path / "with", config=tied))
    assert compare(with_head, saved(tmp_path / "without", without, config=tied)).match is ModelMatch.SAME
    beside = saved(tmp_path / "beside", shards=2)
    shutil.copy(tmp_path / "stated" / "model.safetensors", beside / "consolidated.safetensors")
    assert compare(stated, beside).match is ModelMatch.SAME


def test_weights_that_were_rounded_to_another_type_are_the_same(stated: Any, tmp_path: Path) -> None:
    half = {name: value.astype(np.float16) for name, value in weights().items()}
    assert compare(stated, saved(tmp_path / "half", half)).match is ModelMatch.SAME
    others = {name: value.astype(np.float16) for name, value in weights(1).items()}
    assert compare(stated, saved(tmp_path / "others", others)).match is ModelMatch.DIFFERS


def one_value(tensors: Weights) -> None:
    tensors["model.layers.0.input_layernorm.weight"] *= np.float32(1.0001)


def another_name(tensors: Weights) -> None:
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")


def another_tensor(tensors: Weights) -> None:
    tensors["model.layers.0.mlp.extra"] = np.zeros(3, np.float32)


def another_shape(tensors: Weights) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:D]


def others(tensors: Weights) -> None:
    tensors.update(weights(1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_value, "layers.0.input_layernorm.weight are others"),
        (another_name, "tensors"),
        (another_tensor, "15 tensors, not the 14"),
        (another_shape, "tensors"),
        (others, "are others"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_weights_of_the_same_shape_differ(
    change: Callable[[Weights], None], said: str, stated: Any, tmp_path: Path
) -> None:
    tensors = weights()
    change(tensors)
    folder = saved(tmp_path / "other", tensors)
    assert of_checkpoint(folder) != stated
    found = compare(stated, folder)
    assert found.match is ModelMatch.DIFFERS and said in found.text


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        ({"rope_theta": 500000.0}, {}, "rope_theta is 500000.0 and not 10000.0"),
        ({"rope_scaling": {"factor": 4.0}}, {}, "rope_scaling.factor"),
        ({}, {"rope_theta": 500000.0}, "rope_theta"),
    ],
)
def test_another_config_differs(
    config: dict[str, Any], overrides: dict[str, Any], said: str, stated: Any, tmp_path: Path
) -> None:
    found = compare(stated, saved(tmp_path / "other", config={**CONFIG, **config}), overrides=overrides)
    assert found.match is ModelMatch.DIFFERS and said in found.text


@pytest.mark.parametrize(
    "tokenizer",
    [
        {**TOKENIZER, "added_tokens": [{"id": 3, "content": "<t>"}]},
        {**TOKENIZER, "model": {**TOKENIZER["model"], "vocab": {"a": 1, "b": 0, "ab": 2}}},
        {**TOKENIZER, "model": {**TOKENIZER["model"], "merges": ["a b", "b a"]}},
    ],
)
def test_another_tokenizer_differs(tokenizer: dict[str, Any], stated: Any, tmp_path: Path) -> None:
    found = compare(stated, saved(tmp_path / "other", tokenizer=tokenizer))
    assert found.match is ModelMatch.DIFFERS and "tokenizer" in found.text


def test_a_tokenizer_that_was_written_again_is_the_same(stated: Any, tmp_path: Path) -> None:
    again = {**TOKENIZER, "truncation": None, "model": {**TOKENIZER["model"], "merges": [["a", "b"]]}}
    assert compare(stated, saved(tmp_path / "again", tokenizer=again)).match is ModelMatch.SAME


def quantised(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "awq"}}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def torn(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"torn")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize("change", [quantised, pickled, torn, gone])
def test_what_cannot_be_compared_is_no_difference_and_is_said(
    change: Callable[[Path], None], stated: Any, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "other")
    change(folder)
    found = compare(stated, folder)
    assert found.match is ModelMatch.UNKNOWN and "weights" in found.text


def test_names_of_another_layout_altogether_are_no_difference(stated: Any, tmp_path: Path) -> None:
    renamed = {f"blk.{i}": value for i, value in enumerate(weights().values())}
    assert compare(stated, saved(tmp_path / "other", renamed)).match is ModelMatch.UNKNOWN


def test_a_slow_disk_ends_the_comparison_and_not_the_start(stated: Any, tmp_path: Path) -> None:
    asked = iter([True, True, False])
    found = compare(stated, tmp_path / "stated", go_on=lambda: next(asked))
    assert found == checkpoint.Comparison(ModelMatch.UNKNOWN, "values of 2 of 14 tensors were compared, all the same")


def test_a_model_of_many_tensors_keeps_values_of_some_of_all_layers(tmp_path: Path) -> None:
    many = {f"model.layers.{i}.weight": np.full(40, i, np.float32) for i in range(1000)}
    stated = of_checkpoint(saved(tmp_path / "many", many))
    assert len(stated.samples) == checkpoint.SAMPLED and stated.tensors == 1000
    assert len(json.dumps(dataclasses.asdict(stated))) < 64_000


def test_names_without_their_layout() -> None:
    for name in ("model.layers.0.w", "language_model.model.layers.0.w", "transformer.layers.0.w", "layers.0.w"):
        assert plain_name(name) == "layers.0.w"


# -- on the card


def watch(folder: Path, **model: Any) -> Path:
    """A watchlist.yaml of a probe, beside a checkpoint in `model`."""
    probe(folder / "p.safetensors", metadata={"hook_point": "resid_post.1"})
    made = document(hook(1, source("linear_probe", "p.safetensors")))
    made["model"] = {"name": "tiny", "dtypes": ["float32"], **model}
    return write_yaml(folder / "w.yaml", made)


SIZES = {"architecture": "LlamaForCausalLM", "d_model": D, "layers": LAYERS, "vocab_size": 100}


@pytest.mark.parametrize(
    "model", [{"config": "model"}, {"config": "model/config.json"}, {**SIZES, "checkpoint": "model"}]
)
def test_a_build_states_the_checkpoint_and_every_view_of_the_file_shows_it(
    model: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "model")
    yaml = watch(tmp_path, **model)
    assert main(["watchlist", "build", str(yaml), "--out", str(tmp_path / "w")]) == 0
    assert "14 tensors" in capsys.readouterr().err
    read = watchlist_file.read(tmp_path / "w")
    assert read.identity == of_checkpoint(tmp_path / "model")
    for action in (["show"], ["verify"], ["show", "--html", str(tmp_path / "page.html")]):
        assert main(["watchlist", action[0], str(tmp_path / "w"), *action[1:]]) == 0
    assert capsys.readouterr().out.count("values of 14 of them") == 2
    assert "values of 14 of them" in (tmp_path / "page.html").read_text()
    # Changed weights are a difference to the YAML, and a byte of the identity is a damaged file.
    (tmp_path / "model/model.safetensors").unlink()
    safetensors.numpy.save_file(weights(1), tmp_path / "model/model.safetensors")
    assert main(["watchlist", "verify", str(tmp_path / "w"), "--against", str(yaml)]) == 1
    assert "identity" in capsys.readouterr().out
    data = (tmp_path / "w").read_bytes()
    tensor = next(iter(read.identity.samples.values()))[5:13].encode()
    with pytest.raises(WatchlistRefused):
        watchlist_file.parse(data.replace(tensor, b"00000000", 1))


def test_verify_says_whether_a_checkpoint_is_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "model")
    saved(tmp_path / "other", weights(1))
    build(watch(tmp_path, config="model"), tmp_path / "w")
    assert main(["watchlist", "verify", str(tmp_path / "w"), "--model", str(tmp_path / "model")]) == 0
    assert main(["watchlist", "verify", str(tmp_path / "w"), "--model", str(tmp_path / "other")]) == 1
    assert "differs: the values of" in capsys.readouterr().out


def test_a_file_without_an_identity_is_read_and_says_not_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As every version before wrote it, and as a YAML with sizes alone still does."""
    build(watch(tmp_path, **SIZES), tmp_path / "w")
    assert b'"identity"' not in (tmp_path / "w").read_bytes()
    read = watchlist_file.read(tmp_path / "w")
    assert read.identity is None
    assert compare(read.identity, tmp_path).match is ModelMatch.NOT_STATED
    assert main(["watchlist", "show", str(tmp_path / "w")]) == 0
    assert "identity: not stated" in capsys.readouterr().out


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WatchlistRefused, match=r"model\.checkpoint"):
        build(watch(tmp_path, **SIZES, checkpoint="nowhere"), tmp_path / "w")


def test_what_transformers_saves_again_is_the_same_and_another_seed_is_not(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stated = tiny.llama(tmp_path / "a")
    tiny.save_tokenizer(stated)
    identity = of_checkpoint(stated)
    model = AutoModelForCausalLM.from_pretrained(stated)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    AutoTokenizer.from_pretrained(stated).save_pretrained(tmp_path / "sharded")
    model.to(torch.float16).save_pretrained(tmp_path / "half")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for name in ("sharded", "half"):
        assert compare(identity, tmp_path / name) == checkpoint.Comparison(ModelMatch.SAME, "")
    assert compare(identity, tiny.llama(tmp_path / "b", seed=1)).match is ModelMatch.DIFFERS
