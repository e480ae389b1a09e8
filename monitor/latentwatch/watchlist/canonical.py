"""Fold an encoder row as its authors define it into the canonical scorer that the engine runs.

Legend: K features, D d_model, T tokens. All folding is float64.

    authors    u = (n(x) - offset) @ w;   fires iff u > gate;   act = relu(gain * u + bias)
    canonical  s = n(x) @ w;              fires iff s > tau;    act = max(gain * s + bias', lo)

with shift = offset @ w, bias' = bias - gain * shift and tau = max(gate, -bias / gain) + shift, so that "fires" means
"activation above zero" in both. w is stored as two bfloat16 terms, and the shift is taken against the stored
values: the rounding of w then cancels in the mean component of x, the largest by far in a residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from latentwatch.arrays import F32, F64, U16
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.watchlist.file import NORMS, SCALE_ROWS, bf16_from_f32, f32_from_bf16

LAYER_NORM_EPSILON: Final = 1e-5
"""Added to the standard deviation, as SAELens and OpenAI's sparse_autoencoder do (not under the square root)."""


@dataclass(frozen=True)
class EncoderRows:
    """K encoder rows in their authors' terms, float64."""

    w_KD: F64
    gate_K: F64
    """On u. Ignored for dense rows."""
    gain_K: F64
    bias_K: F64
    offset_D: F64 | None = None
    """Subtracted from n(x), mostly the decoder bias; None where the encoder subtracts nothing."""
    norm: str = "none"
    dense: bool = False
    """No gate and no floor: a probe or a direction, whose score may be negative."""
    rank_K: F64 | None = None
    """TopK encoders: what the activation is multiplied by before the k largest are chosen; None means 1."""


def relu(
    w_KD: F64, bias_K: F64, offset_D: F64 | None = None, norm: str = "none", rank_K: F64 | None = None
) -> EncoderRows:
    """act = relu(u + bias)."""
    return EncoderRows(w_KD, -bias_K, np.ones_like(bias_K), bias_K, offset_D, norm, rank_K=rank_K)


def jumprelu(w_KD: F64, bias_K: F64, threshold_K: F64, offset_D: F64 | None = None, norm: str = "none") -> EncoderRows:
    """act = relu(u + bias) where u + bias > threshold, else 0."""
    return EncoderRows(w_KD, threshold_K - bias_K, np.ones_like(bias_K), bias_K, offset_D, norm)


def gated(
    w_KD: F64,
    gate_bias_K: F64,
    magnitude_bias_K: F64,
    log_gain_K: F64,
    offset_D: F64 | None = None,
    norm: str = "none",
) -> EncoderRows:
    """act = relu(exp(log_gain) * u + magnitude_bias) where u + gate_bias > 0, else 0 (arXiv 2404.16014)."""
    return EncoderRows(w_KD, -gate_bias_K, np.exp(log_gain_K), magnitude_bias_K, offset_D, norm)


def linear(w_KD: F64, bias_K: F64, offset_D: F64 | None = None, norm: str = "none") -> EncoderRows:
    """act = u + bias for every token: a probe's logit or a direction's projection."""
    return EncoderRows(w_KD, -np.inf * np.ones_like(bias_K), np.ones_like(bias_K), bias_K, offset_D, norm, dense=True)


def scaled(rows: EncoderRows, factor_K: F64) -> EncoderRows:
    """The same features with their activations multiplied by `factor_K` > 0 (a decoder norm, mostly)."""
    return replace(rows, gain_K=rows.gain_K * factor_K, bias_K=rows.bias_K * factor_K)


def input_scaled(rows: EncoderRows, scale: float) -> EncoderRows:
    """The same encoder behind an input that its authors multiply by `scale`: n(x) * scale, then the offset."""
    offset_D = None if rows.offset_D is None else rows.offset_D / scale
    return replace(rows, w_KD=rows.w_KD * scale, offset_D=offset_D)


def fold(rows: EncoderRows) -> tuple[U16, U16, F32]:
    """Canonical (w_hi, w_lo, scale) of the rows, in the layout of `file.HookRows`.

    Raises: WatchlistRefused: a gain that is not positive (a decoder row of zeros), or a value that float32 cannot hold.
    """
    hi_KD, lo_KD = split_bf16(rows.w_KD)
    w_KD = stored(hi_KD, lo_KD)
    shift_K = np.zeros(len(w_KD)) if rows.offset_D is None else w_KD @ rows.offset_D
    if not (rows.gain_K > 0).all():
        raise _refuse(
            f"the gain of selected row {int(np.argmin(rows.gain_K))} is {rows.gain_K.min()}: it never fires",
            "Leave this feature out.",
        )
    infinite = np.full(len(w_KD), -np.inf)
    gate_K = np.maximum(rows.gate_K, -rows.bias_K / rows.gain_K) + shift_K
    columns = {
        "tau": infinite if rows.dense else gate_K,
        "gain": rows.gain_K,
        "bias": rows.bias_K - rows.gain_K * shift_K,
        "lo": infinite if rows.dense else np.zeros(len(w_KD)),
        "colsum": w_KD.sum(axis=1),
        "norm": np.full(len(w_KD), float(NORMS.index(rows.norm))),
    }
    return hi_KD, lo_KD, _as_float32(columns, dense=rows.dense)


def _as_float32(columns: Mapping[str, F64], *, dense: bool) -> F32:
    """The columns as rows of one array; only a dense row may hold an infinity."""
    with np.errstate(over="ignore"):
        scale = np.stack(list(columns.values())).astype(np.float32)
    for name, values in zip(columns, scale, strict=True):
        if np.isnan(values).any() or np.isposinf(values).any() or (np.isneginf(values).any() and not dense):
            raise _refuse(f"the folded {name} is not finite in float32", "Leave this feature out, or check its file.")
    return scale


def split_bf16(w_KD: F64) -> tuple[U16, U16]:
    """Two bfloat16 terms whose sum is w to about 16 significant bits."""
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        w32 = w_KD.astype(np.float32)
        hi = bf16_from_f32(w32)
        rest = w32 - f32_from_bf16(hi)
    if not np.isfinite(rest).all():
        raise _refuse("an encoder weight is NaN, infinite or too large for bfloat16", "Check the source file.")
    return hi, bf16_from_f32(rest)


def stored(hi_KD: U16, lo_KD: U16) -> F64:
    """The encoder rows that a file with these two terms holds, exactly."""
    return f32_from_bf16(hi_KD).astype(np.float64) + f32_from_bf16(lo_KD)


def normalised(norm: str, x_TD: F64) -> F64:
    """n(x) in float64; the reference for every implementation of `card.NORMS`."""
    d_model = x_TD.shape[1]
    if norm == "none":
        return x_TD
    if norm == "constant_norm":
        return np.asarray(x_TD * np.sqrt(d_model) / np.linalg.norm(x_TD, axis=1, keepdims=True))
    centred_TD = np.asarray(x_TD - x_TD.mean(axis=1, keepdims=True))
    if norm == "centre":
        return centred_TD
    if norm == "layer_norm":
        return np.asarray(centred_TD / (centred_TD.std(axis=1, ddof=1, keepdims=True) + LAYER_NORM_EPSILON))
    raise ValueError(f"unknown norm {norm!r}, known are {NORMS}")


def scores(hi_KD: U16, lo_KD: U16, scale_6K: F32, x_TD: F64) -> F64:
    """s of the canonical form, float64 [T, K], each row under its own norm."""
    norm = scale_6K[SCALE_ROWS.index("norm")]
    s_TK = np.empty((len(x_TD), len(hi_KD)))
    for code in np.unique(norm):
        chosen = norm == code
        s_TK[:, chosen] = normalised(NORMS[int(code)], x_TD) @ stored(hi_KD[chosen], lo_KD[chosen]).T
    return s_TK


def activations(hi_KD: U16, lo_KD: U16, scale_6K: F32, x_TD: F64) -> F64:
    """Canonical activations, float64 [T, K]; 0 where a gated feature does not fire. The engine's op must equal this."""
    tau, gain, bias, lo, _, _ = scale_6K.astype(np.float64)
    s_TK = scores(hi_KD, lo_KD, scale_6K, x_TD)
    return np.where(s_TK > tau, np.maximum(gain * s_TK + bias, lo), 0.0)


def authors(rows: EncoderRows, x_TD: F64) -> F64:
    """Activations by the authors' own formula, float64 [T, K]: nothing folded, no row rounded."""
    n_TD = normalised(rows.norm, x_TD)
    if rows.offset_D is not None:
        n_TD = n_TD - rows.offset_D
    u_TK = n_TD @ rows.w_KD.T
    act_TK = rows.gain_K * u_TK + rows.bias_K
    return act_TK if rows.dense else np.where(u_TK > rows.gate_K, np.maximum(act_TK, 0.0), 0.0)


def _refuse(found: str, instead: str) -> WatchlistRefused:
    return WatchlistRefused("encoder rows", found=found, instead=instead, reason=RefusalReason.SOURCE_NUMBERS)
