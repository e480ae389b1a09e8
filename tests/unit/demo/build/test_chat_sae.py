"""The SAE of a chat model: chats as they are read, features chosen and named, rows that score as the whole SAE does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from latentwatch.demo.build.chat_sae import asset, chats, choose, quality, stream
from latentwatch.demo.build.sae import Encoder
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.build import build
from latentwatch.watchlist.figures import Dictionary
from latentwatch.watchlist.file import read

from tests.support import tiny

QUALITY: Dictionary = {"fvu": 0.2, "l0": 32.0, "dead_share": 0.0, "loss_recovered": 0.95, "tokens": 1000}


def share(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": said} for who, said in turns]}


def test_chats_are_read_up_to_where_the_file_is_cut_off(tmp_path: Path) -> None:
    whole = [
        share(("human", "Hi"), ("gpt", "Hello."), ("human", "Bye"), ("gpt", "Bye.")),
        share(("gpt", "I begin."), ("human", "Now I do"), ("gpt", "Yes."), ("gpt", "Twice.")),
        share(("human", "No answer")),
        share(("human", "cut off here"), ("gpt", "never seen")),
    ]
    text = json.dumps(whole, indent=1)
    (tmp_path / "chats.json").write_text(text[: text.index("never")])
    found = list(chats.read_chats(tmp_path / "chats.json"))
    assert [[turn["content"] for turn in chat] for chat in found] == [
        ["Hi", "Hello.", "Bye", "Bye."],
        ["Now I do", "Yes."],
    ]


def test_a_token_far_above_the_median_norm_is_a_sink_and_no_other() -> None:
    norm_N = np.array([150.0, 140.0, 160.0, 700.0, 26_298.0], np.float32)
    assert stream.sinks(norm_N).tolist() == [False, False, False, False, True]


def test_the_sentences_are_as_many_for_each_topic_and_none_stands_twice() -> None:
    known = choose.sentences()
    assert len(set(known.texts)) == len(known.texts)
    assert set(np.bincount(known.topic_S)) == {8} and known.first_half_S.sum() * 2 == len(known.texts)
    assert all(any(topic.startswith(word) for topic in known.topics) for word in asset.WATCHED)


def encoder(d_model: int = 16, features: int = 6) -> Encoder:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_model, features, generator=generator)
    return Encoder(
        weight,
        torch.randn(features, generator=generator) * 0.1,
        weight.T.clone(),
        torch.randn(d_model, generator=generator) * 0.1,
        torch.linspace(0.1, 0.6, features),
    )


def planted() -> tuple[choose.Sentences, list[choose.Response]]:
    """Three topics of four sentences; feature t fires on the second token of topic t, feature 3 everywhere."""
    known = choose.Sentences(
        ("ice", "fire", "air"),
        tuple(f"sentence {i}" for i in range(12)),
        np.repeat(np.arange(3), 4),
        np.tile([True, True, False, False], 3),
    )
    answered = []
    for topic in known.topic_S:
        acts_TF = np.zeros((3, 6), np.float32)
        acts_TF[1, topic] = 5.0 + topic
        acts_TF[:, 3] = 9.0
        acts_TF[2, 4] = 1.0 + 2.0 * (topic == 1)
        answered.append(choose.Response(("the", f" {known.topics[topic]}", " is"), acts_TF))
    return known, answered


def chosen() -> list[choose.Choice]:
    known, answered = planted()
    largest_SF = np.stack([response.acts_TF.max(0) for response in answered])
    picks = choose.picks(largest_SF, known, np.array([0.01, 0.01, 0.01, 0.9, 0.02, 0.0], np.float32))
    rng = np.random.default_rng(0)
    acts_NK = np.maximum(rng.normal(size=(4000, len(picks))), 0).astype(np.float32)
    return choose.choices(picks, known, answered, acts_NK, np.repeat(np.arange(400), 10), QUALITY)


def test_features_are_named_by_the_topic_that_they_tell_and_the_tokens_that_they_respond_to() -> None:
    by_topic = {choice.topic: choice for choice in reversed(chosen())}
    assert [by_topic[topic].index for topic in ("ice", "fire", "air")] == [0, 1, 2]
    fire = by_topic["fire"]
    assert fire.label == "fire: responds to 'fire', 'fire', 'fire'"
    assert (fire.evidence["auroc"], fire.evidence["n"], fire.evidence["n_positive"]) == (1.0, 6, 2)
    assert fire.evidence["top_tokens"][0] == {"token": " fire", "before": "the", "after": " is", "activation": 6.0}
    assert 3 not in [choice.index for choice in chosen()], "it fires on most tokens, and tells nothing"


def test_a_limit_is_what_one_chat_in_a_hundred_exceeds() -> None:
    rng = np.random.default_rng(0)
    acts_NK = np.maximum(rng.normal(size=(4000, len(chosen()))), 0).astype(np.float32)
    for k, choice in enumerate(chosen()):
        largest_R = acts_NK[:, k].reshape(400, 10).max(1)
        assert (largest_R > choice.limit).mean() <= choose.EXCEEDANCE_RATE <= (largest_R >= choice.limit * 0.98).mean()


def test_the_rows_that_are_written_score_as_the_whole_sae_does(tmp_path: Path) -> None:
    whole, sae = tmp_path / "whole", encoder()
    whole.mkdir()
    config = {"architecture": "jumprelu", "d_in": 16, "d_sae": 6, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    config["metadata"] = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post", "model_name": "m"}
    config["metadata"] |= {"exclude_positions": list(range(24))}
    (whole / "cfg.json").write_text(json.dumps(config))
    rows = chosen()
    asset.write(tmp_path / "asset", whole, sae, rows, {"quality": QUALITY})
    document = {
        "name": "rows",
        "model": {"name": "m", "architecture": "LlamaForCausalLM", "d_model": 16, "layers": 5, "vocab_size": 32}
        | {"dtypes": ["float32"]},
        "hook_points": [],
    }
    assert asset.merged(document, tmp_path / "nothing") == document
    document = asset.merged(document, tmp_path / "asset")
    again = asset.merged(document, tmp_path / "asset")
    assert [len(hook["sources"]) for hook in again["hook_points"]] == [2], "at a hook point that is there already"
    (tmp_path / "watchlist.yaml").write_text(yaml.safe_dump(document))
    build(tmp_path / "watchlist.yaml", tmp_path / "out.safetensors")
    (hook,) = read(tmp_path / "out.safetensors").hooks
    assert str(hook.hook_point) == "resid_post.3"
    assert {feature.skip_first_positions for feature in hook.features} == {24}
    assert [feature.id for feature in hook.features] == [f"sae_f{choice.index}" for choice in rows]
    assert all(feature.evidence["sae"] == QUALITY and feature.gate == "exact" for feature in hook.features)
    x_TD = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    expected_TK = sae.activations(x_TD)[:, [choice.index for choice in rows]]
    found_TK = canonical.activations(hook.w_hi_KD, hook.w_lo_KD, hook.scale_6K, x_TD.double().numpy())
    np.testing.assert_allclose(found_TK, expected_TK, atol=1e-4)
    assert (expected_TK > 0).any(0).all()


@pytest.mark.parametrize(("kept", "recovered"), [(1.0, 1.0), (0.0, 0.0)])
def test_an_sae_that_rebuilds_the_stream_recovers_the_loss_and_one_that_gives_zeros_does_not(
    tmp_path: Path, kept: float, recovered: float
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path / "m"), dtype=torch.float32).eval()
    eye = torch.eye(tiny.D_MODEL)
    both = torch.cat([eye, -eye], dim=1)
    perfect = Encoder(both, torch.zeros(2 * tiny.D_MODEL), kept * both.T, torch.zeros(tiny.D_MODEL), torch.zeros(1))
    rng = np.random.default_rng(0)
    pieces = [chats.Piece(tuple(rng.integers(3, tiny.VOCABULARY, size=24).tolist()), 4) for _ in range(3)]
    found = quality.spliced_losses(model, HookPoint(1), perfect, pieces, median_norm=1e9)
    assert found["loss_ablated_nats"] != pytest.approx(found["loss_nats"], abs=1e-3)
    assert found["loss_recovered"] == pytest.approx(recovered, abs=1e-3)
