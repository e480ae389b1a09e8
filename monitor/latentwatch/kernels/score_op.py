"""The op that stands in the model's compiled graph: `torch.ops.latentwatch.score`.

Dimension key: T tokens in the step (padded), D d_model, K features at one hook point.

It keeps no state, allocates nothing that outlives the call and never waits for the device, so that it can be traced
into a compiled graph and captured into a CUDA graph. Importing this module twice, or in many processes, is harmless.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from latentwatch.errors import EngineRefused, RefusalReason
from latentwatch.kernels import score_cpu
from latentwatch.watchlist.file import HookRows

SCHEMA: Final = (
    "score(Tensor x_TD, Tensor? residual_TD, Tensor w_hi_KD, Tensor? w_lo_KD, Tensor scale_6K, "
    "Tensor(a!) act_TK, Tensor(b!) stat_T3, Tensor(c!)? scratch=None) -> ()"
)
"""x_TD         the residual stream, or one half of it; model dtype, rows contiguous
residual_TD  the other half, same dtype; the stream is their sum ROUNDED to that dtype. None: x_TD is the stream
w_hi_KD      encoder rows; on a CPU the float32 rows with w_lo_KD None, on a GPU bfloat16
w_lo_KD      bfloat16 rest of the rows (w_hi + w_lo), or None for the coarser w_hi alone
scale_6K     tau, gain, bias, lo, colsum, norm of the card, float32
act_TK       out, float32 [T_max, K]: rows [0, T) written, later rows untouched
stat_T3      out, float32 [T_max, 3]: Euclidean norm, max |x|, count of NaN or infinite elements
scratch      what `scratch()` gave for this device, zeroed once; without it a GPU takes a slower way at small T

A row whose stream is not finite has act 0.0 throughout and stat (inf, inf, >= 1); other rows never notice."""

MODEL_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


def _score_cpu(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    w_hi_KD: Tensor,
    w_lo_KD: Tensor | None,
    scale_6K: Tensor,
    act_TK: Tensor,
    stat_T3: Tensor,
    scratch: Tensor | None = None,
) -> None:
    del w_lo_KD, scratch  # the float32 rows are whole, and one thread pool needs no partial sums
    if _fits(x_TD, act_TK, stat_T3):
        score_cpu.score(x_TD, residual_TD, w_hi_KD, scale_6K, act_TK, stat_T3)


def _score_cuda(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    w_hi_KD: Tensor,
    w_lo_KD: Tensor | None,
    scale_6K: Tensor,
    act_TK: Tensor,
    stat_T3: Tensor,
    scratch: Tensor | None = None,
) -> None:
    # Imported here, so that a CPU engine never loads Triton.
    from latentwatch.kernels import score_triton as gpu

    if _fits(x_TD, act_TK, stat_T3):
        gpu.score(x_TD, residual_TD, w_hi_KD, w_lo_KD, scale_6K, act_TK, stat_T3, scratch)


def _score_fake(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    w_hi_KD: Tensor,
    w_lo_KD: Tensor | None,
    scale_6K: Tensor,
    act_TK: Tensor,
    stat_T3: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """Nothing is returned, so there is no shape to tell Dynamo."""


def _fits(x_TD: Tensor, act_TK: Tensor, stat_T3: Tensor) -> bool:
    """Whether the step has room in the buffers. One that has none is left unscored, which its untouched sentinel
    shows: to raise here would fail the forward, and with it the server."""
    return x_TD.shape[0] <= min(act_TK.shape[0], stat_T3.shape[0])


def pack(rows: HookRows, device: torch.device | str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """The op's (w_hi_KD, w_lo_KD, scale_6K) for one hook point of the watchlist, on `device`.

    Args:   dtype: the model's, refused where the op cannot read it.
    Raises: EngineRefused, reason "model_dtype".
    """
    if dtype not in MODEL_DTYPES:
        raise EngineRefused(
            f"hook point {rows.hook_point}",
            found=f"the model runs in {dtype}",
            instead=f"Serve it in one of {', '.join(str(known).removeprefix('torch.') for known in MODEL_DTYPES)}.",
            reason=RefusalReason.MODEL_DTYPE,
        )
    scale_6K = torch.tensor(rows.scale_6K, device=device)
    if torch.device(device).type == "cpu":
        return torch.tensor(rows.w_KD), None, scale_6K
    hi_KD, lo_KD = (
        torch.tensor(bits.view("int16")).view(torch.bfloat16).to(device) for bits in (rows.w_hi_KD, rows.w_lo_KD)
    )
    return hi_KD, lo_KD, scale_6K


def scratch(tokens: int, features: Iterable[int], d_model: int, device: torch.device | str) -> Tensor | None:
    """Room for partial sums of steps of up to `tokens` tokens; None on a CPU, which needs none.

    One buffer serves all hook points, given by their numbers of features, as long as they run one after the other on
    one stream. The kernel leaves it as it found it.
    """
    if torch.device(device).type == "cpu":
        return None
    from latentwatch.kernels import score_triton as gpu

    words = max(gpu.scratch_words(tokens, K, d_model) for K in features)
    return torch.zeros(words, dtype=torch.float32, device=device)


def warm_up(
    w_hi_KD: Tensor,
    w_lo_KD: Tensor | None,
    scale_6K: Tensor,
    act_TK: Tensor,
    stat_T3: Tensor,
    scratch: Tensor | None,
    *,
    dtype: torch.dtype,
    residual: bool,
) -> None:
    """Compile every shape of the kernel that a step may take, so that none is compiled while serving.

    Writes zeros' scores into the buffers; call it before they mean anything. Does nothing on a CPU.
    """
    if act_TK.device.type == "cpu":
        return
    from latentwatch.kernels import score_triton as gpu

    for tokens in gpu.steps(act_TK.shape[0]):
        x_TD = torch.zeros(tokens, w_hi_KD.shape[1], dtype=dtype, device=act_TK.device)
        torch.ops.latentwatch.score(
            x_TD, x_TD if residual else None, w_hi_KD, w_lo_KD, scale_6K, act_TK, stat_T3, scratch
        )


def _register() -> torch.library.Library:
    # torch leaves Library without types.
    library = torch.library.Library("latentwatch", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(SCHEMA)  # type: ignore[no-untyped-call]
    library.impl("score", _score_cpu, "CPU")  # type: ignore[no-untyped-call]
    library.impl("score", _score_cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake("latentwatch::score", _score_fake, lib=library)
    return library


_LIBRARY: Final[torch.library.Library] = globals().get("_LIBRARY") or _register()
"""Kept alive, also through a reload: an op vanishes with the Library object that registered it."""
