"""Whether the served model is the watchlist's: found, told, refused where it is asked for, and no reason to die."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from latentwatch.engines.vllm import served_model
from latentwatch.engines.vllm.attach import Attachment
from latentwatch.engines.vllm.settings import PluginSettings
from latentwatch.facts import IDENTITY_TEXT_CHARACTERS
from latentwatch.names import ModelMatch
from latentwatch.watchlist import checkpoint
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.identity import ModelIdentity

from tests.support import tiny
from tests.support.fake_model import Worker, lone_forward
from tests.unit.watchlist.test_checkpoint import saved, weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "model")


@pytest.fixture
def watchlist(folder: Path, tmp_path: Path) -> Path:
    """Of the fake worker's sizes, stating the model in `folder`."""
    path = tmp_path / "w.safetensors"
    made = tiny.watchlist(path)
    watchlist_file.write(dataclasses.replace(made, identity=checkpoint.of_checkpoint(folder)), path)
    return path


def config(folder: Path | str, load_format: str = "auto", **model: Any) -> Any:
    fields = {"model": str(folder), "revision": None, "hf_overrides": {}, **model}
    load = SimpleNamespace(load_format=load_format, download_dir=None)
    return SimpleNamespace(model_config=SimpleNamespace(**fields), load_config=load)


def attached(watchlist: Path, folder: Path, *, strict: bool = False) -> Attachment:
    worker: Any = Worker()
    told = config(folder)
    worker.vllm_config.load_config = told.load_config
    vars(worker.vllm_config.model_config).update(vars(told.model_config))
    chosen = PluginSettings(str(watchlist), "", "here", disabled=False, strict_model=strict)
    attachment = Attachment(worker, chosen, lone_forward)
    worker.load_model()
    worker.compile_or_warm_up_model()
    return attachment


def test_the_watchlists_own_model_arms_in_silence(watchlist: Path, folder: Path, caplog: Any) -> None:
    attachment = attached(watchlist, folder, strict=True)
    assert attachment._hooks and attachment._identity("").model_match == "same"
    assert "ANOTHER" not in caplog.text


def test_another_model_of_the_same_shape_arms_with_a_warning_and_says_so_to_the_collector(
    watchlist: Path, tmp_path: Path, caplog: Any
) -> None:
    attachment = attached(watchlist, saved(tmp_path / "other", weights(1)))
    said = attachment._identity("")
    assert attachment._hooks and said.armed and said.model_match == "differs" and "are others" in said.model_text
    assert "ANOTHER MODEL than watchlist 'tiny'" in caplog.text


def test_strictly_another_model_is_refused_by_name(watchlist: Path, tmp_path: Path) -> None:
    attachment = attached(watchlist, saved(tmp_path / "other", weights(1)), strict=True)
    said = attachment._identity("")
    assert not attachment._hooks and not said.armed and said.not_armed_reason == "watchlist_model"
    assert said.model_match == "differs" and "LATENTWATCH_STRICT_MODEL" in said.not_armed_text


def test_a_watchlist_without_an_identity_says_not_stated_and_is_armed_strictly_too(tmp_path: Path) -> None:
    tiny.watchlist(tmp_path / "w.safetensors")
    attachment = attached(tmp_path / "w.safetensors", saved(tmp_path / "any"), strict=True)
    assert attachment._hooks and attachment._identity("").model_match == "not_stated"


@pytest.mark.parametrize("strict", [False, True])
def test_whatever_goes_wrong_in_comparing_is_unknown(
    strict: bool, watchlist: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("x" * 5000)

    monkeypatch.setattr(checkpoint, "compare", fail)
    attachment = attached(watchlist, folder, strict=strict)
    said = attachment._identity("")
    assert attachment._hooks and said.model_match == "unknown" and len(said.model_text) == IDENTITY_TEXT_CHARACTERS


@pytest.mark.parametrize(
    ("load_format", "match"),
    [
        ("auto", ModelMatch.SAME),
        ("safetensors", ModelMatch.SAME),
        ("dummy", ModelMatch.DIFFERS),
        ("gguf", ModelMatch.UNKNOWN),
        ("tensorizer", ModelMatch.UNKNOWN),
    ],
)
def test_what_the_way_of_loading_says(load_format: str, match: ModelMatch, watchlist: Path, folder: Path) -> None:
    assert served_model.compared(config(folder, load_format), watchlist_file.read(watchlist)).match is match


def test_what_an_operator_overrides_counts(watchlist: Path, folder: Path) -> None:
    read = watchlist_file.read(watchlist)
    assert served_model.compared(config(folder, hf_overrides={"rope_theta": 1.0}), read).match is ModelMatch.DIFFERS
    assert served_model.compared(config(folder, hf_overrides=lambda c: c), read).match is ModelMatch.SAME


def test_a_model_of_the_hub_is_found_in_its_cache(
    watchlist: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = watchlist_file.read(watchlist)
    asked: list[Any] = []

    def cached(model: str, name: str, **where: Any) -> Any:
        asked.append((model, name, where))
        return str(folder / name) if model == "somebody/model" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert served_model.compared(config("somebody/model", revision="v1"), read).match is ModelMatch.SAME
    assert asked == [("somebody/model", "config.json", {"cache_dir": None, "revision": "v1"})]
    assert served_model.compared(config("somebody/else"), read).match is ModelMatch.UNKNOWN


def test_slow_reads_end_after_some_seconds(watchlist: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_model, "SECONDS", -1.0)
    found = served_model.compared(config(folder), watchlist_file.read(watchlist))
    assert found.match is ModelMatch.UNKNOWN and "values of 0 of 14" in found.text


def test_the_setting_is_read_from_the_environment() -> None:
    assert PluginSettings.from_env({"LATENTWATCH_STRICT_MODEL": "1"}).strict_model
    assert not PluginSettings.from_env({"LATENTWATCH_STRICT_MODEL": "0"}).strict_model
    assert not PluginSettings.from_env({}).strict_model


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_what_is_no_file_in_the_models_folder_is_not_read(watchlist: Path, tmp_path: Path, name: str) -> None:
    """Nobody writes into this pipe: whoever opens it waits for ever, before the server is up."""
    other = saved(tmp_path / "other")
    (other / name).unlink(missing_ok=True)
    os.mkfifo(other / name)
    found: list[Any] = []
    stated = watchlist_file.read(watchlist)
    reading = threading.Thread(target=lambda: found.append(served_model.compared(config(other), stated)), daemon=True)
    reading.start()
    reading.join(20.0)
    assert found and found[0].match != "differs"


def test_weights_in_more_files_than_there_is_time_for_are_not_compared(
    watchlist: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    opened: list[Path] = []
    monkeypatch.setattr(checkpoint, "SafetensorsFile", opened.append)
    found = checkpoint.compare(watchlist_file.read(watchlist).identity, folder, go_on=lambda: False)
    assert (found.match, len(opened)) == ("unknown", 1) and "takes too long" in found.text


@pytest.mark.parametrize(
    "lie",
    [
        {"samples": {"a": "BF16:zz"}},
        {"samples": {"a": "F16:abc"}},
        {"samples": {"a": ""}},
        {"samples": {"a": 5}},
        {"samples": [1]},
        {"config": [1]},
        {"tokenizer": {"vocabulary": 5}},
        {"tokenizer": "x"},
        {"tensors_sha256": 5},
    ],
    ids=str,
)
def test_an_identity_that_nothing_can_be_compared_with_is_refused_where_it_is_read(lie: dict[str, Any]) -> None:
    """Not compared, it would pass for one that is not known, and be armed strictly too."""
    with pytest.raises(ValueError, match="identity"):
        ModelIdentity(**lie)
