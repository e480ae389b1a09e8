"""From watchlist.yaml to the file that the engine loads, and every way in which that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml
from latentwatch.errors import WatchlistRefused
from latentwatch.watchlist import canonical, verify
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.build import build

from tests.support.sources import D, F, document, hook, probe, saelens, saelens_weights, source, stream, write_yaml


def built(tmp_path: Path, content: Any) -> watchlist_file.Watchlist:
    return build(write_yaml(tmp_path / "watchlist.yaml", content), tmp_path / "out.safetensors")


def acts(rows: watchlist_file.HookRows, x: np.ndarray) -> np.ndarray:
    return canonical.activations(rows.w_hi_KD, rows.w_lo_KD, rows.scale_6K, x)


def naive_saelens(architecture: str, x: np.ndarray, subtract: bool = True) -> np.ndarray:
    w = {name: array.astype(np.float64) for name, array in saelens_weights(architecture).items()}
    u = (x - w["b_dec"] * subtract) @ w["W_enc"]
    if architecture == "gated":
        return (u + w["b_gate"] > 0) * np.maximum(np.exp(w["r_mag"]) * u + w["b_mag"], 0)
    pre = u + w["b_enc"]
    return np.maximum(pre, 0) * (pre > w.get("threshold", -np.inf))


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
@pytest.mark.parametrize("subtract", [True, False], ids=["b_dec", "no-b_dec"])
def test_a_built_file_scores_what_the_sae_encodes(tmp_path: Path, architecture: str, subtract: bool) -> None:
    saelens(tmp_path / "sae", architecture, apply_b_dec_to_input=subtract)
    index = [23, 0, 7]
    built(tmp_path, document(hook(2, source("saelens", "sae", index))))
    (rows,) = watchlist_file.read(tmp_path / "out.safetensors").hooks
    x = stream(300)
    expected = naive_saelens(architecture, x, subtract)[:, index]
    assert 0 < (expected > 0).mean() < 1
    np.testing.assert_allclose(acts(rows, x), expected, atol=1e-5 * np.abs(expected).max())


def test_sparse_features_and_probes_share_a_hook_point(tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    path = probe(tmp_path / "probe.safetensors", metadata={"names": '["a", "b", "c"]', "hook_point": "resid_post.2"})
    by_name = {"name": "b", "id": "b", "label": "probe b", "severity": "critical"}
    content = document(hook(2, source("saelens", "sae", 2), source("linear_probe", "probe.safetensors", [by_name])))
    watchlist = built(tmp_path, content)
    assert watchlist.sparse_F.tolist() == [True, True, False]
    x = stream(50)
    w = {name: array.astype(np.float64) for name, array in safetensors.numpy.load_file(path).items()}
    logit = x @ w["direction"][1] + w["bias"][1]
    np.testing.assert_allclose(acts(watchlist.hooks[0], x)[:, 2], logit, atol=1e-5 * np.abs(logit).max())


def test_a_standard_scaler_is_folded_into_its_probe(tmp_path: Path) -> None:
    mean, scale = np.linspace(-3, 3, D), np.linspace(0.5, 4, D)
    path = probe(tmp_path / "p.safetensors", mean=mean, scale=scale, threshold=np.array([0.5, 1.0, 2.0]))
    (rows,) = built(
        tmp_path, document(hook(0, source("linear_probe", "p.safetensors", 2, options={"trained_on": "resid_post.0"})))
    ).hooks
    x = stream(50)
    w = {name: array.astype(np.float64) for name, array in safetensors.numpy.load_file(path).items()}
    logit = ((x - w["mean"]) / w["scale"]) @ w["direction"][:2].T + w["bias"][:2]
    np.testing.assert_allclose(acts(rows, x), logit, atol=1e-5 * np.abs(logit).max())
    assert rows.features[1].source["published_threshold"] == 1.0


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    yaml_path = write_yaml(tmp_path / "w.yaml", document(hook(2, source("saelens", "sae"))))
    first, second = (build(yaml_path, tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert first.sha256 == second.sha256
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_card_says_where_a_row_came_from(tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    evidence = {"auroc": 0.97, "n": 200, "split": "held-out templates", "quantiles": {"p50": 1.5}}
    limit = {"statistic": "rolling_mean", "value": 2.5, "window_tokens": 8, "phase": "output"}
    feature = {"index": 3, "id": "deceives", "label": "deceives", "severity": "critical", "limit": limit}
    content = document(hook(2, source("saelens", "sae", [feature | {"evidence": evidence}], licence="MIT")))
    (got,) = built(tmp_path, content).features
    assert got.source["index"] == 3
    assert got.source["licence"] == "MIT"
    assert set(got.source["sha256"]) == {"cfg.json", "sae_weights.safetensors"}
    assert got.source["model_name"] == "tiny"
    assert got.evidence == evidence | {"label_source": "watchlist.yaml"}
    assert got.limit == watchlist_file.Limit("rolling_mean", 2.5, 8, "output")
    assert got.skip_first_positions == 1, "the first position is an outlier in most models; the YAML default skips it"


def test_hook_points_are_ordered_by_layer_whatever_the_yaml_says(tmp_path: Path) -> None:
    for layer in (4, 1):
        saelens(tmp_path / f"sae{layer}", layer=layer)
    content = document(*(hook(layer, source("saelens", f"sae{layer}", prefix=f"l{layer}.")) for layer in (4, 1)))
    assert [str(rows.hook_point) for rows in built(tmp_path, content).hooks] == ["resid_post.1", "resid_post.4"]


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [("blocks.3.hook_resid_pre", 2), ("blocks.2.hook_resid_post", 2), ("model.layers.2", 2), ("transformer.h.2", 2)],
)
def test_other_projects_names_for_the_same_place_are_understood(tmp_path: Path, hook_name: str, layer: int) -> None:
    saelens(tmp_path / "sae", metadata={"hook_name": hook_name})
    assert built(tmp_path, document(hook(layer, source("saelens", "sae")))).hooks[0].hook_point.layer == layer


def test_model_sizes_are_read_from_a_hugging_face_config(tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    text = {"hidden_size": D, "num_hidden_layers": 4, "vocab_size": 77}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Gemma3ForCausalLM"], "text_config": text}))
    model = {"config": "config.json", "name": "g", "dtypes": ["bfloat16"]}
    got = built(tmp_path, document(hook(2, source("saelens", "sae")), model=model)).model
    assert (got.architecture, got.d_model, got.layers, got.vocab_size) == ("Gemma3ForCausalLM", D, 4, 77)


def test_expected_average_norm_needs_its_factor_and_then_applies_it(tmp_path: Path) -> None:
    saelens(tmp_path / "sae", "standard", normalize_activations="expected_average_only_in")
    with pytest.raises(WatchlistRefused, match="input_scale"):
        built(tmp_path, document(hook(2, source("saelens", "sae"))))
    (rows,) = built(tmp_path, document(hook(2, source("saelens", "sae", options={"input_scale": 0.25})))).hooks
    x = stream(100)
    expected = naive_saelens("standard", 0.25 * x)[:, :3]
    np.testing.assert_allclose(acts(rows, x), expected, atol=1e-5 * expected.max())


def test_a_model_with_centred_writing_weights_needs_a_word_from_a_person(tmp_path: Path) -> None:
    saelens(tmp_path / "sae", metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    with pytest.raises(WatchlistRefused, match="centre"):
        built(tmp_path, document(hook(2, source("saelens", "sae"))))
    (rows,) = built(tmp_path, document(hook(2, source("saelens", "sae", options={"centre": True})))).hooks
    x = stream(100)
    expected = naive_saelens("jumprelu", x - x.mean(1, keepdims=True))[:, :3]
    np.testing.assert_allclose(acts(rows, x), expected, atol=1e-5 * np.abs(x).max())


@pytest.mark.parametrize(
    ("cfg", "found", "reason"),
    [
        ({"architecture": "temporal"}, "earlier tokens", "source_architecture"),
        ({"architecture": "matching_pursuit"}, "one after another", "source_architecture"),
        ({"architecture": "abstopk"}, "depends on every other", "source_architecture"),
        ({"architecture": "batchtopk"}, "save_inference_model", "source_architecture"),
        (
            {"architecture": "transcoder", "metadata": {"hook_name": "blocks.2.hook_mlp_in"}},
            "trained on 'blocks.2.hook_mlp_in'",
            "source_hook_point",
        ),
        ({"architecture": "brand_new"}, "unknown here", "source_architecture"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening", "source_file"),
        ({"reshape_activations": "hook_z"}, "attention heads", "source_file"),
        (
            {"metadata": {"hook_name": "blocks.2.hook_mlp_out"}},
            "trained on 'blocks.2.hook_mlp_out'",
            "source_hook_point",
        ),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_post"}}, "not on resid_post.2", "source_hook_point"),
        ({"d_sae": F + 1}, "shape", "source_file"),
        ({"d_in": "wide"}, "d_in", "source_file"),
    ],
)
def test_a_source_that_cannot_be_scored_exactly_is_refused_by_name(
    tmp_path: Path, cfg: dict[str, Any], found: str, reason: str
) -> None:
    saelens(tmp_path / "sae", **cfg)
    with pytest.raises(WatchlistRefused, match=found) as refusal:
        built(tmp_path, document(hook(2, source("saelens", "sae"))))
    assert refusal.value.reason == reason
    assert "hook_points[0].sources[0]" in refusal.value.what
    assert refusal.value.instead
    assert not (tmp_path / "out.safetensors").exists()


def damage_weights(folder: Path, **tensors: np.ndarray | None) -> None:
    weights: dict[str, Any] = saelens_weights("jumprelu") | tensors
    kept = {name: np.ascontiguousarray(array) for name, array in weights.items() if array is not None}
    safetensors.numpy.save_file(kept, folder / "sae_weights.safetensors")


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"threshold": None}, "'threshold' is missing"),
        ({"W_enc": np.zeros((F, D), np.float32)}, "stored transposed"),
        ({"b_enc": np.zeros(F + 1, np.float32)}, "has shape"),
        ({"W_enc": np.full((D, F), np.nan, np.float32)}, "NaN or infinity"),
        ({"threshold": np.full(F, np.inf, np.float32)}, "NaN or infinity"),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, tensors: dict[str, Any], found: str) -> None:
    damage_weights(saelens(tmp_path / "sae"), **tensors)
    with pytest.raises(WatchlistRefused, match=found):
        built(tmp_path, document(hook(2, source("saelens", "sae"))))


def test_a_truncated_weights_file_is_refused(tmp_path: Path) -> None:
    weights = saelens(tmp_path / "sae") / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WatchlistRefused, match=r"not a whole \.safetensors"):
        built(tmp_path, document(hook(2, source("saelens", "sae"))))


@pytest.mark.parametrize(
    ("features", "found"),
    [
        ([F], f"index {F} of a source with {F} rows"),
        ([{"name": "x", "id": "x", "label": "x"}], "no row named 'x'"),
        ([1, {"index": 1, "id": "again", "label": "x"}], "watched already at"),
        ([1, {"index": 2, "id": "f1", "label": "x"}], "stands already at"),
    ],
)
def test_a_feature_that_is_not_there_or_there_twice_is_refused(tmp_path: Path, features: list[Any], found: str) -> None:
    saelens(tmp_path / "sae")
    with pytest.raises(WatchlistRefused, match=found) as refusal:
        built(tmp_path, document(hook(2, source("saelens", "sae", features))))
    assert "features[" in refusal.value.what


def test_a_source_of_another_width_is_refused(tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    content = document(hook(2, source("saelens", "sae")))
    content["model"]["d_model"] = 2 * D
    with pytest.raises(WatchlistRefused, match=f"{D} wide, the model's residual stream {2 * D}") as refusal:
        built(tmp_path, content)
    assert refusal.value.reason == "watchlist_width"


def test_a_missing_source_names_what_lies_there_instead(tmp_path: Path) -> None:
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "ae.pt").touch()
    with pytest.raises(WatchlistRefused, match=r"no file 'cfg.json' there, only ae.pt"):
        built(tmp_path, document(hook(2, source("saelens", "sae"))))


def test_verify_is_silent_on_a_fresh_build_and_names_what_changed_since(tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    watchlist = built(tmp_path, document(hook(2, source("saelens", "sae"))))
    assert verify.differences(watchlist, tmp_path / "watchlist.yaml") == []
    saelens(tmp_path / "sae", seed=2)
    changed = verify.differences(watchlist, tmp_path / "watchlist.yaml")
    assert any("f0: its row differs" in line for line in changed)
    assert any("source differs" in line for line in changed)


def test_the_documented_example_is_a_valid_watchlist(tmp_path: Path) -> None:
    """docs and example drift apart from the schema unless something reads them."""
    from latentwatch.watchlist import selection

    example = Path(selection.__file__).with_name("example.yaml")
    chosen = selection.load(example)
    assert len(chosen.hooks) == 2
    assert yaml.safe_load(example.read_text())["name"] == chosen.name


@pytest.mark.parametrize(("limit", "refused"), [(65_000.0, False), (70_000.0, True), (-70_000.0, True)])
def test_a_limit_that_no_score_in_half_precision_can_pass_is_refused(
    tmp_path: Path, limit: float, refused: bool
) -> None:
    probe(tmp_path / "probe.safetensors", metadata={"names": '["a", "b", "c"]', "hook_point": "resid_post.2"})
    row = {"name": "b", "id": "b", "label": "b", "severity": "critical", "limit": {"statistic": "max", "value": limit}}
    content = document(hook(2, source("linear_probe", "probe.safetensors", [row])))
    if refused:
        with pytest.raises(WatchlistRefused, match="half precision"):
            built(tmp_path, content)
    else:
        built(tmp_path, content)
