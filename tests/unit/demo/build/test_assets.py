"""The shipped files: they load, fit together, and the card says what the watchlist says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch.demo.build import dialogues as dg
from latentwatch.names import HookPoint, Severity
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist import selection

ASSETS = Path(dg.__file__).parents[1] / "assets"
MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ASSETS / "card.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def watchlist() -> watchlist_file.Watchlist:
    return watchlist_file.read(ASSETS / "demo.watchlist.safetensors")


def prompts(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ASSETS / name).read_text().splitlines()]


def test_all_assets_together_stay_below_twelve_megabytes() -> None:
    """They travel in the wheel."""
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= MAX_BYTES


def test_the_watchlist_has_32_to_64_features_at_two_hook_points_and_a_critical_probe_per_feared_topic(
    watchlist: watchlist_file.Watchlist,
) -> None:
    """SAE features at both points."""
    sae = [feature for feature in watchlist.features if feature.kind == "sae"]
    probes = [feature for feature in watchlist.features if feature.kind == "probe"]
    assert 32 <= len(sae) <= 64
    assert len(watchlist.hooks) == 2
    assert all(any(feature.kind == "sae" for feature in rows.features) for rows in watchlist.hooks)
    assert {feature.id for feature in probes} == {f"probe_{topic}" for topic in dg.topics("feared")}
    assert all(feature.severity is Severity.CRITICAL and feature.limit is not None for feature in probes)
    assert {feature.severity for feature in sae} <= {Severity.WARNING, Severity.INFO, Severity.NONE}
    assert watchlist.notes.startswith("A toy.")


def test_every_feature_carries_its_held_out_figures_as_the_card_has_them(
    watchlist: watchlist_file.Watchlist, facts: dict[str, Any]
) -> None:
    """The built file, watchlist.yaml and card.json tell the same numbers."""
    for feature in watchlist.features:
        name = feature.id.removeprefix("probe_")
        figures = facts["probes"][name] if feature.kind == "probe" else facts["features"][feature.id]
        for key in ("auroc", "tpr_at_fpr_1pct", "n", "n_positive"):
            assert feature.evidence[key] == figures["heldout"][key], (feature.id, key)
        limit = None if feature.limit is None else feature.limit.value
        assert limit == figures.get("limit"), feature.id


def test_the_yaml_asks_for_the_rows_that_the_built_file_holds(watchlist: watchlist_file.Watchlist) -> None:
    """Otherwise one was rebuilt without the other."""
    chosen = selection.load(ASSETS / "watchlist.yaml")
    asked = [
        (hook.hook_point, f.id, f.severity, f.limit) for hook in chosen.hooks for s in hook.sources for f in s.features
    ]
    built = [(rows.hook_point, f.id, f.severity, f.limit) for rows in watchlist.hooks for f in rows.features]
    assert sorted(asked, key=str) == sorted(built, key=str)


def test_the_card_in_words_holds_every_probe_figure(facts: dict[str, Any]) -> None:
    """card.md is rendered from card.json and not edited."""
    text = (ASSETS / "card.md").read_text()
    for figures in facts["probes"].values():
        assert f"{figures['heldout']['auroc']:.4f}" in text
        assert str(figures["limit"]) in text
    assert "A toy." in text


def test_the_saes_are_v6_folders_of_the_models_width(
    facts: dict[str, Any], watchlist: watchlist_file.Watchlist
) -> None:
    """1,024 features or more, JumpReLU for inference, the first position excluded on record."""
    for point in map(HookPoint.parse, facts["saes"]):
        config = json.loads((ASSETS / "sae" / str(point) / "cfg.json").read_text())
        assert (config["architecture"], config["d_in"]) == ("jumprelu", watchlist.model.d_model)
        assert config["d_sae"] >= 1024
        assert config["metadata"]["exclude_positions"] == [0]
        assert config["metadata"]["hf_hook_name"] == f"model.layers.{point.layer}"


def test_the_model_folder_is_a_small_bfloat16_llama_with_a_chat_template(watchlist: watchlist_file.Watchlist) -> None:
    """What vLLM reads."""
    config = json.loads((ASSETS / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == watchlist.model.d_model
    assert config["vocab_size"] == watchlist.model.vocab_size
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    assert "assistant" in (ASSETS / "model" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("name", "least", "kinds"), [("ordinary.jsonl", 60, {"ordinary", "near"}), ("incidents.jsonl", 20, {"feared"})]
)
def test_prompts_are_chat_messages_of_known_topics_ending_with_the_user(name: str, least: int, kinds: set[str]) -> None:
    """Ready for /v1/chat/completions; ordinary ones include near misses of every feared topic."""
    rows = prompts(name)
    assert len(rows) >= least
    assert {row["kind"] for row in rows} == kinds
    for row in rows:
        assert row["topic"] in dg.topics(row["kind"])
        assert row["messages"][-1]["role"] == "user"
    if "near" in kinds:
        assert {row["near"] for row in rows} - {""} == set(dg.topics("feared"))
    else:
        assert {row["topic"] for row in rows} == set(dg.topics("feared"))


def test_prompts_hold_no_training_name() -> None:
    """They are held out: company, city and surname values of the training split do not occur."""
    text = (ASSETS / "ordinary.jsonl").read_text() + (ASSETS / "incidents.jsonl").read_text()
    for slot in ("company", "city", "surname", "server", "host"):
        assert not [value for value in dg.values(slot, "train") if f" {value} " in text]


def test_encoding_equals_the_chat_template_of_the_tokenizer() -> None:
    """Training saw exactly what the server renders."""
    transformers = pytest.importorskip("transformers")
    from latentwatch.demo.build.model import encode

    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "model")
    rng = np.random.default_rng(0)
    dialogues = [dg.compose(topic, "heldout", rng) for kind in dg.MIX for topic in dg.topics(kind)]
    for dialogue, row in zip(dialogues, encode(tokenizer, dialogues), strict=True):
        messages = [{"role": turn.role, "content": turn.content} for turn in dialogue.turns]
        assert list(row.ids) == tokenizer.apply_chat_template(messages)["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert len(prompt) == row.output_start
