"""The score op on a CPU: float32 throughout, which on a CPU without AMX is also the fastest way.

Dimension key: T tokens in the step (padded), D d_model, K features at one hook point.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentwatch.kernels.reference import LAYER_NORM_EPSILON
from latentwatch.watchlist.file import NORMS


def score(
    x_TD: Tensor, residual_TD: Tensor | None, w_KD: Tensor, scale_6K: Tensor, act_TK: Tensor, stat_T3: Tensor
) -> None:
    """Write rows [0, T) of act_TK and stat_T3; what they hold is said in `reference.score`."""
    T, D = x_TD.shape
    act, stat = act_TK[:T], stat_T3[:T]
    x = (x_TD if residual_TD is None else x_TD + residual_TD).float()
    tau_K, gain_K, bias_K, lo_K, colsum_K, norm_K = scale_6K
    length_T = torch.linalg.vector_norm(x, dim=1)
    s_TK = x @ w_KD.t()
    if norm_K.any():
        mean_T = x.mean(dim=1)
        std_T = (x - mean_T[:, None]).square().sum(dim=1).div(max(D - 1, 1)).sqrt()
        layer_norm, constant_norm, centre = (
            norm_K == NORMS.index(n) for n in ("layer_norm", "constant_norm", "centre")
        )
        s_TK -= torch.where(layer_norm | centre, mean_T[:, None], 0.0) * colsum_K
        s_TK *= torch.where(layer_norm, 1.0 / (std_T + LAYER_NORM_EPSILON)[:, None], 1.0)
        unit_T = torch.where(length_T > 0, math.sqrt(D) / length_T, 0.0)
        s_TK *= torch.where(constant_norm, unit_T[:, None], 1.0)
    torch.maximum(torch.addcmul(bias_K, gain_K, s_TK), lo_K, out=act)
    act.masked_fill_(s_TK <= tau_K, 0.0)
    # Two passes over what is there take a thirtieth of vector_norm's largest-element norm on a CPU.
    torch.maximum(x.amax(dim=1), x.amin(dim=1).neg_(), out=stat[:, 1])
    stat[:, 2] = 0.0
    broken_T = ~torch.isfinite(length_T)
    if broken_T.any():
        act[broken_T] = 0.0
        stat[broken_T, 1] = math.inf
        stat[broken_T, 2] = (~torch.isfinite(x[broken_T])).sum(dim=1).clamp(min=1).float()
        length_T = length_T.masked_fill(broken_T, math.inf)
    # Last, for it is what says that the rows are scored.
    stat[:, 0] = length_T
