"""From the score buffers of all hook points to what is worth shipping: one Triton launch after the forward.

Dimension key: T rows of the step, H hook points, F features of all hook points in watchlist order, P dense ones among
them, N non-zeros, B programs.

SAE activations are sparse, so the non-zeros travel as (row, feature, activation), sorted by row and then feature,
with the dense columns and the norms beside them, all in one buffer whose places depend on the number of rows alone:
one copy brings a step to the host, a decode step's in some kilobytes. `Handover` does that on a side stream and never
waits for the GPU.

Readable version: `reference.compact`.
"""

# Triton's decorators carry no types, and a kernel's arguments are pointers that Python's types cannot name.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentwatch.kernels.reference import UNWRITTEN, Compacted
from latentwatch.kernels.score_triton import ceil_div

HEAD: Final = 8
"""int32 words: rows stored, non-zeros stored, hook points whose op did not run; the rest spare, for alignment."""
# Without a bound ptxas spills a word here and there to fit one more program onto a processor.
OPTIONS: Final = {"num_warps": 4, "maxnreg": 168}
"""How the compiler is to build the kernel."""
_BLOCKS: Final = 512
"""Programs of one launch, as long as 16 rows each are enough: each reads the numbers of all the others at once."""
_BLOCK_ROWS: Final = (4, 8, 16)
"""Rows of a program. Few at decode, where each pass over the features is a wait; past 16 registers spill."""
_TILE: Final = 1024
"""Elements that a program holds at a time."""
_DONE, _PUBLISHED = 1, 2
"""Words of the work buffer: tickets dealt out, programs that are done, non-zeros of each program."""


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


class Layout(NamedTuple):
    """Where each part of a step of T rows stands in the buffer, in int32 words."""

    rows: int
    capacity: int
    norm: int
    row: int
    act: int
    feature: int
    dense: int
    words: int


class Compactor:
    """Compacts one engine's score buffers; made once, after the buffers.

    Args:   acts, stats: per hook point the op's static buffers, float32 [T_max, K] and [T_max, 3], contiguous.
            dense_F: which features are shipped for every row. capacity: non-zeros that one step may hold.
    """

    def __init__(self, acts: Sequence[Tensor], stats: Sequence[Tensor], dense_F: Tensor, *, capacity: int) -> None:
        self._buffers = (*acts, *stats)  # the tables below hold their bare addresses
        device = acts[0].device
        self.capacity = capacity
        self.max_rows = acts[0].shape[0]
        self.hook_points = len(acts)
        self.features = len(dense_F)
        self.dense = int(dense_F.sum())
        self._column_F = torch.tensor(
            [act.data_ptr() + 4 * k for act in acts for k in range(act.shape[1])], dtype=torch.int64, device=device
        )
        self._stride_F = torch.tensor(
            [act.shape[1] for act in acts for _ in range(act.shape[1])], dtype=torch.int32, device=device
        )
        dense_at_F = torch.where(dense_F.cpu(), dense_F.cpu().cumsum(0) - 1, -1)
        self._dense_at_F = dense_at_F.to(dtype=torch.int32, device=device)
        self._stat_H = torch.tensor([stat.data_ptr() for stat in stats], dtype=torch.int64, device=device)
        blocks = self.constants(self.max_rows)["BLOCKS"]
        # The kernel leaves it as it found it, zero.
        self._work = torch.zeros(_PUBLISHED + blocks, dtype=torch.int32, device=device)
        for stat in stats:
            stat[:1, 0] = UNWRITTEN

    def layout(self, rows: int) -> Layout:
        capacity = min(self.capacity, rows * (self.features - self.dense))
        sizes = {
            "norm": rows * self.hook_points,
            "row": capacity,
            "act": capacity,
            "feature": ceil_div(capacity, 2),
            "dense": ceil_div(rows * self.dense, 2),
        }
        at, places = HEAD, {}
        for name, words in sizes.items():
            places[name] = at
            at += words
        return Layout(rows, capacity, **places, words=at)

    def run(self, rows: int, out: Tensor) -> None:
        """Compact rows [0, rows) into `out`, int32 of at least `layout(rows).words`."""
        layout = self.layout(rows)
        assert 0 < rows <= self.max_rows and out.numel() >= layout.words, (rows, self.max_rows, out.numel())
        constants = self.constants(rows)
        _compact_kernel[(ceil_div(rows, constants["BLOCK_R"]),)](
            column_ptr=self._column_F,
            stride_ptr=self._stride_F,
            dense_at_ptr=self._dense_at_F,
            stat_ptr=self._stat_H,
            out_ptr=out,
            work_ptr=self._work,
            rows=rows,
            capacity=layout.capacity,
            norm_at=layout.norm,
            row_at=layout.row,
            act_at=layout.act,
            feature_at=layout.feature,
            dense_at=layout.dense,
            **constants,
            **OPTIONS,
        )

    def warm_up(self) -> None:
        """Compile every shape of the kernel, so that none is compiled while serving; before the buffers hold scores."""
        for rows in self.steps():
            self.run(rows, torch.empty(self.layout(rows).words, dtype=torch.int32, device=self._work.device))

    def steps(self) -> list[int]:
        """Numbers of rows that together take every shape: they change at powers of two."""
        return [1 << i for i in range((self.max_rows - 1).bit_length())] + [self.max_rows]

    def constants(self, rows: int) -> dict[str, int]:
        """The kernel's compile-time arguments; also what the ahead-of-time check compiles."""
        block_rows = next((few for few in _BLOCK_ROWS if ceil_div(rows, few) <= _BLOCKS), _BLOCK_ROWS[-1])
        return {
            "F": self.features,
            "P": self.dense,
            "H": self.hook_points,
            "BLOCK_R": block_rows,
            "BLOCK_F": _TILE // block_rows,
            "BLOCK_H": _power_of_two(self.hook_points),
            "BLOCKS": max(_BLOCKS, _power_of_two(ceil_div(rows, block_rows))),
        }

    def unpack(self, buffer: Tensor, rows: int) -> tuple[Compacted, bool]:
        """Views of a finished buffer in host memory, and whether some hook point's op did not run in that step."""
        layout = self.layout(rows)
        scored_rows, stored, silent = buffer[:3].tolist()

        def part(start: int, dtype: torch.dtype, *shape: int) -> Tensor:
            size = int(torch.Size(shape).numel())
            words = size if dtype.itemsize == 4 else ceil_div(size, 2)
            return buffer[start : start + words].view(dtype)[:size].view(shape)

        return Compacted(
            scored_rows=scored_rows,
            row_N=part(layout.row, torch.int32, stored),
            feature_N=part(layout.feature, torch.int16, stored),
            act_N=part(layout.act, torch.float32, stored),
            dense_TP=part(layout.dense, torch.float16, rows, self.dense),
            norm_TH=part(layout.norm, torch.float32, rows, self.hook_points),
        ), silent > 0


class Handover:
    """One step's way from the GPU to pinned host memory. Keep as many as steps may be on their way at once.

    The compaction is queued on the stream that ran the forward, so that the next forward cannot write over what it
    reads; the copy runs on a side stream. `start` returns at once and `ready` asks; only `wait` waits.
    """

    def __init__(self, compactor: Compactor, stream: torch.cuda.Stream) -> None:
        words = compactor.layout(compactor.max_rows).words
        self._compactor, self._stream = compactor, stream
        self._staged = torch.empty(words, dtype=torch.int32, device=stream.device)
        self._host = torch.empty(words, dtype=torch.int32, pin_memory=True)
        self._arrived = torch.cuda.Event()
        self._rows = 0

    def start(self, rows: int) -> None:
        """Queue the first `rows` rows. Not before `ready()` of the step before is True or was waited for."""
        self._rows = rows
        self._compactor.run(rows, self._staged)
        words = self._compactor.layout(rows).words
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._host[:words].copy_(self._staged[:words], non_blocking=True)
            self._arrived.record(self._stream)

    def ready(self) -> bool:
        return bool(self._arrived.query())

    def wait(self) -> None:
        """Block until the step has arrived: only where the engine has nothing else to do."""
        self._arrived.synchronize()

    def result(self) -> tuple[Compacted, bool]:
        """The step, as views that hold until the next `start`; only once `ready()` is True."""
        return self._compactor.unpack(self._host, self._rows)


_done: tl.constexpr = tl.constexpr(_DONE)
_published: tl.constexpr = tl.constexpr(_PUBLISHED)
_unwritten: tl.constexpr = tl.constexpr(UNWRITTEN)


@triton.jit
def _tile(column_ptr, stride_ptr, dense_at_ptr, r, f, in_step, F: tl.constexpr):
    """Activations of rows r and features f, and each feature's place among the dense ones (-1: sparse)."""
    known = f < F
    column = tl.load(column_ptr + f, mask=known, other=0).to(tl.pointer_type(tl.float32))
    stride = tl.load(stride_ptr + f, mask=known, other=0)
    offset = r.to(tl.int64)[:, None] * stride[None, :]
    act = tl.load(column[None, :] + offset, mask=in_step[:, None] & known[None, :], other=0.0)
    return act, tl.load(dense_at_ptr + f, mask=known, other=-1)


@triton.jit(do_not_specialize=["rows", "capacity", "norm_at", "row_at", "act_at", "feature_at", "dense_at"])
def _compact_kernel(
    column_ptr,
    stride_ptr,
    dense_at_ptr,
    stat_ptr,
    out_ptr,
    work_ptr,
    rows,
    capacity,
    norm_at,
    row_at,
    act_at,
    feature_at,
    dense_at,
    F: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program owns BLOCK_R rows and all their features.

    column_F    addresses of act[0, k] of every feature, stride_F its row stride; stat_H addresses of the statistics
    dense_at_F  place of a dense feature among the dense ones, -1 for a sparse one
    out         int32 words, see Layout; a *_at argument is where a part begins
    work        int32: tickets, programs done, non-zeros + 1 per program; zero before and after

    A program's place is its ticket, so that it only ever waits for programs that already run: it counts its non-zeros,
    publishes the number, adds up those before it and writes behind them. The output is therefore the same every time.
    """
    place = tl.atomic_add(work_ptr, 1)
    programs = tl.num_programs(0)
    r = place * BLOCK_R + tl.arange(0, BLOCK_R)
    in_step = r < rows
    published_ptr = work_ptr + _published

    fired = tl.zeros((BLOCK_R,), tl.int32)
    dense_ptr = (out_ptr + dense_at).to(tl.pointer_type(tl.float16), bitcast=True)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        act, among_dense = _tile(column_ptr, stride_ptr, dense_at_ptr, r, f, in_step, F)
        non_zero = ((act != 0) & (among_dense < 0)[None, :]).to(tl.int32)
        fired += tl.sum(non_zero, axis=1)
        if P > 0:
            clipped = tl.minimum(tl.maximum(act, -65504.0), 65504.0).to(tl.float16)
            is_dense = in_step[:, None] & (among_dense >= 0)[None, :]
            tl.store(dense_ptr + r[:, None] * P + among_dense[None, :], clipped, mask=is_dense)

    found = tl.sum(fired, axis=0)
    tl.atomic_xchg(published_ptr + place, found + 1, sem="relaxed")
    others = tl.arange(0, BLOCKS)
    # The number itself says that it is there, so no order of memory accesses is needed between the two.
    published = tl.load(published_ptr + others, mask=others < place, other=1, volatile=True)
    while tl.min(published, axis=0) == 0:
        published = tl.load(published_ptr + others, mask=others < place, other=1, volatile=True)
    begin = tl.sum(published - 1, axis=0)

    at = begin + tl.cumsum(fired, axis=0) - fired
    whole = in_step & (at + fired <= capacity)
    row_ptr = out_ptr + row_at
    act_ptr = (out_ptr + act_at).to(tl.pointer_type(tl.float32), bitcast=True)
    feature_ptr = (out_ptr + feature_at).to(tl.pointer_type(tl.int16), bitcast=True)
    if found > 0:
        for start in range(0, F, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            act, among_dense = _tile(column_ptr, stride_ptr, dense_at_ptr, r, f, in_step, F)
            non_zero = ((act != 0) & (among_dense < 0)[None, :]).to(tl.int32)
            to = at[:, None] + tl.cumsum(non_zero, axis=1) - non_zero
            mask = (non_zero > 0) & whole[:, None]
            tl.store(row_ptr + to, tl.broadcast_to(r[:, None], (BLOCK_R, BLOCK_F)), mask=mask)
            tl.store(act_ptr + to, act, mask=mask)
            tl.store(feature_ptr + to, tl.broadcast_to(f[None, :], (BLOCK_R, BLOCK_F)).to(tl.int16), mask=mask)
            at += tl.sum(non_zero, axis=1)

    h = tl.arange(0, BLOCK_H)
    stat = tl.load(stat_ptr + h, mask=h < H, other=0).to(tl.pointer_type(tl.float32))
    has_norm = in_step[:, None] & (h < H)[None, :]
    norm = tl.load(stat[None, :] + r.to(tl.int64)[:, None] * 3, mask=has_norm, other=0.0)
    norm_ptr = (out_ptr + norm_at).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(norm_ptr + r[:, None] * H + h[None, :], norm, mask=has_norm)
    silent = tl.sum(tl.sum(((norm == _unwritten) & (r == 0)[:, None]).to(tl.int32), axis=1), axis=0)

    if (place == programs - 1) & (begin + found <= capacity):
        tl.store(out_ptr, rows)
        tl.store(out_ptr + 1, begin + found)
    if (begin <= capacity) & (begin + found > capacity):
        tl.store(out_ptr, place * BLOCK_R + tl.sum(whole.to(tl.int32), axis=0))
        tl.store(out_ptr + 1, begin + tl.sum(tl.where(whole, fired, 0), axis=0))
    # Between the last read of this program and its word that it is done: norms and the numbers of the others.
    tl.debug_barrier()
    if place == 0:
        tl.store(out_ptr + 2, silent)
        tl.store(stat, tl.full((BLOCK_H,), _unwritten, tl.float32), mask=h < H)
    if tl.atomic_add(work_ptr + _done, 1, sem="acq_rel") == programs - 1:
        tl.store(published_ptr + others, tl.zeros((BLOCKS,), tl.int32), mask=others < programs)
        tl.store(work_ptr + _done, 0)
        tl.store(work_ptr, 0)
