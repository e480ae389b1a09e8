"""The canonical scorer equals the encoders that it folds, written out naively here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.errors import WatchlistRefused
from latentwatch.watchlist import canonical
from latentwatch.watchlist.file import NORMS

from tests.support.sources import stream

K, D, T = 9, 64, 200


def naive_norm(norm: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(1, keepdims=True)
    return {
        "none": x,
        "centre": centred,
        "layer_norm": centred / (np.sqrt((centred**2).sum(1, keepdims=True) / (D - 1)) + 1e-5),
        "constant_norm": np.sqrt(D) * x / np.sqrt((x**2).sum(1, keepdims=True)),
    }[norm]


def score(rows: canonical.EncoderRows, x: np.ndarray) -> np.ndarray:
    return canonical.activations(*canonical.fold(rows), x)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def w(rng: np.random.Generator) -> np.ndarray:
    # Values that two bfloat16 terms hold exactly, so that only the folding is under test.
    hi, lo = canonical.split_bf16(rng.normal(size=(K, D)))
    return canonical.stored(hi, lo)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("subtracts", [True, False], ids=["b_dec", "no-b_dec"])
def test_relu_rows_score_as_the_encoder_does(
    norm: str, subtracts: bool, rng: np.random.Generator, w: np.ndarray
) -> None:
    x, b, offset = stream(T, d_model=D), rng.normal(size=K), rng.normal(size=D) if subtracts else None
    pre = (naive_norm(norm, x) - (0 if offset is None else offset)) @ w.T + b
    got = score(canonical.relu(w, b, offset, norm), x)
    np.testing.assert_allclose(got, np.maximum(pre, 0), rtol=3e-6, atol=1e-5 * np.abs(pre).max())


@pytest.mark.parametrize("norm", NORMS)
def test_jumprelu_rows_score_as_the_encoder_does_with_negative_thresholds_too(
    norm: str, rng: np.random.Generator, w: np.ndarray
) -> None:
    """A threshold below zero changes nothing: the ReLU under it already cuts at zero, and 'fires' means above zero."""
    x, b, offset, theta = stream(T, d_model=D), rng.normal(size=K), rng.normal(size=D), rng.normal(size=K) * 3
    pre = (naive_norm(norm, x) - offset) @ w.T + b
    got = score(canonical.jumprelu(w, b, theta, offset, norm), x)
    sure = (np.abs(pre - theta) > 1e-3) & (np.abs(pre) > 1e-3)
    expected = np.where(pre > theta, np.maximum(pre, 0), 0)
    assert ((got > 0) == (expected > 0))[sure].all()
    np.testing.assert_allclose(got[sure], expected[sure], rtol=3e-6, atol=1e-5 * np.abs(pre).max())


def test_gated_rows_score_as_the_encoder_does(rng: np.random.Generator, w: np.ndarray) -> None:
    x, offset = stream(T, d_model=D), rng.normal(size=D)
    b_gate, b_mag, r_mag = rng.normal(size=(3, K))
    u = (x - offset) @ w.T
    expected = (u + b_gate > 0) * np.maximum(np.exp(r_mag) * u + b_mag, 0)
    got = score(canonical.gated(w, b_gate, b_mag, r_mag, offset), x)
    sure = (np.abs(u + b_gate) > 1e-3) & (np.abs(np.exp(r_mag) * u + b_mag) > 1e-3)
    assert ((got > 0) == (expected > 0))[sure].all()
    np.testing.assert_allclose(got[sure], expected[sure], rtol=3e-6, atol=1e-5 * np.abs(expected).max())


def test_linear_rows_may_be_negative_and_always_fire(rng: np.random.Generator, w: np.ndarray) -> None:
    x, b, mean = stream(T, d_model=D), rng.normal(size=K), rng.normal(size=D)
    rows = canonical.linear(w, b, mean)
    logit = (x - mean) @ w.T + b
    assert (logit < 0).any()
    np.testing.assert_allclose(score(rows, x), logit, rtol=3e-6, atol=1e-5 * np.abs(logit).max())
    scale = canonical.fold(rows)[2]
    assert np.isneginf(scale[0]).all()
    assert np.isneginf(scale[3]).all()


def test_input_scale_multiplies_what_the_encoder_sees(rng: np.random.Generator, w: np.ndarray) -> None:
    x, b, offset = stream(T, d_model=D), rng.normal(size=K), rng.normal(size=D)
    expected = np.maximum((0.37 * x - offset) @ w.T + b, 0)
    got = score(canonical.input_scaled(canonical.relu(w, b, offset), 0.37), x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * expected.max())


def test_two_bfloat16_terms_hold_float32_rows_to_the_promised_error(rng: np.random.Generator) -> None:
    w = rng.normal(size=(200, 512)).astype(np.float32).astype(np.float64)
    error = canonical.stored(*canonical.split_bf16(w)) - w
    assert np.sqrt((error**2).mean() / (w**2).mean()) < 2.5e-6


def test_bias_folded_against_stored_rows_cancels_their_rounding_in_the_mean(rng: np.random.Generator) -> None:
    """The mean of the stream is its largest component; with one bfloat16 term its rounding would dominate the error."""
    x, w, mean = rng.normal(size=(500, D)), rng.normal(size=(K, D)), rng.normal(size=D) * 30
    hi, _ = canonical.split_bf16(w)
    coarse = canonical.stored(hi, np.zeros_like(hi))
    truth = x @ w.T
    against_stored = (x + mean) @ coarse.T - coarse @ mean
    against_exact = (x + mean) @ coarse.T - w @ mean
    assert np.abs(against_stored - truth).mean() < 0.2 * np.abs(against_exact - truth).mean()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"w_KD": np.full((K, D), np.nan)}, "NaN"),
        ({"w_KD": np.full((K, D), 1e39)}, "too large"),
        ({"gain_K": np.zeros(K)}, "never fires"),
        ({"bias_K": np.full(K, 1e300)}, "not finite in float32"),
    ],
)
def test_numbers_that_cannot_be_scored_are_refused(change: dict[str, np.ndarray], found: str, w: np.ndarray) -> None:
    fields = {"w_KD": w, "gate_K": np.zeros(K), "gain_K": np.ones(K), "bias_K": np.zeros(K)} | change
    with pytest.raises(WatchlistRefused, match=found):
        canonical.fold(canonical.EncoderRows(**fields))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    norm=st.sampled_from(NORMS),
    exponent=st.integers(-20, 20),
)
def test_firing_means_an_activation_above_zero(seed: int, norm: str, exponent: int) -> None:
    """The collector counts non-zero activations as fires; the gate and the value must never disagree."""
    rng = np.random.default_rng(seed)
    w, offset = rng.normal(size=(K, D)) * 2.0**exponent, rng.normal(size=D)
    gate, log_gain, bias = rng.normal(size=(3, K))
    rows = canonical.gated(w, gate, bias, log_gain, offset, norm)
    hi, lo, scale = canonical.fold(rows)
    x = rng.normal(size=(40, D))
    act = canonical.activations(hi, lo, scale, x)
    s = canonical.normalised(norm, x) @ canonical.stored(hi, lo).T
    assert (act >= 0).all()
    clear = np.abs(s - scale[0]) > 1e-4 * (1 + np.abs(s))
    assert ((act > 0) == (s > scale[0]))[clear].all()
