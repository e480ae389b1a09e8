"""Inputs for the kernel tests, and the one place that says how close is close enough.

Dimension key: T tokens, D d_model, K features at one hook point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from latentwatch.kernels import reference
from latentwatch.names import HookPoint, Severity
from latentwatch.watchlist.file import Feature, HookRows, bf16_from_f32, f32_from_bf16
from torch import Tensor

EPSILON_F32 = 2.0**-24


@dataclass
class Case:
    x_TD: Tensor
    residual_TD: Tensor | None
    w_KD: Tensor
    """Float32 values that are exactly the sum of two bfloat16 ones, as a watchlist's rows are."""
    scale_6K: Tensor

    def to(self, device: str) -> Case:
        residual_TD = None if self.residual_TD is None else self.residual_TD.to(device)
        return Case(self.x_TD.to(device), residual_TD, self.w_KD.to(device), self.scale_6K.to(device))

    @property
    def tokens(self) -> int:
        return self.x_TD.shape[0]

    @property
    def features(self) -> int:
        return self.w_KD.shape[0]

    @property
    def stream(self) -> Tensor:
        return self.x_TD if self.residual_TD is None else self.x_TD + self.residual_TD


def make_case(
    T: int,
    D: int,
    K: int,
    *,
    dtype: torch.dtype = torch.float32,
    residual: bool = True,
    norms: Sequence[int] = (0,),
    seed: int = 0,
) -> Case:
    """A residual stream as models have it (a mean, a few loud channels) and features that fire on some rows.

    Every fifth feature is dense (tau = lo = -inf); the norm codes are dealt out in turn.
    """
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=rng) * torch.exp(torch.randn(D, generator=rng) * 0.5) + 0.3
    half = torch.randn(T, D, generator=rng)
    rows = canonical_rows(D, K, norms=norms, seed=seed)
    return Case(
        (x - half if residual else x).to(dtype),
        half.to(dtype) if residual else None,
        torch.tensor(rows.w_KD),
        torch.tensor(rows.scale_6K),
    )


def canonical_rows(D: int, K: int, *, norms: Sequence[int] = (0,), seed: int = 0) -> HookRows:
    rng = np.random.default_rng(seed)
    exact_KD = (rng.standard_normal((K, D)) / math.sqrt(D)).astype(np.float32)
    hi_KD = bf16_from_f32(exact_KD)
    lo_KD = bf16_from_f32(exact_KD - f32_from_bf16(hi_KD))
    dense_K = np.arange(K) % 5 == 0
    scale_6K = np.stack(
        [
            np.where(dense_K, -np.inf, rng.normal(0.5, 0.5, K)),
            rng.uniform(0.5, 2.0, K),
            rng.normal(0.0, 0.5, K),
            np.where(dense_K, -np.inf, 0.0),
            (f32_from_bf16(hi_KD).astype(np.float64) + f32_from_bf16(lo_KD)).sum(axis=1),
            np.resize(np.asarray(norms), K),
        ]
    ).astype(np.float32)
    features = tuple(
        Feature(f"f{k}", "", Severity.NONE, "probe" if dense_K[k] else "sae", "none" if dense_K[k] else "exact", "")
        for k in range(K)
    )
    return HookRows(HookPoint(0), features, hi_KD, lo_KD, scale_6K)


def poisoned_buffers(T_max: int, K: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(act_TK, stat_T3) full of NaN, so that an element that is never written cannot pass."""
    return torch.full((T_max, K), math.nan, device=device), torch.full((T_max, 3), math.nan, device=device)


def pre_activation_bound(case: Case, relative: float = 4 * EPSILON_F32) -> Tensor:
    """How far a float32 pre-activation may lie from the float64 one, [T, K].

    Summing D products in any order costs at most a few units in the last place times sqrt(D) * ||x|| * ||w|| for
    signs as they come (the worst case, D instead of sqrt(D), needs every rounding to lean one way). Norms that
    subtract the mean multiply the colsum by it, and the one-pass variance loses digits as mean^2 / variance grows.
    """
    x = case.stream.double()
    D = x.shape[1]
    length_T1 = x.norm(dim=1, keepdim=True)
    raw_TK = relative * math.sqrt(D) * length_T1 * case.w_KD.double().norm(dim=1)
    mean_T1 = x.mean(dim=1, keepdim=True).abs()
    norm_K = case.scale_6K[5]
    subtracts_K = (norm_K == 1) | (norm_K == 3)
    raw_TK = raw_TK + relative * math.sqrt(D) * mean_T1 * case.scale_6K[4].double().abs() * subtracts_K
    std_T1 = x.std(dim=1, keepdim=True, correction=1)
    s_TK = reference.normalised(x, "layer_norm") @ case.w_KD.double().t()
    digits_T1 = relative * (1 + (mean_T1 / std_T1.clamp(min=1e-30)) ** 2)
    layer_TK = raw_TK / (std_T1 + reference.LAYER_NORM_EPSILON) + digits_T1 * s_TK.abs()
    constant_TK = raw_TK * math.sqrt(D) / length_T1.clamp(min=1e-30)
    bound_TK = torch.where(norm_K == 1, layer_TK, torch.where(norm_K == 2, constant_TK, raw_TK))
    return torch.nan_to_num(bound_TK, nan=1e-30) + 1e-30


def assert_matches(case: Case, act_TK: Tensor, stat_T3: Tensor, *, relative: float = 4 * EPSILON_F32) -> None:
    """Activations within the float32 bound of the float64 reference; gates equal but within it of the threshold."""
    expected_TK, expected_T3 = reference.score(case.x_TD, case.residual_TD, case.w_KD, case.scale_6K)
    tau_K, gain_K = case.scale_6K[0].double(), case.scale_6K[1].double()
    bound_TK = pre_activation_bound(case, relative)
    ungated_6K = case.scale_6K.clone()
    ungated_6K[0], ungated_6K[1], ungated_6K[2], ungated_6K[3] = -math.inf, 1.0, 0.0, -math.inf
    s_TK, _ = reference.score(case.x_TD, case.residual_TD, case.w_KD, ungated_6K)
    near_tau_TK = (s_TK - tau_K).abs() <= bound_TK
    act = act_TK.double()
    assert not act.isnan().any(), f"act holds NaN at {act.isnan().nonzero()[0].tolist()}"
    off_TK = (act - expected_TK).abs() - (
        bound_TK * gain_K + 4 * EPSILON_F32 * expected_TK.abs() + 4 * EPSILON_F32 * case.scale_6K[2].abs()
    )
    wrong_TK = (off_TK > 0) & ~near_tau_TK
    assert not wrong_TK.any(), _describe(wrong_TK, act, expected_TK, s_TK)
    zero_TK = (act == 0) != (expected_TK == 0)
    assert not (zero_TK & ~near_tau_TK & (expected_TK.abs() > bound_TK * gain_K)).any(), (
        "a gate differs away from its threshold"
    )
    torch.testing.assert_close(
        stat_T3[:, 0].double(), expected_T3[:, 0], rtol=math.sqrt(case.x_TD.shape[1]) * EPSILON_F32 * 4, atol=0
    )
    torch.testing.assert_close(stat_T3[:, 1:].double(), expected_T3[:, 1:], rtol=0, atol=0)


def _describe(wrong_TK: Tensor, act_TK: Tensor, expected_TK: Tensor, s_TK: Tensor) -> str:
    t, k = wrong_TK.nonzero()[0].tolist()
    where = f"token {t} feature {k}: {act_TK[t, k]} for {expected_TK[t, k]} (s = {s_TK[t, k]})"
    return f"{int(wrong_TK.sum())} of {wrong_TK.numel()} differ; {where}"
