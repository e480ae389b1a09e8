"""Somebody's files that were once read as something else: each is refused, or read as its authors mean it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from latentwatch.errors import WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import activations, canonical
from latentwatch.watchlist.build import build
from latentwatch.watchlist.file import Watchlist
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import Source, SourceOptions, open_source

from tests.support.parity import GOLDEN
from tests.support.sources import D, F, document, hook, probe, saelens, saelens_weights, source, stream, write_yaml

RES_JB = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.3.hook_resid_pre",
    "hook_point_layer": 3,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "is_dataset_tokenized": False,
    "context_size": 128,
    "use_cached_activations": False,
    "d_in": D,
    "d_sae": F,
    "n_batches_in_buffer": 128,
    "total_training_tokens": 300000000,
    "store_batch_size": 32,
    "device": "mps",
    "seed": 42,
    "dtype": "torch.float32",
    "b_dec_init_method": "geometric_median",
    "expansion_factor": 32,
    "from_pretrained_path": None,
    "l1_coefficient": 8e-05,
    "lr": 0.0004,
    "lr_scheduler_name": None,
    "lr_warm_up_steps": 5000,
    "train_batch_size": 4096,
    "use_ghost_grads": False,
    "feature_sampling_window": 1000,
    "feature_sampling_method": None,
    "resample_batches": 1028,
    "feature_reinit_scale": 0.2,
    "dead_feature_window": 5000,
    "dead_feature_estimation_method": "no_fire",
    "dead_feature_threshold": 1e-06,
    "log_to_wandb": True,
    "wandb_project": "mats_sae_training_gpt2",
    "wandb_entity": None,
    "wandb_log_frequency": 100,
    "n_checkpoints": 10,
    "checkpoint_path": "checkpoints/y1t51byy",
    "tokens_per_buffer": 67108864,
    "run_name": "24576-L1-8e-05-LR-0.0004-Tokens-3.000e+08",
}
"""The keys of gpt2-small-res-jb's cfg.json: that its stream was centred stands in SAELens' registry alone."""


def opened(format_name: str, folder: Path, path: str = ".", layer: int = 3, **options: Any) -> Source:
    return open_source(format_name, Location(path, folder), HookPoint(layer), SourceOptions(**options))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    """A golden case that a test may damage."""
    return lambda case: Path(shutil.copytree(GOLDEN / case, tmp_path / case))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def built(tmp_path: Path, *hooks: Any, **fields: Any) -> Watchlist:
    return build(write_yaml(tmp_path / "w.yaml", document(*hooks, **fields)), tmp_path / "out.safetensors")


# Tensors that nothing reads


@pytest.mark.parametrize(
    "extra",
    [
        {"threshold": np.full(F, 3, np.float32)},
        {"b_gate": np.ones(F, np.float32), "b_mag": np.ones(F, np.float32), "r_mag": np.ones(F, np.float32)},
        {"log_threshold": np.ones(F, np.float32)},
    ],
    ids=lambda extra: "+".join(extra),
)
def test_a_standard_sae_with_the_gate_of_another_architecture_is_refused(
    tmp_path: Path, extra: dict[str, np.ndarray]
) -> None:
    saelens(tmp_path, "standard", layer=3)
    safetensors.numpy.save_file(saelens_weights("standard") | extra, tmp_path / "sae_weights.safetensors")
    with pytest.raises(WatchlistRefused, match=next(iter(extra))):
        opened("saelens", tmp_path)


@pytest.mark.parametrize(
    ("case", "file", "name"),
    [
        ("sparsify_topk", "layers.3/sae.safetensors", "W_gate"),
        ("openmoss_relu", "sae_weights.safetensors", "W_E_glu"),
        ("openmoss_relu", "sae_weights.safetensors", "activation_function.log_jumprelu_threshold"),
        ("llama_scope", "checkpoints/final.safetensors", "encoder_glu.weight"),
        ("circuit_tracer_plt", "layer_4.safetensors", "log_thresholds"),
        ("circuit_tracer_clt", "W_enc_4.safetensors", "activation_function.threshold"),
        ("gemma_scope_2", "resid_post/layer_3_width_16k_l0_big/params.safetensors", "scale"),
        ("goodfire", "Llama-3.1-8B-Instruct-SAE-l19.pth", "threshold"),
        ("qwen_scope", "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5/layer3.sae.pt", "threshold"),
        ("openai_relu", "resid_post_mlp_v5_32k/autoencoders/3.pt", "threshold"),
        ("dictionary_learning_auto_encoder", "ae.pt", "threshold"),
        ("dictionary_learning_gated", "ae.pt", "encoder.bias"),
    ],
)
def test_a_tensor_that_a_format_does_not_have_is_refused(
    copy_of: Callable[[str], Path], case: str, file: str, name: str
) -> None:
    path = copy_of(case) / file
    if path.suffix == ".safetensors":
        tensors = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file(tensors | {name: np.ones(24, np.float32)}, path)
    else:
        torch.save(torch.load(path, weights_only=True) | {name: torch.ones(24)}, path)
    spec = json.loads((GOLDEN / case / "case.json").read_text())
    with pytest.raises(WatchlistRefused, match=name):
        opened(spec["format"], path.parents[len(Path(file).parts) - 1], spec["path"], spec["layer"])


# What stands in SAELens' registry and not in the file


def test_a_file_that_does_not_say_how_its_model_was_loaded_is_asked_whether_it_was_centred(tmp_path: Path) -> None:
    saelens(tmp_path, "standard")
    (tmp_path / "cfg.json").write_text(json.dumps(RES_JB | {"normalize_activations": "none"}))
    with pytest.raises(WatchlistRefused, match="centre"):
        opened("saelens", tmp_path, layer=2)


def test_gpt2_small_res_jb_is_read_once_a_person_says_what_the_registry_says(tmp_path: Path) -> None:
    saelens(tmp_path, "standard")
    (tmp_path / "cfg.json").write_text(json.dumps(RES_JB))
    with pytest.raises(WatchlistRefused, match="no normalize_activations"):
        opened("saelens", tmp_path, layer=2)
    with pytest.raises(WatchlistRefused, match="option centre: true"):
        opened("saelens", tmp_path, layer=2, norm="none")
    rows = opened("saelens", tmp_path, layer=2, norm="none", centre=True).rows(range(F))
    x, w = stream(50), {name: array.astype(np.float64) for name, array in saelens_weights("standard").items()}
    expected = np.maximum((x - x.mean(1, keepdims=True) - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    np.testing.assert_allclose(canonical.authors(rows, x), expected, atol=1e-9 * expected.max())


def test_an_old_sae_that_version_6_saved_again_says_no_more_than_before(tmp_path: Path) -> None:
    """Its metadata has the keys of the flat file and a training version of null."""
    saelens(tmp_path, "standard", layer=3, metadata={"sae_lens_training_version": None})
    with pytest.raises(WatchlistRefused, match="centre"):
        opened("saelens", tmp_path)
    assert opened("saelens", tmp_path, centre=False).about.width == F


@pytest.mark.parametrize(
    ("mode", "scaler", "options", "reads"),
    [
        ("expected_average_only_in", {"scaling_factor": 0.25, "has_whitening": False}, {}, 0.25),
        ("expected_average_only_in", {"scaling_factor": 0.25}, {"input_scale": 0.25}, 0.25),
        ("expected_average_only_in", {"scaling_factor": 0.25}, {"input_scale": 0.5}, None),
        ("expected_average_only_in", {"scaling_factor": None}, {}, None),
        ("expected_average_only_in", {"scaling_factor": 0.25, "has_whitening": True}, {}, None),
        ("none", {"scaling_factor": 0.25}, {}, None),
        ("none", {"scaling_factor": None, "has_whitening": False}, {}, 1.0),
    ],
)
def test_the_factor_beside_a_training_checkpoint_is_read(
    tmp_path: Path, mode: str, scaler: dict[str, Any], options: dict[str, Any], reads: float | None
) -> None:
    saelens(tmp_path, "standard", layer=3, normalize_activations=mode, l1_coefficient=5.0, decoder_init_norm=0.1)
    (tmp_path / "activation_scaler.json").write_text(json.dumps(scaler))
    if reads is None:
        with pytest.raises(WatchlistRefused):
            opened("saelens", tmp_path, **options)
        return
    x, w = stream(20), {name: array.astype(np.float64) for name, array in saelens_weights("standard").items()}
    expected = np.maximum((x * reads - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    got = canonical.authors(opened("saelens", tmp_path, **options).rows(range(F)), x)
    np.testing.assert_allclose(got, expected, atol=1e-9 * expected.max())


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_an_encoder_in_whole_numbers_is_refused(copy_of: Callable[[str], Path], form: str) -> None:
    """Quantised weights without their scale read as numbers, a hundred times too large."""
    if form == "pt":
        folder = copy_of("goodfire")
        path = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"
        state = torch.load(path, weights_only=True)
        torch.save(state | {"encoder_linear.weight": (state["encoder_linear.weight"] * 99).to(torch.uint8)}, path)
        with pytest.raises(WatchlistRefused, match="whole numbers"):
            opened("goodfire", folder, path.name, layer=19)
        return
    folder = copy_of("sparsify_topk")
    path = folder / "layers.3" / "sae.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["encoder.weight"] = (tensors["encoder.weight"] * 99).astype(np.int32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(WatchlistRefused, match="whole numbers"):
        opened("sparsify", folder, "layers.3")


# Values that change the numbers


@pytest.mark.parametrize(
    ("case", "file", "changes", "found"),
    [
        ("saelens_jumprelu_none_b_dec", "cfg.json", {"activation_fn": "tanh-relu"}, "activation_fn"),
        ("saelens_jumprelu_none_b_dec", "cfg.json", {"rescale_acts_by_decoder_norm": True}, "rescale_acts"),
        ("saelens_jumprelu_none_b_dec", "cfg.json", {"k": 3}, "'k'"),
        ("saelens_jumprelu_none_b_dec", "cfg.json", {"dtype": "int8"}, "int8"),
        ("saelens_jumprelu_none_b_dec", "cfg.json", {"apply_b_dec_to_input": None}, "apply_b_dec_to_input"),
        ("saelens_transcoder_of_resid_pre", "cfg.json", {"apply_b_dec_to_input": True}, "transcoder"),
        ("sparsify_topk", "layers.3/cfg.json", {"num_latents": 48}, "48 latents"),
        ("sparsify_topk", "layers.3/cfg.json", {"d_in": 32}, "d_in = 32"),
        ("sparsify_topk", "layers.3/cfg.json", {"finetune_scale": 2.0}, "finetune_scale"),
        ("openmoss_relu", "config.json", {"expansion_factor": 3.0}, "48 features"),
        ("llama_scope", "hyperparams.json", {"d_sae": 99}, "d_sae = 99"),
        ("llama_scope", "hyperparams.json", {"lora_rank": 4}, "lora_rank"),
        ("gemma_scope_2", "resid_post/layer_3_width_16k_l0_big/config.json", {"width": 99}, "width = 99"),
        ("gemma_scope_2", "resid_post/layer_3_width_16k_l0_big/config.json", {"type": "crosscoder"}, "crosscoder"),
    ],
)
def test_a_key_or_value_that_is_not_implemented_is_refused(
    copy_of: Callable[[str], Path], case: str, file: str, changes: dict[str, Any], found: str
) -> None:
    folder = copy_of(case)
    edit(folder / file, **changes)
    spec = json.loads((folder / "case.json").read_text())
    with pytest.raises(WatchlistRefused, match=found):
        opened(spec["format"], folder, spec["path"])


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """JSON readers take the last one, and people see the first."""
    saelens(tmp_path, layer=3)
    text = (tmp_path / "cfg.json").read_text()
    (tmp_path / "cfg.json").write_text(text[:-1] + ', "apply_b_dec_to_input": false}')
    with pytest.raises(WatchlistRefused, match="stands twice"):
        opened("saelens", tmp_path)


@pytest.mark.parametrize(
    ("trainer", "found"),
    [
        ({"submodule_name": "resid_pre_layer_3"}, "resid_pre_layer_3"),
        ({"submodule_name": "attn_resid_post_layer_3"}, "attn_resid_post"),
        ({"submodule_name": "resid_post_layer_4"}, "layer 3"),
        ({"dict_size": 48}, "dict_size = 48"),
        ({"k": 7}, "k = 7"),
    ],
)
def test_a_dictionary_whose_config_and_weights_differ_is_refused(
    copy_of: Callable[[str], Path], trainer: dict[str, Any], found: str
) -> None:
    folder = copy_of("dictionary_learning_topk")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"trainer": content["trainer"] | trainer}))
    with pytest.raises(WatchlistRefused, match=found):
        opened("dictionary_learning", folder)


def test_a_dictionary_that_was_trained_on_the_input_of_its_module_is_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("dictionary_learning_topk")
    edit(folder / "config.json", buffer={"ctx_len": 128, "io": "in"})
    with pytest.raises(WatchlistRefused, match=r"buffer\.io = 'in'"):
        opened("dictionary_learning", folder)


# Classes of scikit-learn


def dumped(folder: Path, model: Any, classes: int) -> np.ndarray:
    """Save a fitted probe of rising dimension 0; gives its training tokens."""
    io = pytest.importorskip("skops.io")
    x = np.random.default_rng(0).normal(size=(300, D))
    edges = np.quantile(x[:, 0], np.linspace(0, 1, classes + 1)[1:-1])
    label = np.array(["benign", "jailbreak", "other", "third"])[np.digitize(x[:, 0], edges)]
    io.dump(model.fit(x, label), folder / "probe.skops")
    return x


def test_a_three_class_svc_has_rows_of_pairs_and_is_refused(tmp_path: Path) -> None:
    from sklearn.svm import SVC

    dumped(tmp_path, SVC(kernel="linear"), 3)
    with pytest.raises(WatchlistRefused, match="pairs of its 3 classes"):
        opened("sklearn_probe", tmp_path, "probe.skops", trained_on="resid_post.3")


def test_a_three_class_svc_is_refused_whatever_is_said_of_its_place(tmp_path: Path) -> None:
    from sklearn.svm import SVC

    dumped(tmp_path, SVC(kernel="linear", decision_function_shape="ovo"), 3)
    with pytest.raises(WatchlistRefused):
        opened("sklearn_probe", tmp_path, "probe.skops")


def linear_models() -> list[tuple[str, int, dict[str, bool] | None]]:
    """Each classifier for two and three classes, and one behind every kind of scaler."""
    names = ("LogisticRegression", "LinearSVC", "RidgeClassifier", "SGDClassifier", "Perceptron")
    bare = [(name, classes, None) for name in (*names, "LinearDiscriminantAnalysis") for classes in (2, 3, 4)]
    scalers: list[dict[str, bool]] = [{}, {"with_mean": False}, {"with_std": False}]
    return [*bare, ("SVC", 2, None), *(("LogisticRegression", 3, scaler) for scaler in scalers)]


def made(name: str) -> Any:
    from sklearn import discriminant_analysis, linear_model, svm

    module = next(one for one in (linear_model, svm, discriminant_analysis) if hasattr(one, name))
    return getattr(module, name)(**({"kernel": "linear"} if name == "SVC" else {}))


@pytest.mark.filterwarnings("ignore")  # convergence and deprecations of scikit-learn on toy data
@pytest.mark.parametrize(("name", "classes", "scaler"), linear_models(), ids=str)
def test_every_linear_classifier_scores_what_its_decision_function_says(
    tmp_path: Path, name: str, classes: int, scaler: dict[str, bool] | None
) -> None:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = made(name) if scaler is None else make_pipeline(StandardScaler(**scaler), made(name))
    x = dumped(tmp_path, model, classes) * 3 + 1
    read = opened("sklearn_probe", tmp_path, "probe.skops", trained_on="resid_post.3")
    got = canonical.authors(read.rows(range(read.about.width)), x)
    np.testing.assert_allclose(got, model.decision_function(x).reshape(len(x), -1), atol=1e-9)
    names = ["benign", "jailbreak", "other", "third"][:classes]
    assert list(read.about.names) == (names[1:] if classes == 2 else names)
    said = [names[column] for column in (got.argmax(axis=1) if classes > 2 else (got[:, 0] > 0).astype(int))]
    assert said == list(model.predict(x))


@pytest.mark.parametrize("kind", ["calibrated", "ovo", "robust", "rbf", "ridge", "named columns", "a class twice"])
def test_models_without_one_linear_row_per_class_are_refused(tmp_path: Path, kind: str) -> None:
    from sklearn import calibration, linear_model, multiclass, pipeline, preprocessing, svm

    io = pytest.importorskip("skops.io")
    x = np.random.default_rng(0).normal(size=(90, D))
    logistic = linear_model.LogisticRegression()
    model: Any = {
        "calibrated": calibration.CalibratedClassifierCV(linear_model.LogisticRegression()),
        "ovo": multiclass.OneVsOneClassifier(svm.LinearSVC()),
        "robust": pipeline.make_pipeline(preprocessing.RobustScaler(), logistic),
        "rbf": svm.SVC(),
        "ridge": linear_model.Ridge(),
    }.get(kind, logistic)
    model.fit(x, np.digitize(x[:, 0], [-0.4, 0.4]))
    if kind == "named columns":  # as a DataFrame leaves it
        model.feature_names_in_ = np.array([f"pc{7 * i % D}" for i in range(D)], dtype=object)
    if kind == "a class twice":
        model.classes_ = np.array(["1", "1", "2"])
    io.dump(model, tmp_path / "probe.skops")
    with pytest.raises(WatchlistRefused):
        opened("sklearn_probe", tmp_path, "probe.skops", trained_on="resid_post.3")


# Places


@pytest.mark.parametrize(
    "name", ["h.3.mlp", "h.5", "transformer.h.6", "gpt_neox.layers.4", "layers.3.attn", "downloaded"]
)
def test_a_sparsify_folder_of_another_place_or_of_none_is_refused(copy_of: Callable[[str], Path], name: str) -> None:
    folder = copy_of("sparsify_topk")
    (folder / "layers.3").rename(folder / name)
    with pytest.raises(WatchlistRefused):
        opened("sparsify", folder, name)


@pytest.mark.parametrize("name", ["h.3", "transformer.h.3", "gpt_neox.layers.3", "layers_3"])
def test_a_sparsify_folder_of_the_place_is_read_by_any_of_its_names(copy_of: Callable[[str], Path], name: str) -> None:
    folder = copy_of("sparsify_topk")
    (folder / "layers.3").rename(folder / name)
    assert opened("sparsify", folder, name).about.k == 5


def test_the_place_is_where_a_link_leads_and_not_what_it_is_called(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("sparsify_topk")
    (folder / "layers.5").symlink_to("layers.3")
    with pytest.raises(WatchlistRefused, match=r"layers\.3"):
        opened("sparsify", folder, "layers.5", layer=5)
    assert opened("sparsify", folder, "layers.5").about.places == ("layers.3",)


def test_a_path_through_another_layers_folder_is_read_where_it_ends(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("gemma_scope")
    (folder / "gemma-scope-2b-pt-res" / "layer_4").mkdir()
    path = "gemma-scope-2b-pt-res/layer_4/../layer_3/width_16k/average_l0_71"
    assert opened("gemma_scope", folder, path).about.places == ("blocks.3.hook_resid_post",)
    with pytest.raises(WatchlistRefused):
        opened("gemma_scope", folder, path, layer=4)


@pytest.mark.parametrize(
    "metadata",
    [
        {"hf_hook_name": "model.layers.4"},
        {"hf_hook_name": "model.layers.3.mlp"},
        {"hook_name": "vision_tower.encoder.layers.3"},
        {"hook_name": None},
        {"hook_layer": 4},
    ],
    ids=str,
)
def test_statements_of_a_place_that_disagree_or_are_missing_are_refused(
    tmp_path: Path, metadata: dict[str, Any]
) -> None:
    saelens(tmp_path, layer=3, metadata=metadata)
    with pytest.raises(WatchlistRefused):
        opened("saelens", tmp_path)


def test_an_old_hook_layer_that_is_not_its_hook_points_is_refused(tmp_path: Path) -> None:
    saelens(tmp_path, "standard")
    content = RES_JB | {"hook_point_layer": 8, "normalize_activations": "none"}
    (tmp_path / "cfg.json").write_text(json.dumps(content | {"model_from_pretrained_kwargs": {}}))
    with pytest.raises(WatchlistRefused, match="hook_point_layer = 8"):
        opened("saelens", tmp_path, layer=2)


def test_a_path_and_a_config_of_two_layers_are_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("gemma_scope_2")
    path = "resid_post/layer_3_width_16k_l0_big"
    (folder / path).rename(folder / path.replace("3", "5", 1))
    with pytest.raises(WatchlistRefused):
        opened("gemma_scope_2", folder, path.replace("3", "5", 1))


@pytest.mark.parametrize("form", ["linear_probe", "sklearn_probe", "goodfire"])
def test_a_file_that_says_no_place_is_asked_for_it(tmp_path: Path, form: str) -> None:
    path = {"linear_probe": "p.safetensors", "sklearn_probe": "probe.skops", "goodfire": "sae.pth"}[form]
    if form == "linear_probe":
        probe(tmp_path / path)
    else:
        case = {"sklearn_probe": "sklearn_probe_pipeline", "goodfire": "goodfire"}[form]
        shutil.copy(next((GOLDEN / case).glob(f"*{Path(path).suffix}")), tmp_path / path)
    with pytest.raises(WatchlistRefused) as refusal:
        opened(form, tmp_path, path)
    assert "trained_on: resid_post.3" in refusal.value.instead


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("model_kind: cross_layer_transcoder", "another kind"),
        ("model_kind: other", "another kind"),
        ("transcoders: [a.npz, b.npz, c.npz, d.npz, 'hf://x/layer_5.safetensors']", "layer_5"),
        ("transcoders: []", "lists None"),
        ("feature_input_hook: hook_resid_post", "stands twice"),
    ],
)
def test_a_transcoder_whose_config_means_other_files_is_refused(
    copy_of: Callable[[str], Path], line: str, found: str
) -> None:
    folder = copy_of("circuit_tracer_plt")
    with (folder / "config.yaml").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(WatchlistRefused, match=found):
        opened("circuit_tracer", folder)


# Control vectors and directions


def test_a_control_vector_is_not_read_before_somebody_says_who_wrote_it() -> None:
    with pytest.raises(WatchlistRefused, match="written_by: repeng or llama"):
        opened("control_vector", GOLDEN / "control_vector", "vector.gguf")


def test_a_control_vector_of_llama_cpp_is_one_layer_below_its_number() -> None:
    """cvector-generator names what it reads at l_out-<il> direction.<il + 1>; repeng names it direction.<il>."""
    folder = GOLDEN / "control_vector"
    by_repeng = opened("control_vector", folder, "vector.gguf", layer=3, written_by="repeng")
    by_llama = opened("control_vector", folder, "vector.gguf", layer=2, written_by="llama.cpp")
    np.testing.assert_array_equal(by_repeng.rows([0]).w_KD, by_llama.rows([0]).w_KD)
    assert by_repeng.about.notes["direction"] == by_llama.about.notes["direction"] == "direction.3"


def test_repengs_direction_of_the_last_layer_is_behind_the_final_norm(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "control_vector" / "vector.gguf", tmp_path)
    row = source("control_vector", "vector.gguf", 1, options={"written_by": "repeng"})
    with pytest.raises(WatchlistRefused, match="behind the final norm"):
        built(tmp_path, hook(5, row))


def test_persona_vectors_of_a_model_with_another_number_of_layers_are_refused(tmp_path: Path) -> None:
    """A file of [L, D] without the embeddings' entry would be read one layer off."""
    torch.save(torch.randn(6, D), tmp_path / "evil.pt")
    with pytest.raises(WatchlistRefused, match="5 layers, and the model has 6"):
        built(tmp_path, hook(2, source("persona_vector", "evil.pt", 1)))


# One source under several spellings


@pytest.mark.parametrize("second", ["./sae", "other/../sae", "sae/", "link", "copy", "absolute"])
def test_one_source_under_two_spellings_is_one_source(tmp_path: Path, second: str) -> None:
    saelens(tmp_path / "sae")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("sae")
    shutil.copytree(tmp_path / "sae", tmp_path / "copy")
    path = os.fspath(tmp_path / "sae") if second == "absolute" else second
    rows = [{"index": 1, "id": "again", "label": "x"}]
    with pytest.raises(WatchlistRefused, match="watched already at"):
        built(tmp_path, hook(2, source("saelens", "sae"), source("saelens", path, rows)))


# Labels


def exported(folder: Path, **states: str) -> Path:
    """A Neuronpedia export of one explanation."""
    (folder / "explanations").mkdir(parents=True)
    row = {"index": "1", "description": "lies", "explanationModelName": "m", **states}
    (folder / "explanations" / "batch-0.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def labelled(tmp_path: Path, item: dict[str, Any], **metadata: Any) -> str:
    """The label that row 1 of an SAE of resid_post.2 gets from a list."""
    saelens(tmp_path / "sae", metadata=metadata)
    rows = [{"index": 1, "id": "f1"}]
    return built(tmp_path, hook(2, source("saelens", "sae", rows, labels=[item]))).features[0].label


@pytest.mark.parametrize(
    ("states", "metadata"),
    [
        ({"layer": "7-res-jb"}, {}),
        ({"layer": "2-res-jb", "modelId": "gemma-2-2b"}, {"neuronpedia_id": "gpt2-small/2-res-jb"}),
        ({"layer": "2-att-kk", "modelId": "gpt2-small"}, {"neuronpedia_id": "gpt2-small/2-res-jb"}),
        ({"layer": "2-res-jb"}, {"hook_name": "blocks.3.hook_resid_pre"}),
        ({}, {}),
    ],
    ids=str,
)
def test_a_neuronpedia_list_of_another_dictionary_is_refused(
    tmp_path: Path, states: dict[str, str], metadata: dict[str, Any]
) -> None:
    exported(tmp_path / "export", **states)
    with pytest.raises(WatchlistRefused):
        labelled(tmp_path, {"format": "neuronpedia", "path": "export"}, **metadata)


@pytest.mark.parametrize(
    ("folder", "states", "item", "metadata"),
    [
        ("export", {"layer": "2-res-jb"}, {}, {}),
        ("2-gemmascope-res-16k", {}, {}, {}),
        ("export", {}, {"layer": 2}, {}),
        ("export", {"layer": "3-res-jb"}, {}, {"hook_name": "blocks.3.hook_resid_pre"}),
        ("export", {"layer": "2-res-jb", "modelId": "g"}, {}, {"neuronpedia_id": "g/2-res-jb"}),
    ],
    ids=str,
)
def test_a_neuronpedia_list_of_the_source_is_read(
    tmp_path: Path, folder: str, states: dict[str, str], item: dict[str, Any], metadata: dict[str, Any]
) -> None:
    exported(tmp_path / folder, **states)
    assert labelled(tmp_path, {"format": "neuronpedia", "path": folder, **item}, **metadata) == "lies"


@pytest.mark.parametrize(
    ("form", "text", "found"),
    [
        ("json", '{"1": "lies", "24": "of a wider dictionary"}', "feature 24"),
        ("json", '{"1": "lies", "1": "truths"}', "stands twice"),
        ("json", '[{"index": 1, "feature": 2, "label": "lies"}]', "several indices"),
        ("json", '[{"index": 1, "label": "lies", "hook_name": "blocks.5.hook_resid_post"}]', "blocks.5"),
        ("json", '[{"index": 1, "label": "lies", "layer": 5}]', "layer 5"),
        ("json", '{"1_0": "lies"}', "1_0"),
        ("csv", "index,label,layer\n1,lies,9\n", "layer 9"),
        ("csv", "index,label,label\n1,lies,truths\n", "stands twice"),
    ],
)
def test_a_label_list_of_another_source_or_of_two_minds_is_refused(
    tmp_path: Path, form: str, text: str, found: str
) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(WatchlistRefused, match=found):
        labelled(tmp_path, {"format": form, "path": "list"})


# Prompts

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content is null"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, r"content\[0\] is a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]}, r"content\[1\]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]}, "2 parts"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "is null, not text"),
        ({"messages": [{"role": "user", "content": 5}]}, "a number"),
        ({"messages": [{"role": None, "content": "a"}]}, "role"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "'robot'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, "tool_calls"),
        ({"messages": []}, "messages is a list"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "'tools'"),
        ({"messages": [{"role": "user", "content": "a"}], "text": "b"}, "both"),
        ({"text": None}, "text is null"),
        ({"text": "a", "group": {"x": 1}}, "group"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:50],
)
def test_a_prompt_that_would_not_reach_the_model_as_it_stands_is_refused_with_its_line(
    tmp_path: Path, line: dict[str, Any], found: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + json.dumps(line) + "\n")
    with pytest.raises(WatchlistRefused, match=rf"a\.jsonl line 2.*{found}"):
        activations.requests(tmp_path / "a.jsonl")


def test_one_text_part_is_its_text_and_a_null_group_is_no_group(tmp_path: Path) -> None:
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}], "name": None}]}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(parts | {'group': None})}\n{json.dumps(parts | {'group': 7})}\n")
    first, second = activations.requests(tmp_path / "a.jsonl")
    assert first.content == ({"role": "user", "content": "hello"},)
    assert (first.group, second.group) == ("a.jsonl:1", "7")


@pytest.mark.parametrize(
    ("architecture", "own", "why"),
    [
        ("abstopk", {"k": 4}, "keeps the sign"),
        ("matching_pursuit", {"residual_threshold": 0.1, "max_iterations": 9}, "one after another"),
        ("batchtopk", {"k": 4.0, "topk_threshold_lr": 0.01}, "save_inference_model"),
        ("matryoshka_batchtopk", {"k": 4.0, "matryoshka_widths": [8, 32]}, "save_inference_model"),
    ],
)
def test_an_saelens_architecture_that_cannot_be_watched_is_refused_as_such_and_not_for_its_keys(
    tmp_path: Path, architecture: str, own: dict[str, Any], why: str
) -> None:
    saelens(tmp_path / "sae")
    edit(tmp_path / "sae" / "cfg.json", architecture=architecture, **own)
    with pytest.raises(WatchlistRefused, match=why) as refused:
        opened("saelens", tmp_path, "sae", 2)
    assert "option ignore" not in str(refused.value)


def test_a_classifier_of_a_scikit_learn_whose_attributes_are_not_found_is_told_so(tmp_path: Path) -> None:
    from sklearn.linear_model import RidgeClassifier

    model = RidgeClassifier().fit(stream(60), np.arange(60) % 2)
    del model.classes_  # as files of scikit-learn 1.5 lack it
    import skops.io

    skops.io.dump(model, tmp_path / "m.skops")
    with pytest.raises(WatchlistRefused, match=r"no classes_: .*another scikit-learn saved it.*scikit-learn \d"):
        opened("sklearn_probe", tmp_path, "m.skops", trained_on="resid_post.3")


def test_a_direction_0_is_none_of_llama_cpp(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 5)
    for number in range(5):
        writer.add_tensor(f"direction.{number}", np.full(D, number + 1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert opened("control_vector", tmp_path, "v.gguf", written_by="repeng").about.d_in == D
    with pytest.raises(WatchlistRefused, match=r"direction\.0, which llama\.cpp neither writes nor reads"):
        opened("control_vector", tmp_path, "v.gguf", written_by="llama.cpp")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"text": "a"}\n' + b'{"text": "' + b"a" * activations.MAX_LINE_BYTES + b'"}\n', "line 2: .*more than"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"\x1f\x8b\x08", "a gzip file"),
        (b'\n{"text": "\\ud83d"}\n', "line 2: .*half a character"),
        (b"\n\n", "no requests"),
    ],
)
def test_a_file_that_is_no_lines_of_text_is_told_what_it_is(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(WatchlistRefused, match=why):
        activations.requests(tmp_path / "a.jsonl")


def test_blank_lines_hold_no_request_and_are_counted_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\n\n')
    assert [(one.content, one.group) for one in activations.requests(tmp_path / "a.jsonl")] == [
        ("a", "a.jsonl:1"),
        ("b", "a.jsonl:3"),
    ]
