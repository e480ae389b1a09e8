"""The score op on a GPU: one Triton launch per hook point.

Dimension key: T tokens in the step (padded), D d_model, K features at one hook point, S parts that D is cut into.

One program owns a [BLOCK_T, BLOCK_K] tile of act_TK and one of the S parts of D. It reads the stream once for the
matrix product and for the row statistics. With S > 1 the programs of a tile leave their sums in `scratch`, and the one
that arrives last adds them up in the order of the parts, so that the result does not depend on who came last.

Same bits every time: no atomic touches a sum. Same bits for a row whatever else is in the batch: only as long as the
tile shape stays, and `choose` picks it by T, because no shape is good at both ends. Across shapes the order of the
float32 sums differs, which moves a pre-activation by at most about sqrt(D) * 2^-24 * ||x|| * ||w||, some thousand
times less than the batch-dependent matrix products of the model itself move x. An engine that rules those out
(VLLM_BATCH_INVARIANT=1) gets the one shape `INVARIANT` for every T.

Readable version: `reference.score`.
"""

# Triton's decorators carry no types, and a kernel's arguments are pointers that Python's types cannot name.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentwatch.kernels.reference import LAYER_NORM_EPSILON

COUNTERS: Final = 4096
"""int32 words at the head of `scratch`: how many parts of each tile have arrived. Zero between launches."""
STATS: Final = 3
"""Partial row statistics kept beside each partial tile: sum, sum of squares, max |x|."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Variant(NamedTuple):
    """One compiled shape of the kernel."""

    block_t: int
    block_k: int
    block_d: int
    split: int
    warps: int
    stages: int

    def fit(self, K: int, D: int, *, split: bool) -> Variant:
        """The variant for this hook point: no tile wider than K, no part shorter than two blocks of D."""
        block_k = min(self.block_k, max(16, 1 << (K - 1).bit_length()))
        whole_parts = max(1, D // (2 * self.block_d))
        parts = min(self.split, 1 << (whole_parts.bit_length() - 1)) if split else 1
        return self._replace(block_k=block_k, split=parts)

    def tiles(self, T: int, K: int) -> int:
        return ceil_div(T, self.block_t) * ceil_div(K, self.block_k)

    def scratch_words(self, T: int, K: int) -> int:
        """float32 words of partial sums that T tokens need, besides the counters."""
        return self.tiles(T, K) * self.split * self.block_t * (self.block_k + STATS) if self.split > 1 else 0


WIDE: Final = Variant(128, 128, 32, 1, 8, 4)
WIDE_FROM_SM_100: Final = Variant(128, 64, 64, 1, 8, 3)
"""There a thread holds a whole row of the accumulator, and 128 columns of coefficients beside it spill."""

TABLE: Final[tuple[tuple[int, tuple[tuple[int, Variant], ...]], ...]] = (
    # Up to T tokens: up to K features, shape. By arithmetic for the 132 processors of an H200, not yet by measurement:
    # about one program each, at most some 64 KiB for each to read at decode, and at prefill tiles so tall that reading
    # w again for each (both terms, from the second-level cache) stays below reading the stream.
    (16, (
        (64, Variant(16, 16, 128, 16, 4, 4)),
        (256, Variant(16, 32, 128, 8, 4, 4)),
        (1024, Variant(16, 32, 128, 4, 4, 4)),
    )),
    (64, (
        (64, Variant(16, 16, 128, 8, 4, 4)),
        (256, Variant(16, 32, 128, 4, 4, 4)),
        (1024, Variant(16, 64, 64, 2, 4, 4)),
    )),
    (256, (
        (64, Variant(16, 64, 64, 8, 4, 4)),
        (256, Variant(32, 64, 64, 4, 4, 4)),
        (1024, Variant(64, 64, 64, 2, 8, 3)),
    )),
    (1024, (
        (64, Variant(32, 64, 64, 4, 4, 4)),
        (256, Variant(64, 64, 64, 2, 8, 3)),
        (1024, Variant(64, 128, 64, 1, 8, 3)),
    )),
    (2048, ((64, Variant(64, 64, 64, 4, 8, 3)), (256, Variant(128, 64, 64, 2, 8, 3)), (1024, WIDE))),
    (4096, ((64, Variant(128, 64, 64, 4, 8, 3)), (256, Variant(128, 64, 64, 1, 8, 3)), (1024, WIDE))),
    (1 << 30, ((64, Variant(128, 64, 64, 2, 8, 3)), (1024, WIDE))),
)  # fmt: skip
TABLE_FLOAT32: Final[tuple[tuple[int, tuple[tuple[int, Variant], ...]], ...]] = (
    (64, ((1024, Variant(16, 16, 128, 16, 4, 4)),)),
    (1024, ((1024, Variant(64, 64, 32, 4, 8, 3)),)),
    (1 << 30, ((1024, Variant(64, 64, 32, 1, 8, 3)),)),
)
"""A float32 model gets exact products without tensor cores; what serves at speed is not float32."""
INVARIANT: Final = Variant(16, 64, 64, 1, 4, 4)
"""For engines that promise the same bits whatever the batch; costs reads of w at prefill and parallelism at decode."""
INVARIANT_FLOAT32: Final = Variant(16, 16, 128, 1, 4, 4)


def choose(
    T: int,
    K: int,
    D: int,
    *,
    split: bool,
    dtype: torch.dtype = torch.bfloat16,
    invariant: bool = False,
    capability: int = 90,
) -> Variant:
    """The shape for a step of T tokens. `split`: there is scratch for partial sums. `capability`: 90 for sm_90."""
    if invariant:
        return (INVARIANT_FLOAT32 if dtype == torch.float32 else INVARIANT).fit(K, D, split=False)
    by_features = next(row for most, row in (TABLE_FLOAT32 if dtype == torch.float32 else TABLE) if most >= T)
    shape = next((shape for most, shape in by_features if most >= K), by_features[-1][1])
    if shape is WIDE and capability >= 100:
        shape = WIDE_FROM_SM_100
    shape = shape.fit(K, D, split=split)
    # A thread holds more of a tile where there is no wgmma, and twice the operands where float16 is taken apart.
    heavy = (capability < 90 and shape.block_t * shape.block_k >= 8192) or (
        dtype == torch.float16 and shape.block_t * shape.block_k >= 2048
    )
    return shape._replace(block_d=32, stages=4) if heavy else shape


def scratch_words(T_max: int, K: int, D: int) -> int:
    """Words of `scratch` with which no step of up to T_max tokens lacks room."""
    words = 0
    for table, dtype in ((TABLE, torch.bfloat16), (TABLE_FLOAT32, torch.float32)):
        for T in steps(T_max, table):
            words = max(words, choose(T, K, D, split=True, dtype=dtype).scratch_words(T, K))
    return COUNTERS + words


def steps(T_max: int, table: Sequence[tuple[int, object]] = TABLE) -> list[int]:
    """The longest step of each row of the table, up to T_max tokens; together they take every shape."""
    return [most for most, _ in table if most < T_max] + [T_max]


def batch_invariant() -> bool:
    """Whether vLLM was told to give the same bits whatever the batch; its own switch, read when the op is prepared."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")


def score(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    w_hi_KD: Tensor,
    w_lo_KD: Tensor | None,
    scale_6K: Tensor,
    act_TK: Tensor,
    stat_T3: Tensor,
    scratch: Tensor | None,
    variant: Variant | None = None,
) -> None:
    """Launch the kernel; the arguments are the op's. `variant` overrides the table, for tests and the benchmark."""
    T, D = x_TD.shape
    K = w_hi_KD.shape[0]
    if T == 0:
        return
    shape = variant or choose(
        T,
        K,
        D,
        split=scratch is not None,
        dtype=x_TD.dtype,
        invariant=INVARIANT_BATCHES,
        capability=_capability(x_TD.device),
    )
    if shape.split > 1:
        assert scratch is not None
        if shape.tiles(T, K) > COUNTERS or COUNTERS + shape.scratch_words(T, K) > scratch.numel():
            shape = shape._replace(split=1)
    # Triton takes rows with a stride, but elements of a row side by side.
    x = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    residual = residual_TD if residual_TD is None or residual_TD.stride(1) == 1 else residual_TD.contiguous()
    grid = (ceil_div(K, shape.block_k), shape.split, ceil_div(T, shape.block_t))
    _score_kernel[grid](
        x_ptr=x,
        residual_ptr=residual,
        hi_ptr=w_hi_KD,
        lo_ptr=w_lo_KD,
        scale_ptr=scale_6K,
        act_ptr=act_TK,
        stat_ptr=stat_T3,
        scratch_ptr=scratch if shape.split > 1 else None,
        T=T,
        K=K,
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        **constants(shape, D, x.dtype),
        **options(shape),
    )


@functools.cache
def _capability(device: torch.device) -> int:
    """90 for sm_90. On a CPU, that is in Triton's interpreter, any will do."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def constants(shape: Variant, D: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """The kernel's compile-time arguments for one shape; also what the ahead-of-time check compiles."""
    return {
        "D": D,
        "BLOCK_T": shape.block_t,
        "BLOCK_K": shape.block_k,
        "BLOCK_D": shape.block_d,
        "SPLIT": shape.split,
        "WARPS": shape.warps,
        "CHUNKS": ceil_div(ceil_div(D, shape.block_d), shape.split),
        "HALF": dtype == torch.float16,
        "INTERPRETED": INTERPRETED,
    }


def options(shape: Variant) -> dict[str, int | bool]:
    """How the compiler is to build one shape."""
    return {
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        # Stated, for its default is about to change (Triton 3.10) and the reference's tolerance rests on neither.
        "enable_fp_fusion": True,
        # Without a bound ptxas spills a word here and there, to fit a program that is not there beside this one.
        "maxnreg": 255,
    }


INVARIANT_BATCHES: Final = batch_invariant()
INTERPRETED: Final = triton.knobs.runtime.interpret
"""Whether the kernels run in Triton's interpreter, which gets bfloat16 products and roundings silently wrong."""
_EPSILON: tl.constexpr = tl.constexpr(LAYER_NORM_EPSILON)
_COUNTERS: tl.constexpr = tl.constexpr(COUNTERS)
_STATS: tl.constexpr = tl.constexpr(STATS)


@triton.jit
def _round_to_bfloat16(x):
    """The float32 nearest to x that bfloat16 holds, ties to even, NaN kept; the interpreter's own cast truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def _stream(x, residual, INTERPRETED: tl.constexpr):
    """x + residual as the model would hold it, rounded to its dtype (in the interpreter, float32 of the same value)."""
    total = x.to(tl.float32) + residual.to(tl.float32)
    if INTERPRETED and x.dtype == tl.bfloat16:
        return _round_to_bfloat16(total)
    return total.to(x.dtype)


@triton.jit
def _multiply(x, w, acc, INTERPRETED: tl.constexpr):
    """acc_TK + x_TD @ w_KD.T, where x holds values that bfloat16 has, so that the cast is exact."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), acc, input_precision="ieee")
    return tl.dot(x.to(tl.bfloat16), tl.trans(w), acc)


@triton.jit(do_not_specialize=["T"])
def _score_kernel(
    x_ptr,
    residual_ptr,
    hi_ptr,
    lo_ptr,
    scale_ptr,
    act_ptr,
    stat_ptr,
    scratch_ptr,
    T,
    K,
    x_stride,
    residual_stride,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WARPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    HALF: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """act_TK = max(gain * s + bias, lo) where s = n(x_TD) @ w_KD.T > tau, else 0; stat_T3 = norm, max |x|, non-finite.

    x_TD         the stream, or a half of it; model dtype, D contiguous
    residual_TD  the other half or None
    hi_KD, lo_KD encoder rows, bfloat16, row = hi + lo; lo may be None
    scale_6K     tau, gain, bias, lo, colsum, norm; float32
    act_TK       out, float32, contiguous; rows [0, T)
    stat_T3      out, float32, contiguous; rows [0, T), written by the programs of the first features
    scratch      int32 counters, then float32 partial tiles and statistics; None where SPLIT is 1

    T is not specialised on: a decode step of 1 or 16 tokens would otherwise compile anew while serving. float16 is
    split into two bfloat16 terms, exactly (11 bits into 8 + 8); float32 is multiplied without tensor cores.
    """
    k_tile = tl.program_id(0)
    part = tl.program_id(1)
    t_tile = tl.program_id(2)
    within = tl.arange(0, BLOCK_T)
    k = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_step = within < T - t_tile * BLOCK_T
    real = k < K
    # 64 bits to the tile, for a step may have more than 2^31 elements; 32 within it, for pointers take two registers.
    first_row = (t_tile * BLOCK_T).to(tl.int64)
    x_ptr += first_row * x_stride
    x_rows = within[:, None] * x_stride
    if residual_ptr is not None:
        residual_ptr += first_row * residual_stride
        residual_rows = within[:, None] * residual_stride
    w_rows = k[:, None] * D

    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    loudest = tl.zeros((BLOCK_T,), tl.float32)
    for chunk in range(CHUNKS):
        d = (part * CHUNKS + chunk) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        x_mask = in_step[:, None] & (d < D)
        w_mask = real[:, None] & (d < D)
        stream = tl.load(x_ptr + x_rows + d, mask=x_mask, other=0.0)
        if residual_ptr is not None:
            stream = _stream(stream, tl.load(residual_ptr + residual_rows + d, mask=x_mask, other=0.0), INTERPRETED)
        x = stream.to(tl.float32)
        hi = tl.load(hi_ptr + w_rows + d, mask=w_mask, other=0.0)
        if x_ptr.dtype.element_ty == tl.float32:
            w = hi.to(tl.float32)
            if lo_ptr is not None:
                w += tl.load(lo_ptr + w_rows + d, mask=w_mask, other=0.0).to(tl.float32)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        else:
            # A bfloat16 stream goes to the tensor cores as it was loaded, from shared memory if nothing was added.
            coarse = stream
            if HALF:
                coarse = x.to(tl.bfloat16)
                acc = _multiply(x - coarse.to(tl.float32), hi, acc, INTERPRETED)
            acc = _multiply(coarse, hi, acc, INTERPRETED)
            if lo_ptr is not None:
                lo = tl.load(lo_ptr + w_rows + d, mask=w_mask, other=0.0)
                if HALF:
                    acc = _multiply(x - coarse.to(tl.float32), lo, acc, INTERPRETED)
                acc = _multiply(coarse, lo, acc, INTERPRETED)
        total += tl.sum(x, axis=1)
        squares += tl.sum(x * x, axis=1)
        loudest = tl.maximum(loudest, tl.max(tl.abs(x), axis=1))

    if SPLIT > 1:
        tile = t_tile * tl.num_programs(0) + k_tile
        WORDS: tl.constexpr = BLOCK_T * (BLOCK_K + _STATS)
        TOGETHER: tl.constexpr = max(1, min(SPLIT, 8, 64 * 32 * WARPS // (BLOCK_T * BLOCK_K)))
        mine = scratch_ptr + _COUNTERS + (tile.to(tl.int64) * SPLIT + part) * WORDS
        at = within[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        stats = BLOCK_T * BLOCK_K + within
        tl.store(mine + at, acc, mask=in_step[:, None])
        tl.store(mine + stats, total, mask=in_step)
        tl.store(mine + stats + BLOCK_T, squares, mask=in_step)
        tl.store(mine + stats + 2 * BLOCK_T, loudest, mask=in_step)
        # All threads' stores are before the barrier, one thread's release after it: who acquires sees them all.
        tl.debug_barrier()
        counter = (scratch_ptr + tile).to(tl.pointer_type(tl.int32), bitcast=True)
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
            first = mine - part.to(tl.int64) * WORDS
            acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
            total = tl.zeros((BLOCK_T,), tl.float32)
            squares = tl.zeros((BLOCK_T,), tl.float32)
            loudest = tl.zeros((BLOCK_T,), tl.float32)
            # As many loads fly together as 64 registers a thread take.
            for other in tl.range(0, SPLIT, loop_unroll_factor=TOGETHER):
                # ".cg": past the first-level cache, which may hold what another launch left at this address.
                theirs = first + other * WORDS
                acc += tl.load(theirs + at, mask=in_step[:, None], other=0.0, cache_modifier=".cg")
                total += tl.load(theirs + stats, mask=in_step, other=0.0, cache_modifier=".cg")
                squares += tl.load(theirs + stats + BLOCK_T, mask=in_step, other=0.0, cache_modifier=".cg")
                theirs_loudest = tl.load(theirs + stats + 2 * BLOCK_T, mask=in_step, other=0.0, cache_modifier=".cg")
                loudest = tl.maximum(loudest, theirs_loudest)
            _finish(
                x_ptr, x_stride, residual_ptr, residual_stride, scale_ptr, act_ptr + first_row * K,
                stat_ptr + first_row * 3, acc, total, squares, loudest, in_step, k, K, k_tile,
                D, BLOCK_T, BLOCK_D, INTERPRETED,
            )  # fmt: skip
            tl.store(counter, 0)
    else:
        _finish(
            x_ptr, x_stride, residual_ptr, residual_stride, scale_ptr, act_ptr + first_row * K,
            stat_ptr + first_row * 3, acc, total, squares, loudest, in_step, k, K, k_tile,
            D, BLOCK_T, BLOCK_D, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _normalised(acc, total, squares, norm, colsum, D: tl.constexpr):
    """n(x) @ w from x @ w and the row sums: r * (x @ w - m * colsum), with r and m as the feature's norm has them."""
    mean = total / D
    variance = tl.maximum(squares - total * mean, 0.0) / (D - 1)
    inverse_deviation = 1.0 / (tl.sqrt(variance) + _EPSILON)
    unit = tl.where(squares > 0, tl.sqrt(float(D)) / tl.sqrt(squares), 0.0)
    subtracted = tl.where((norm == 1.0) | (norm == 3.0), colsum, 0.0)
    ratio = tl.where(norm[None, :] == 1.0, inverse_deviation[:, None], 1.0)
    ratio = tl.where(norm[None, :] == 2.0, unit[:, None], ratio)
    return (acc - mean[:, None] * subtracted[None, :]) * ratio


@triton.jit
def _finish(
    x_ptr,
    x_stride,
    residual_ptr,
    residual_stride,
    scale_ptr,
    act_ptr,
    stat_ptr,
    acc,
    total,
    squares,
    loudest,
    in_step,
    k,
    K,
    k_tile,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """From whole sums to activations and statistics: norm, gate, activation, store. Pointers are at the tile's rows."""
    within = tl.arange(0, BLOCK_T)
    real = k < K
    finite = squares < float("inf")
    length = tl.sqrt(squares)
    norm = tl.load(scale_ptr + 5 * K + k, mask=real, other=0.0)
    s = acc
    # A branch and not a select: without it a wide tile keeps eight coefficients of each column in registers and spills.
    if tl.max(norm, axis=0) > 0:
        s = _normalised(acc, total, squares, norm, tl.load(scale_ptr + 4 * K + k, mask=real, other=0.0), D)

    tau = tl.load(scale_ptr + k, mask=real, other=0.0)
    gain = tl.load(scale_ptr + K + k, mask=real, other=0.0)
    bias = tl.load(scale_ptr + 2 * K + k, mask=real, other=0.0)
    lo = tl.load(scale_ptr + 3 * K + k, mask=real, other=0.0)
    act = tl.maximum(gain[None, :] * s + bias[None, :], lo[None, :])
    act = tl.where((s > tau[None, :]) & finite[:, None], act, 0.0)
    tl.store(act_ptr + within[:, None] * K + k[None, :], act, mask=in_step[:, None] & real[None, :])

    if k_tile == 0:
        broken = tl.zeros((BLOCK_T,), tl.float32)
        unhealthy = in_step & ~finite
        if tl.sum(unhealthy.to(tl.int32), axis=0) > 0:
            # Counted here and not in the main loop, where it would cost every healthy element two instructions.
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)[None, :]
                mask = unhealthy[:, None] & (d < D)
                x = tl.load(x_ptr + within[:, None] * x_stride + d, mask=mask, other=0.0)
                if residual_ptr is not None:
                    residual = tl.load(residual_ptr + within[:, None] * residual_stride + d, mask=mask, other=0.0)
                    x = _stream(x, residual, INTERPRETED)
                broken += tl.sum(tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0.0, 1.0), axis=1)
            broken = tl.where(finite, 0.0, tl.maximum(broken, 1.0))
        stat = stat_ptr + within * 3
        tl.store(stat, tl.where(finite, length, float("inf")), mask=in_step)
        tl.store(stat + 1, tl.where(finite, loudest, float("inf")), mask=in_step)
        tl.store(stat + 2, broken, mask=in_step)
