"""Arming: the layers are found without guessing, another model is refused by the field that differs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from latentwatch.engines.vllm import arming
from latentwatch.errors import EngineRefused, WatchlistRefused
from latentwatch.kernels.reference import UNWRITTEN

from tests.support import tiny
from tests.support.fake_model import FusedLayer, Model, OtherNorm, PairLayer, PlainLayer


def arm(model: Model, watchlist: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    def forward(rows: int) -> Any:
        return model(torch.ones(rows, tiny.D_MODEL))

    return arming.arm(model, watchlist, forward, max_rows=16, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("layer", [FusedLayer, OtherNorm, PlainLayer])
def test_every_kind_of_layer_is_scored_on_the_summed_stream(layer, tmp_path):
    """Layer 1 is read behind the next layer's norm, layer 3 behind the final one; otherwise at its output."""
    watchlist = tiny.watchlist(tmp_path / "w.safetensors")
    model = Model(layer)
    hooks = arm(model, watchlist)
    x_TD = torch.randn(5, tiny.D_MODEL)
    model(x_TD)
    for hook in hooks:
        stream = model.streams[hook.rows.hook_point.layer].numpy()
        np.testing.assert_allclose(hook.stat_T3[:5, 0].numpy(), np.linalg.norm(stream, axis=1), rtol=1e-5)
        dense = np.array([f.dense for f in hook.rows.features])
        expected = stream @ hook.rows.w_KD[dense].T + hook.rows.scale_6K[2, dense]
        np.testing.assert_allclose(hook.act_TK[:5].numpy()[:, dense], expected, atol=1e-4)


def test_the_models_own_output_is_the_same_with_the_hooks(tmp_path):
    model = Model(FusedLayer)
    x_TD = torch.randn(5, tiny.D_MODEL)
    before = model(x_TD)
    arm(model, tiny.watchlist(tmp_path / "w.safetensors"))
    assert torch.equal(before, model(x_TD))


def test_our_buffers_stay_out_of_the_models_checkpoint(tmp_path):
    model = Model(FusedLayer)
    before = set(model.state_dict())
    arm(model, tiny.watchlist(tmp_path / "w.safetensors"))
    assert set(model.state_dict()) == before


def test_two_lists_of_the_same_length_are_refused_not_guessed():
    model = torch.nn.Module()
    model.text, model.draft = Model(PlainLayer), Model(PlainLayer)
    with pytest.raises(EngineRefused, match="2 lists of 4 modules") as caught:
        arming.find_layers(model, tiny.LAYERS)
    assert caught.value.reason == "architecture_unknown"


def test_two_halves_that_no_norm_of_the_model_adds_are_refused_not_summed(tmp_path):
    """vLLM's Cohere layers return the stream and their own input: a pair, like Llama's, whose sum is nothing."""
    model: Any = Model(OtherNorm)
    model.norm = torch.nn.Identity()
    with pytest.raises(EngineRefused, match="no norm of the model adds them") as caught:
        arm(model, tiny.watchlist(tmp_path / "w.safetensors"))
    assert caught.value.reason == "architecture_unknown"


def test_a_stream_that_is_scaled_in_float16_is_refused_there(tmp_path):
    """vLLM's DeepSeek layers divide hidden states and residual alike."""
    model: Any = Model(FusedLayer)
    model.layers[2].routed_scaling_factor = 2.5
    watchlist = tiny.watchlist(tmp_path / "w.safetensors")
    with pytest.raises(EngineRefused, match="--dtype bfloat16"):
        arm(model, watchlist, dtype=torch.float16)
    arm(model, watchlist)


def test_of_a_layer_that_returns_what_is_not_known_to_be_its_stream_nothing_is_scored(tmp_path):
    model = Model(PairLayer)
    hooks = arm(model, tiny.watchlist(tmp_path / "w.safetensors"))
    model(torch.randn(5, tiny.D_MODEL))
    assert all(hook.stat_T3[0, 0] == UNWRITTEN for hook in hooks)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("hidden_size", 128, "watchlist_width"),
        ("num_hidden_layers", 8, "watchlist_model"),
        ("vocab_size", 1000, "watchlist_model"),
        ("architectures", ["MistralForCausalLM"], "watchlist_model"),
    ],
)
def test_a_watchlist_for_another_model_is_refused_by_the_field_that_differs(field, value, reason, tmp_path):
    served: dict[str, Any] = {
        "hidden_size": tiny.D_MODEL,
        "num_hidden_layers": tiny.LAYERS,
        "vocab_size": tiny.VOCABULARY,
        "architectures": ["LlamaForCausalLM"],
    }
    expected = tiny.watchlist(tmp_path / "w.safetensors").model
    arming.check_model(SimpleNamespace(**served), torch.bfloat16, expected)
    with pytest.raises(WatchlistRefused) as caught:
        arming.check_model(SimpleNamespace(**{**served, field: value}), torch.bfloat16, expected)
    assert caught.value.reason == reason
    assert str(value[0] if isinstance(value, list) else value) in caught.value.found


def test_a_dtype_that_the_watchlist_was_not_measured_in_is_refused(tmp_path):
    served = SimpleNamespace(
        hidden_size=tiny.D_MODEL,
        num_hidden_layers=tiny.LAYERS,
        vocab_size=tiny.VOCABULARY,
        architectures=["LlamaForCausalLM"],
    )
    with pytest.raises(WatchlistRefused, match="float16") as caught:
        arming.check_model(served, torch.float16, tiny.watchlist(tmp_path / "w.safetensors").model)
    assert caught.value.reason == "watchlist_dtype"


def test_a_step_beyond_the_buffers_is_left_unscored_and_harms_nobody(tmp_path):
    model = Model(FusedLayer)
    hooks = arm(model, tiny.watchlist(tmp_path / "w.safetensors"))
    x_TD = torch.randn(17, tiny.D_MODEL)  # the buffers hold 16 rows
    assert model(x_TD).shape == x_TD.shape
    assert all(float(hook.stat_T3[0, 0]) == UNWRITTEN for hook in hooks)
