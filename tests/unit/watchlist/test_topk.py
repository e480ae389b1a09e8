"""TopK encoders: scores are exact where a feature fires; the gate is matched on recorded tokens and says how well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from latentwatch.errors import WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical, topk
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.build import build
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import Source, SourceOptions, open_source

from tests.support.parity import GOLDEN
from tests.support.sources import document, hook, source, write_yaml

CASE = GOLDEN / "saelens_topk_rescaled"
D, F, K = 16, 24, 5
"""Of the golden SAE."""
POINT = HookPoint(3)


def sae() -> Source:
    return open_source("saelens", Location(".", CASE), POINT, SourceOptions())


def stream(tokens: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mean = np.random.default_rng(99).normal(size=D) * 0.3
    return (rng.normal(size=(tokens, D)) * 0.5 + mean).astype(np.float32)


def true_acts(x: np.ndarray) -> np.ndarray:
    """What the TopK encoder gives for every feature, written out naively."""
    w = {n: a.astype(np.float64) for n, a in safetensors.numpy.load_file(CASE / "sae_weights.safetensors").items()}
    pre = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * np.linalg.norm(w["W_dec"], axis=1)
    kth = np.sort(pre, axis=1)[:, -K]
    return np.where(pre >= kth[:, None], np.maximum(pre, 0), 0)


@pytest.fixture
def recording(tmp_path: Path) -> Location:
    safetensors.numpy.save_file({"x": stream(4000, 1)}, tmp_path / "x.safetensors", {"hook_point": "resid_post.3"})
    return Location("x.safetensors", tmp_path)


def gated_acts(recording: Location, match: str, x: np.ndarray) -> np.ndarray:
    matched = topk.calibrate(sae(), range(F), topk.recorded(recording, D, POINT), recording, match)
    return canonical.activations(*canonical.fold(matched.rows), x.astype(np.float64))


@pytest.mark.parametrize("match", ["rate", "l0"])
def test_where_the_gate_and_the_encoder_agree_the_score_is_exact(recording: Location, match: str) -> None:
    x = stream(2000, 2)
    got, true = gated_acts(recording, match, x), true_acts(x)
    both = (got > 0) & (true > 0)
    assert both.sum() > 5000
    np.testing.assert_allclose(got[both], true[both], atol=2e-5)


def test_rate_matching_gives_each_feature_its_own_firing_rate_on_fresh_tokens(recording: Location) -> None:
    x = stream(4000, 3)
    got, true = (gated_acts(recording, "rate", x) > 0).mean(0), (true_acts(x) > 0).mean(0)
    np.testing.assert_allclose(got, true, atol=0.03)


def test_l0_matching_lets_k_features_fire_on_the_average_token(recording: Location) -> None:
    x = stream(4000, 3)
    assert (gated_acts(recording, "l0", x) > 0).sum(1).mean() == pytest.approx(K, abs=0.1)


def test_the_result_does_not_depend_on_how_the_rows_are_cut(
    recording: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gated_acts(recording, "l0", stream(100, 4))
    monkeypatch.setattr(topk, "CHUNK", 7)
    np.testing.assert_array_equal(gated_acts(recording, "l0", stream(100, 4)), whole)


def test_the_card_tells_how_well_the_gate_stands_for_the_encoder(recording: Location) -> None:
    x = topk.recorded(recording, D, POINT)
    notes = topk.calibrate(sae(), [3, 7], x, recording, "rate").notes
    acts = canonical.activations(*canonical.fold(topk.calibrate(sae(), [3, 7], x, recording, "rate").rows), x)
    true = true_acts(x)[:, [3, 7]]
    for i, note in enumerate(notes):
        both = (acts[:, i] > 0) & (true[:, i] > 0)
        assert note["precision"] == pytest.approx(both.sum() / (acts[:, i] > 0).sum(), abs=1e-3)
        assert note["recall"] == pytest.approx(both.sum() / (true[:, i] > 0).sum(), abs=1e-3)
        assert note["mass"] == pytest.approx(true[both, i].sum() / true[:, i].sum(), abs=1e-3)
        assert note["fires_in_topk"] == note["fires_here"] == (true[:, i] > 0).sum()
        assert len(note["activations_sha256"]) == 64


def test_a_feature_that_never_was_among_the_k_largest_gets_a_gate_above_all_that_was_seen() -> None:
    kth = np.full(100, 2.0)
    assert topk._rate_threshold(np.linspace(0, 1, 100), 0, kth) == 2.0
    assert topk._rate_threshold(np.linspace(0, 3, 100), 0, kth) == 3.0


def content(**fields: Any) -> dict[str, Any]:
    made = document(hook(3, source("saelens", str(CASE), **fields)))
    made["model"]["d_model"] = D
    return made


def test_a_topk_source_is_built_only_with_a_calibration_and_says_so(recording: Location) -> None:
    yaml_path, out = recording.base / "w.yaml", recording.base / "out.safetensors"
    with pytest.raises(WatchlistRefused, match="depends on all 24") as refusal:
        build(write_yaml(yaml_path, content()), out)
    assert refusal.value.reason == "source_topk"
    build(write_yaml(yaml_path, content(calibration={"activations": "x.safetensors"})), out)
    for feature in watchlist_file.read(out).features:
        assert feature.gate == "calibrated"
        assert feature.source["gate_calibration"]["match"] == "rate"


def test_a_source_with_exact_gates_refuses_a_calibration(recording: Location) -> None:
    exact = GOLDEN / "saelens_jumprelu_none_b_dec"
    made = document(hook(3, source("saelens", str(exact), calibration={"activations": "x.safetensors"})))
    with pytest.raises(WatchlistRefused, match="its gates are exact"):
        build(write_yaml(recording.base / "w.yaml", made), recording.base / "out.safetensors")


@pytest.mark.parametrize(
    ("tensor", "metadata", "found"),
    [
        (np.zeros((100, D + 1), np.float32), {}, "shape"),
        (np.zeros((3, D), np.float32), {}, "64 to 65536 tokens"),
        (np.full((100, D), np.nan, np.float32), {}, "NaN"),
        (np.zeros((100, D), np.float32), {"hook_point": "resid_post.1"}, "recorded at resid_post.1"),
    ],
)
def test_a_recording_that_does_not_fit_is_refused(
    tmp_path: Path, tensor: np.ndarray, metadata: dict[str, str], found: str
) -> None:
    safetensors.numpy.save_file({"x": tensor}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(WatchlistRefused) as refusal:
        topk.recorded(Location("x.safetensors", tmp_path), D, POINT)
    assert found in str(refusal.value)
