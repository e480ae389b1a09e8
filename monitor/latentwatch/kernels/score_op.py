"""The op that stands in the model's compiled graph: `torch.ops.latentwatch.score`.

Dimension key: T tokens in the step (padded), D d_model, K features at one hook point.

It keeps no state, allocates nothing that outlives the call and never waits for the device, so that it can be traced
into a compiled graph and captured into a CUDA graph. It never raises, whatever it is given: what it cannot read is left
unscored, which the untouched sentinel in its buffer shows. Importing this module twice, or in many processes, is
harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from latentwatch.errors import EngineRefused, RefusalReason
from latentwatch.kernels import score_cpu
from latentwatch.watchlist.file import HookRows

SCHEMA: Final = (
    "score(Tensor x_TD, Tensor? residual_TD, Tensor w_hi_KD, Tensor? w_lo_KD, Tensor scale_6K, "
    "Tensor(a!) act_TK, Tensor(b!) stat_T3, Tensor(c!)? scratch=None) -> ()"
)
"""x_TD         the residual stream, or one half of it; one of MODEL_DTYPES; [T, D], or [1, T, D] as a batch of one
residual_TD  the other half, same shape; the stream is their sum ROUNDED to that dtype. None: x_TD is the stream
w_hi_KD      encoder rows; on a CPU the float32 rows with w_lo_KD None, on a GPU bfloat16
w_lo_KD      bfloat16 rest of the rows (w_hi + w_lo), or None for the coarser w_hi alone
scale_6K     tau, gain, bias, lo, colsum, norm of the card, float32
act_TK       out, float32 [T_max, K]: rows [0, T) written, later rows untouched
stat_T3      out, float32 [T_max, 3]: Euclidean norm, max |x|, count of NaN or infinite elements
scratch      what `scratch()` gave for this device, zeroed once; without it a GPU takes a slower way at small T

A row whose stream is not finite has act 0.0 throughout and stat (inf, inf, >= 1); other rows never notice."""

MODEL_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


logger = logging.getLogger("vllm.latentwatch")
_reported: set[str] = set()


class _Stream(NamedTuple):
    """The stream, or its two halves, as rows."""

    x_TD: Tensor
    residual_TD: Tensor | None


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

    def launch(stream: _Stream) -> None:
        score_cpu.score(stream.x_TD, stream.residual_TD, w_hi_KD, scale_6K, act_TK, stat_T3)

    _without_raising(launch, x_TD, residual_TD, w_hi_KD, act_TK)


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
    def launch(stream: _Stream) -> None:
        # Imported here, so that a CPU engine never loads Triton.
        from latentwatch.kernels import score_triton as gpu

        gpu.score(stream.x_TD, stream.residual_TD, w_hi_KD, w_lo_KD, scale_6K, act_TK, stat_T3, scratch)

    _without_raising(launch, x_TD, residual_TD, w_hi_KD, act_TK)


def _score_elsewhere(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    w_hi_KD: Tensor,
    w_lo_KD: Tensor | None,
    scale_6K: Tensor,
    act_TK: Tensor,
    stat_T3: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """On a device that has no kernel of ours nothing is scored; without it the dispatcher would raise."""


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
    """Nothing is returned, so there is no shape to tell Dynamo, and nothing about which it could raise."""


def _without_raising(
    launch: Callable[[_Stream], None], x: Tensor, residual: Tensor | None, w_KD: Tensor, act_TK: Tensor
) -> None:
    """Score what can be read. What cannot, or fails, is left unscored: to raise here would fail the forward, and with
    it the server (I4)."""
    try:
        stream = _readable(x, residual, w_KD, act_TK)
        if stream is not None:
            launch(stream)
            return
        shapes = [
            "None" if half is None else f"{half.dtype} {tuple(half.shape)} on {half.device}" for half in (x, residual)
        ]
        _report_once(f"a stream of {shapes[0]}, residual {shapes[1]}, cannot be read by the score op")
    except Exception as error:  # whatever a kernel or an allocation may raise, the forward goes on
        _report_once(f"the score op failed with {type(error).__name__}: {error}")


def _report_once(what: str) -> None:
    """One line for each thing that happens, and for few things: this runs in every forward."""
    if what not in _reported and len(_reported) < 8:
        _reported.add(what)
        logger.error("latentwatch: %s; such steps are counted as unseen{op_silent}", what)


def _readable(x: Tensor, residual: Tensor | None, w_KD: Tensor, act_TK: Tensor) -> _Stream | None:
    """The stream as rows of d_model that have room in the buffers; None where it is anything else."""
    halves = [half for half in (x, residual) if half is not None]
    if not all(_are_rows(half, w_KD.shape[1]) and half.device == act_TK.device for half in halves):
        return None
    rows = [half.reshape(-1, half.shape[-1]) for half in halves]
    if rows[0].shape[0] > act_TK.shape[0] or rows[0].shape != rows[-1].shape:
        return None
    return _Stream(rows[0], rows[1] if len(rows) == 2 else None)


def _are_rows(half: Tensor, d_model: int) -> bool:
    """[T, D], or the same in a batch of one: Hugging Face's models have that dimension, also inside vLLM."""
    shape = half.shape
    return (
        half.dtype in MODEL_DTYPES
        and half.layout == torch.strided
        and (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1))
        and shape[-1] == d_model
    )


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


def expected(rows: HookRows, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """What the op must make of a float32 stream on the host: (act_TK, stat_T3), on the host."""
    act_TK, stat_T3 = torch.zeros(len(x_TD), len(rows.features)), torch.zeros(len(x_TD), 3)
    score_cpu.score(x_TD, None, torch.tensor(rows.w_KD), torch.tensor(rows.scale_6K), act_TK, stat_T3)
    return act_TK, stat_T3


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
    library.impl("score", _score_elsewhere, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake("latentwatch::score", _score_fake, lib=library)
    return library


_LIBRARY: Final[torch.library.Library] = globals().get("_LIBRARY") or _register()
"""Kept alive, also through a reload: an op vanishes with the Library object that registered it."""
