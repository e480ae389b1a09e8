"""What each reader refuses, and why: a source that cannot be scored exactly never becomes a wrong score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latentwatch.errors import WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.places import hook_point_of
from latentwatch.watchlist.sources import Source, SourceOptions, open_source

from tests.support.parity import GOLDEN


def opened(case: str, folder: Path, hook_point: HookPoint | None = None, **options: Any) -> Source:
    spec = json.loads((folder / "case.json").read_text())
    given = spec.get("options", {}) | options
    point = hook_point or HookPoint(spec["layer"])
    return open_source(spec["format"], Location(spec["path"], folder), point, SourceOptions(**given))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    """A golden case that a test may damage."""

    def copied(case: str) -> Path:
        return shutil.copytree(GOLDEN / case, tmp_path / case)

    return copied


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path: Path, **changes: Any) -> None:
    tensors = safetensors.numpy.load_file(path) | changes
    kept = {name: np.ascontiguousarray(array) for name, array in tensors.items() if array is not None}
    safetensors.numpy.save_file(kept, path)


@pytest.mark.parametrize(
    ("case", "file", "changes", "found"),
    [
        ("sparsify_topk", "layers.3/cfg.json", {"activation": "groupmax"}, "'groupmax' cannot be watched"),
        ("sparsify_topk", "layers.3/cfg.json", {"signed": True}, "'signed topk' cannot be watched"),
        ("sparsify_topk", "layers.3/cfg.json", {"k": None}, "has k = 'None'"),
        ("sparsify_topk", "layers.3/cfg.json", {"transcode": True}, "the input of layers.3"),
        ("saelens_5_flat", "cfg.json", {"activation_fn_str": "tanh-relu"}, "'tanh-relu', not ReLU"),
        ("saelens_5_flat", "cfg.json", {"normalize_activations": True}, "factor is not in the files"),
        ("saelens_5_flat", "cfg.json", {"hook_head_index": 2}, "attention heads"),
        ("saelens_topk", "cfg.json", {"k": 0}, "has k = '0'"),
        ("openmoss_relu", "config.json", {"use_glu_encoder": True}, "'GLU encoder' cannot be watched"),
        ("openmoss_relu", "config.json", {"sae_type": "crosscoder"}, "'crosscoder' cannot be watched"),
        ("openmoss_relu", "config.json", {"act_fn": "batchtopk"}, "the whole batch"),
        ("openmoss_relu", "config.json", {"norm_activation": "batch-wise"}, "'batch-wise'"),
        ("openmoss_relu", "config.json", {"hook_point_in": "blocks.3.ln2.hook_normalized"}, "is missing"),
        ("llama_scope", "hyperparams.json", {"act_fn": "topk", "jump_relu_threshold": 0}, "gate of its own"),
        ("llama_scope", "hyperparams.json", {"norm_activation": "token-wise"}, "'token-wise'"),
        ("llama_scope", "hyperparams.json", {"use_glu_encoder": True}, "GLU encoder"),
        ("llama_scope", "hyperparams.json", {"hook_point_in": "blocks.3.hook_mlp_out"}, "blocks.3.hook_mlp_out"),
        ("dictionary_learning_gated", "config.json", {"trainer": {"dict_class": "IdentityDict"}}, "'IdentityDict'"),
        ("dictionary_learning_gated", "config.json", {"trainer": {}}, "no trainer.dict_class"),
        (
            "gemma_scope_2",
            "resid_post/layer_3_width_16k_l0_big/config.json",
            {"hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output"},
            "pre_feedforward_layernorm",
        ),
        ("gemma_scope_2", "resid_post/layer_3_width_16k_l0_big/config.json", {"architecture": "relu"}, "'relu'"),
    ],
)
def test_a_configuration_without_an_exact_linear_row_is_refused_by_name(
    copy_of: Callable[[str], Path], case: str, file: str, changes: dict[str, Any], found: str
) -> None:
    folder = copy_of(case)
    edit_json(folder / file, **changes)
    with pytest.raises(WatchlistRefused) as refusal:
        opened(case, folder)
    assert found in str(refusal.value)
    assert refusal.value.instead


@pytest.mark.parametrize("hook", ["mlp.hook_in", "ln2.hook_normalized", "hook_resid_mid"])
def test_transcoders_of_another_tensor_than_the_stream_are_refused(copy_of: Callable[[str], Path], hook: str) -> None:
    """These three differ by a norm or an MLP; a wrong choice moves firing rates a hundredfold and raises nothing."""
    folder = copy_of("circuit_tracer_plt")
    (folder / "config.yaml").write_text(f"feature_input_hook: {hook}\n")
    with pytest.raises(WatchlistRefused, match="not the residual stream between two layers"):
        opened("circuit_tracer_plt", folder)


@pytest.mark.parametrize(
    ("case", "layer"),
    [
        ("gemma_scope", 4),
        ("gemma_scope_2", 4),
        ("dictionary_learning_gated", 4),
        ("sparsify_topk", 4),
        ("llama_scope", 4),
        ("openmoss_relu", 4),
        ("goodfire", 20),
        ("qwen_scope", 4),
        ("openai_relu", 4),
        ("circuit_tracer_clt", 2),
        ("control_vector", 9),
        ("persona_vector", 5),
        ("persona_vector", 6),
    ],
)
def test_a_source_of_another_layer_is_refused(case: str, layer: int) -> None:
    """persona_vector 5: the last of its 6 layers is taken behind the final norm, which is no hook point."""
    with pytest.raises(WatchlistRefused):
        opened(case, GOLDEN / case, HookPoint(layer))


def test_sparsify_hookpoints_inside_a_layer_are_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("sparsify_topk")
    (folder / "layers.3").rename(folder / "layers.3.mlp")
    edit_json(folder / "case.json", path="layers.3.mlp")
    with pytest.raises(WatchlistRefused, match=r"trained on 'layers\.3\.mlp'"):
        opened("sparsify_topk", folder)


def test_a_gemma_scope_folder_without_its_site_in_the_path_still_checks_the_layer(
    copy_of: Callable[[str], Path],
) -> None:
    folder = copy_of("gemma_scope")
    (folder / "gemma-scope-2b-pt-res").rename(folder / "downloaded")
    edit_json(folder / "case.json", path="downloaded/layer_3/width_16k/average_l0_71")
    with pytest.raises(WatchlistRefused, match=r"option trained_on: resid_post\.3"):
        opened("gemma_scope", folder)
    source = opened("gemma_scope", folder, trained_on="resid_post.3")
    assert source.about.notes == {"declared_l0": 71}
    with pytest.raises(WatchlistRefused, match=r"layer 3, not for resid_post\.4"):
        opened("gemma_scope", folder, HookPoint(4))


def test_a_batchtopk_threshold_that_was_never_learnt_is_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("dictionary_learning_batchtopk")
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    with pytest.raises(WatchlistRefused, match="never learnt"):
        opened("dictionary_learning_batchtopk", folder)


def test_the_k_of_a_renamed_qwen_scope_file_must_be_given(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("qwen_scope")
    file = next(folder.glob("*/layer3.sae.pt")).rename(folder / "layer3.sae.pt")
    edit_json(folder / "case.json", path=file.name)
    with pytest.raises(WatchlistRefused, match="option k"):
        opened("qwen_scope", folder)
    with pytest.raises(WatchlistRefused, match="option trained_on"):
        opened("qwen_scope", folder, k=7)
    assert opened("qwen_scope", folder, k=7, trained_on="blocks.3.hook_resid_post").about.k == 7


@pytest.mark.parametrize("option", [{"k": 3}, {"input_scale": 2.0}, {"centre": True}])
def test_an_option_that_a_source_has_no_use_for_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(WatchlistRefused, match="has no meaning") as refusal:
        opened("gemma_scope", GOLDEN / "gemma_scope", **option)
    assert refusal.value.reason == "source_option"


def test_a_transposed_encoder_is_named_as_such(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("openmoss_relu")
    path = folder / "sae_weights.safetensors"
    edit_tensors(path, W_E=safetensors.numpy.load_file(path)["W_E"].T)
    with pytest.raises(WatchlistRefused, match="shape"):
        opened("openmoss_relu", folder)


def test_a_dead_decoder_row_of_a_norm_folded_sae_is_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("dictionary_learning_auto_encoder")
    state = torch.load(folder / "ae.pt", weights_only=True)
    state["decoder.weight"][:, 2] = 0
    torch.save(state, folder / "ae.pt")
    rows = opened("dictionary_learning_auto_encoder", folder).rows([0, 1, 2])
    with pytest.raises(WatchlistRefused, match="never fires"):
        canonical.fold(rows)


@pytest.mark.parametrize("former", [True, False], ids=["former names", "present names"])
def test_openmoss_files_of_both_eras_score_the_same(copy_of: Callable[[str], Path], former: bool) -> None:
    """Llama Scope R1 Distill was saved with encoder.weight [F, D] and a top-level log_jumprelu_threshold."""
    folder = copy_of("openmoss_jumprelu")
    path = folder / "sae_weights.safetensors"
    tensors = safetensors.numpy.load_file(path)
    if former:
        tensors["encoder.weight"] = tensors.pop("W_E").T
        tensors["decoder.weight"] = tensors.pop("W_D").T
        tensors["encoder.bias"], tensors["decoder.bias"] = tensors.pop("b_E"), tensors.pop("b_D")
        tensors["log_jumprelu_threshold"] = tensors.pop("activation_function.log_jumprelu_threshold")
        safetensors.numpy.save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, path)
    expected = safetensors.numpy.load_file(folder / "expected.safetensors")
    got = canonical.activations(
        *canonical.fold(opened("openmoss_jumprelu", folder).rows(range(24))), expected["x"].astype(np.float64)
    )
    np.testing.assert_allclose(got, expected["act"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "hook_point"),
    [
        ("blocks.7.hook_resid_post", HookPoint(7)),
        ("blocks.7.hook_resid_pre", HookPoint(6)),
        ("blocks.0.hook_resid_pre", None),
        ("model.layers.7", HookPoint(7)),
        ("model.layers.7.output", HookPoint(7)),
        ("model.language_model.layers.7", HookPoint(7)),
        ("transformer.h.7", HookPoint(7)),
        ("layers.7", HookPoint(7)),
        ("layers.7.mlp", None),
        ("h.7", HookPoint(7)),
        ("h.7.mlp", None),
        ("vision_tower.encoder.layers.7", None),
        ("visual.blocks.7", None),
        ("blocks.7.hook_resid_mid", None),
        ("blocks.7.hook_mlp_out", None),
        ("blocks.7.attn.hook_z", None),
        ("model.layers.7.self_attn.o_proj.input", None),
        ("hook_embed", None),
        ("", None),
    ],
)
def test_other_projects_hook_names_map_to_the_stream_or_to_nothing(name: str, hook_point: HookPoint | None) -> None:
    assert hook_point_of(name) == hook_point


CONFIGS = [
    ("saelens_jumprelu_none_b_dec", "cfg.json"),
    ("saelens_5_flat", "cfg.json"),
    ("saelens_topk_rescaled", "cfg.json"),
    ("sparsify_topk", "layers.3/cfg.json"),
    ("openmoss_jumprelu", "config.json"),
    ("openmoss_topk", "config.json"),
    ("llama_scope", "hyperparams.json"),
    ("dictionary_learning_topk", "config.json"),
    ("gemma_scope_2", "resid_post/layer_3_width_16k_l0_big/config.json"),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 100) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize(("case", "file"), CONFIGS, ids=[case for case, _ in CONFIGS])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_to_a_configuration_is_read_or_refused(
    tmp_path: Path, case: str, file: str, data: st.DataObject
) -> None:
    folder = tmp_path / case
    if not folder.exists():
        shutil.copytree(GOLDEN / case, folder)
    config = json.loads((GOLDEN / case / file).read_text())
    holder = config.get("trainer", config)
    for key in data.draw(st.lists(st.sampled_from(sorted(holder)), min_size=1, max_size=2)):
        holder[key] = data.draw(json_values)
    (folder / file).write_text(json.dumps(config))
    try:
        source = opened(case, folder)
        canonical.fold(source.rows([0, source.about.width - 1]))
    except WatchlistRefused as refusal:
        assert refusal.instead
