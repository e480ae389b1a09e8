"""Arming: the layers are found without guessing, another model is refused by the field that differs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from latentwatch.engines.vllm import arming
from latentwatch.engines.vllm import hook as hook_functions
from latentwatch.errors import EngineRefused, WatchlistRefused
from latentwatch.kernels.reference import UNWRITTEN

from tests.support import tiny
from tests.support.fake_model import (
    AddsItself,
    BatchOfOne,
    FusedLayer,
    InADictionary,
    Model,
    NoResidual,
    NormedBeside,
    OtherNorm,
    PlainLayer,
    ScaledHalf,
    SeveralStreams,
    StaleFirst,
    StaleLayer,
    SwappedHalves,
    ThreeParts,
    UnreadResult,
)


def arm(model: Model, watchlist: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    def forward(rows: int) -> Any:
        return model(torch.ones(rows, tiny.D_MODEL))

    return arming.arm(model, watchlist, forward, max_rows=16, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "layer",
    [
        *(FusedLayer, OtherNorm, AddsItself, SwappedHalves),
        *(PlainLayer, StaleLayer, StaleFirst, NoResidual, BatchOfOne),
    ],
)
@pytest.mark.parametrize("layers", [(0, 1), (1, 3), (3,)], ids=str)
def test_every_kind_of_layer_is_scored_on_the_summed_stream(layer, layers, tmp_path):
    watchlist = tiny.watchlist(tmp_path / "w.safetensors", layers=layers)
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


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (lambda: Model(ScaledHalf), "neither one of them nor the sum of two"),
        (lambda: Model(NormedBeside), "neither one of them nor the sum of two"),
        (lambda: Model(ThreeParts), "neither one of them nor the sum of two"),
        (lambda: Model(InADictionary), "it returns a dict"),
        (lambda: Model(SeveralStreams), r"of shapes like \(4, "),
        (lambda: Model(UnreadResult), "neither one of them nor the sum of two"),
        (lambda: Model(FusedLayer, passes=2), "the layer runs 2 times in one forward"),
        (lambda: Model(FusedLayer, skips=True), "neither one of them nor the sum of two"),
    ],
)
@pytest.mark.parametrize("layers", [(1,), (3,)], ids=str)
def test_what_is_not_proven_to_be_the_stream_is_refused_by_name(model, found, layers, tmp_path):
    made = model()
    with pytest.raises(EngineRefused, match=found) as caught:
        arm(made, tiny.watchlist(tmp_path / "w.safetensors", layers=layers))
    assert caught.value.reason == "stream_unproven"
    assert "resid_post." in caught.value.what and type(made.layers[0]).__name__ in caught.value.what
    assert untouched(made)


def test_of_a_model_that_may_add_something_between_layers_the_layer_itself_is_read(tmp_path):
    """Pictures do that to the first layers of some: resid_post is the stream before it."""
    model = Model(FusedLayer)
    arming.arm(
        model,
        tiny.watchlist(tmp_path / "w.safetensors"),
        lambda rows: model(torch.ones(rows, tiny.D_MODEL)),
        max_rows=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
        between_layers=True,
    )
    assert [bool(layer._forward_hooks) for layer in model.layers] == [False, True, False, True]
    assert not model.norm._forward_hooks


def test_a_skip_connection_from_a_whole_stream_leaves_it_the_stream(tmp_path):
    """A later layer may read it too: it is still what the layer returns, and all that is read of it."""
    model = Model(PlainLayer, skips=True)
    hooks = arm(model, tiny.watchlist(tmp_path / "w.safetensors"))
    model(torch.randn(5, tiny.D_MODEL))
    for hook in hooks:
        stream = model.streams[hook.rows.hook_point.layer].numpy()
        np.testing.assert_allclose(hook.stat_T3[:5, 0].numpy(), np.linalg.norm(stream, axis=1), rtol=1e-5)


class Broken(torch.nn.Module):
    """Another layer that fails in the first forward."""

    def forward(self, hidden: Any, residual: Any) -> Any:
        raise ValueError("no such kernel")


def test_a_dummy_forward_that_raises_leaves_no_hook(tmp_path):
    model = Model(FusedLayer)
    model.layers[2].input_layernorm = Broken()
    with pytest.raises(ValueError, match="no such kernel"):
        arm(model, tiny.watchlist(tmp_path / "w.safetensors"))
    assert untouched(model)


def test_a_hook_that_scores_something_else_is_found_before_it_serves(tmp_path, monkeypatch):
    monkeypatch.setattr(hook_functions, "read_second", hook_functions.read_first)
    model = Model(FusedLayer)
    with pytest.raises(EngineRefused, match="scores of known numbers are wrong") as caught:
        arm(model, tiny.watchlist(tmp_path / "w.safetensors"))
    assert caught.value.reason == "stream_unproven"
    assert untouched(model)


def test_rows_that_are_alike_and_come_out_different_prove_nothing(tmp_path):
    model = Model(FusedLayer)

    def forward(rows: int) -> Any:
        out_TD = model(torch.ones(rows, tiny.D_MODEL))
        return out_TD + torch.randn(out_TD.shape)

    with pytest.raises(EngineRefused, match="rows that are alike came out"):
        arming.arm(
            model,
            tiny.watchlist(tmp_path / "w.safetensors"),
            forward,
            max_rows=16,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    assert untouched(model)


def untouched(model: Any) -> bool:
    """No hook and no buffer of ours."""
    modules = list(model.modules())
    hooks = [m for m in modules if m._forward_hooks or m._forward_pre_hooks]
    return not hooks and not [name for name, _ in model.named_buffers() if "latentwatch" in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [FusedLayer, AddsItself, PlainLayer, StaleLayer])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_the_proof_rests_on_no_size_of_the_weights_and_on_no_dtype(dtype, layer, size, tmp_path):
    """Weights of vLLM's dummy format are tiny; some models' streams are huge."""
    model = Model(layer)
    for one in model.layers:
        one.weight_DD.mul_(size)
    model.to(dtype)

    def forward(rows: int) -> Any:
        return model(torch.ones(rows, tiny.D_MODEL, dtype=dtype))

    arming.arm(
        model,
        tiny.watchlist(tmp_path / "w.safetensors", layers=(0, 1, 3)),
        forward,
        max_rows=64,
        dtype=dtype,
        device=torch.device("cpu"),
    )


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


def lists(**models: Model) -> Any:
    """A model with a list of layers under each name."""
    owner: Any = torch.nn.Module()
    for name, model in models.items():
        owner.add_module(name, model)
    return owner


def test_of_two_lists_of_the_same_length_the_one_that_runs_is_the_decoder():
    """A picture's encoder may have as many layers as the language model."""
    model = lists(text=Model(PlainLayer), vision=Model(PlainLayer))
    found = arming.find_layers(model, tiny.LAYERS, lambda rows: model.text(torch.ones(rows, tiny.D_MODEL)))
    assert found is model.text.layers


def test_a_list_of_another_name_is_found_by_what_runs_on_what():
    model: Any = Model(PlainLayer)
    model.blocks = model.layers
    model.norms = torch.nn.ModuleList(layer.input_layernorm for layer in model.layers)
    del model.layers

    def forward(rows: int) -> Any:
        stream, residual = torch.ones(rows, tiny.D_MODEL), None
        for layer in model.blocks:
            stream, residual = layer.carried(layer(stream, residual))
        return stream

    assert arming.find_layers(model, tiny.LAYERS, forward) is model.blocks


def test_two_lists_that_both_run_are_refused_not_guessed():
    model = lists(text=Model(PlainLayer), draft=Model(PlainLayer))

    def forward(rows: int) -> Any:
        return model.draft(model.text(torch.ones(rows, tiny.D_MODEL)))

    with pytest.raises(EngineRefused, match="in 2 of them each runs") as caught:
        arming.find_layers(model, tiny.LAYERS, forward)
    assert caught.value.reason == "architecture_unknown"


def test_a_stream_that_is_scaled_in_float16_is_refused_there(tmp_path):
    """vLLM's DeepSeek layers divide hidden states and residual alike."""
    model: Any = Model(FusedLayer)
    model.layers[2].routed_scaling_factor = 2.5
    watchlist = tiny.watchlist(tmp_path / "w.safetensors")
    with pytest.raises(EngineRefused, match="--dtype bfloat16"):
        arm(model, watchlist, dtype=torch.float16)
    arm(model, watchlist)


@pytest.mark.parametrize("layer", [FusedLayer, AddsItself, PlainLayer, StaleLayer])
@pytest.mark.parametrize(
    "turned",
    [
        lambda output: {"stream": output},
        lambda output: None,
        lambda output: (),
        lambda output: (None, None),
        lambda output: [output],
        lambda output: torch.ones(2, 3, 4, 5),
        lambda output: torch.ones(5, tiny.D_MODEL - 1),
        lambda output: (torch.ones(5, 7), torch.ones(5, 7)),
        lambda output: (torch.ones(5, 1, 1, 1), torch.ones(4, tiny.D_MODEL - 1)),
        lambda output: torch.ones(5, tiny.D_MODEL, dtype=torch.complex64),
        lambda output: torch.ones(5, tiny.D_MODEL, dtype=torch.int8),
        lambda output: torch.ones(5, tiny.D_MODEL, device="meta"),
        lambda output: torch.tensor(1.0),
    ],
)
def test_whatever_a_module_returns_later_no_hook_raises_and_the_step_stays_unscored(layer, turned, tmp_path):
    model = Model(layer)
    hooks = arm(model, tiny.watchlist(tmp_path / "w.safetensors"))
    for module in model.modules():
        for function in module._forward_hooks.values():
            assert function(module, (), turned(torch.ones(5, tiny.D_MODEL))) is None
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
