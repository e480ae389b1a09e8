"""What the kernels compute, written to be read: float64, one step a line, no tricks. The oracle of every kernel test.

Dimension key: T tokens, D d_model, K features at one hook point, H hook points, F features of all hook points in
watchlist order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from latentwatch.watchlist.file import NORMS, SCALE_ROWS

UNWRITTEN: Final = -1.0
"""The norm that row 0 of a hook point holds until the score op wrote one, which is never negative."""
LAYER_NORM_EPSILON = 1e-5
"""Added to the standard deviation, as SAELens' layer_norm mode does (not to the variance, as nn.LayerNorm does)."""


def score(x_TD: Tensor, residual_TD: Tensor | None, w_KD: Tensor, scale_6K: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and row statistics of one hook point, in float64.

    Args:    x_TD, residual_TD: the two halves of the residual stream in the model's dtype, or the stream and None.
             w_KD: encoder rows. scale_6K: the card's rows tau, gain, bias, lo, colsum, norm.
    Returns: act_TK: max(gain * s + bias, lo) where s = n(x) @ w > tau, else exactly 0.0.
             stat_T3: Euclidean norm, max |x|, count of NaN or infinite elements of the stream.
             A row that is not finite (it holds such an element, or the float32 sum of its squares overflows) has
             activations 0.0 and statistics (inf, inf, at least 1), so that nothing downstream has to expect a NaN.
    """
    # The stream is what Hugging Face's residual stream is: the sum rounded to the model's dtype.
    stream_TD = x_TD if residual_TD is None else x_TD + residual_TD
    non_finite_T = (~torch.isfinite(stream_TD)).sum(dim=1)
    overflows_T = ~torch.isfinite(stream_TD.float().square().sum(dim=1))
    broken_T = (non_finite_T > 0) | overflows_T

    x = torch.where(broken_T[:, None], 0.0, stream_TD.double())
    scale = dict(zip(SCALE_ROWS, scale_6K.double(), strict=True))
    s_TK = x.new_empty(x.shape[0], w_KD.shape[0])
    for k, w_D in enumerate(w_KD.double()):
        s_TK[:, k] = normalised(x, NORMS[int(scale["norm"][k])]) @ w_D
    act_TK = torch.where(s_TK > scale["tau"], torch.maximum(scale["gain"] * s_TK + scale["bias"], scale["lo"]), 0.0)
    act_TK[broken_T] = 0.0

    stat_T3 = torch.stack([x.norm(dim=1), x.abs().amax(dim=1), non_finite_T.double()], dim=1)
    stat_T3[broken_T, :2] = torch.inf
    stat_T3[broken_T, 2] = stat_T3[broken_T, 2].clamp(min=1)
    return act_TK, stat_T3


def normalised(x_TD: Tensor, norm: str) -> Tensor:
    """n(x) of the card: what the encoder's author did to the stream before the matrix product."""
    if norm == "none":
        return x_TD
    if norm == "centre":
        return x_TD - x_TD.mean(dim=1, keepdim=True)
    if norm == "layer_norm":
        centred_TD = x_TD - x_TD.mean(dim=1, keepdim=True)
        return centred_TD / (x_TD.std(dim=1, keepdim=True, correction=1) + LAYER_NORM_EPSILON)
    assert norm == "constant_norm", norm
    length_T1 = x_TD.norm(dim=1, keepdim=True)
    # A zero row has no direction; SAELens divides by zero there, a monitor must not.
    return torch.where(length_T1 > 0, x_TD * x_TD.shape[1] ** 0.5 / length_T1, 0.0)


class Compacted(NamedTuple):
    """What is left of a step's score buffers once the zeros are gone.

    Whole rows from the first on, as many as fit; the rows behind them are left out and counted by whoever reads this.
    """

    scored_rows: int
    """Rows that fit."""
    row_N: Tensor
    """int32, rising"""
    feature_N: Tensor
    """int16, in watchlist order, rising within a row"""
    act_N: Tensor
    dense_TP: Tensor
    """float16 [T, P]: dense features, clipped to the finite range"""
    norm_TH: Tensor
    """float32 [T, H]: Euclidean norm of the stream, inf where it was not finite"""


def compact(acts: Sequence[Tensor], stats: Sequence[Tensor], dense_F: Tensor, rows: int, *, capacity: int) -> Compacted:
    """Non-zeros, dense columns and norms of the first `rows` rows.

    Args: acts, stats: per hook point [T_max, K] and [T_max, 3]. dense_F: bool [F]. capacity: non-zeros that fit.
    """
    act_TF = torch.cat([act_TK[:rows] for act_TK in acts], dim=1)
    sparse_TF = torch.where(dense_F, 0.0, act_TF)
    per_row_T = (sparse_TF != 0).sum(dim=1)
    scored = int((per_row_T.cumsum(0) <= capacity).sum())
    row_N, feature_N = sparse_TF[:scored].nonzero(as_tuple=True)
    largest = torch.finfo(torch.float16).max
    return Compacted(
        scored_rows=scored,
        row_N=row_N.int(),
        feature_N=feature_N.to(torch.int16),
        act_N=sparse_TF[row_N, feature_N],
        dense_TP=act_TF[:, dense_F].clamp(-largest, largest).half(),
        norm_TH=torch.stack([stat_T3[:rows, 0] for stat_T3 in stats], dim=1),
    )
