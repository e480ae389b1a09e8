"""From the op's static buffers to a ring slot: compact the non-zeros, copy the dense columns and norms.

Legend: n rows of the step, K features at one hook point, F features of the watchlist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from monitor.engine.encoder import SENTINEL, ArmedHook
from monitor.ring import Slot

F32 = npt.NDArray[np.float32]
_F16_MAX = float(np.finfo(np.float16).max)


class Written(NamedTuple):
    """What a drain put into the slot."""

    scored_rows: int
    fires: int
    silent: bool


class _Columns(NamedTuple):
    """Where one hook point's features stand in its buffer and in the watchlist."""

    sparse: slice | npt.NDArray[np.intp]
    sparse_feature: npt.NDArray[np.uint16]
    dense: npt.NDArray[np.intp]
    dense_at: slice


class Drain:
    """Writes one step's scores into a slot, from host arrays [rows, K] per hook point."""

    def __init__(self, hooks: Sequence[ArmedHook]) -> None:
        self._columns: list[_Columns] = []
        feature = dense_at = 0
        for hook in hooks:
            dense = np.array([f.dense for f in hook.rows.features])
            sparse = np.flatnonzero(~dense)
            self._columns.append(
                _Columns(
                    sparse=slice(0, len(sparse)) if (sparse == np.arange(len(sparse))).all() else sparse,
                    sparse_feature=(feature + sparse).astype(np.uint16),
                    dense=np.flatnonzero(dense),
                    dense_at=slice(dense_at, dense_at + int(dense.sum())),
                )
            )
            feature += len(dense)
            dense_at += int(dense.sum())

    def write(self, slot: Slot, acts: Sequence[F32], stats: Sequence[F32]) -> Written:
        """Args: acts, stats: per hook point, the first n rows of the op's buffers."""
        silent = any(stat_n3[0, 0] == SENTINEL for stat_n3 in stats)
        if silent:
            return Written(scored_rows=0, fires=0, silent=True)
        found = [np.nonzero(act_nK[:, columns.sparse]) for act_nK, columns in zip(acts, self._columns, strict=True)]
        n = len(acts[0])
        fires_found = sum(len(row) for row, _ in found)
        scored = n if fires_found <= len(slot.fires_N) else _rows_that_fit(found, n, len(slot.fires_N))
        at = 0
        for hook, (act_nK, stat_n3, columns, (row, column)) in enumerate(
            zip(acts, stats, self._columns, found, strict=True)
        ):
            fits = row < scored
            row, column = row[fits], column[fits]
            fires = slot.fires_N[at : at + len(row)]
            fires["row"] = row
            fires["feature"] = columns.sparse_feature[column]
            fires["act"] = act_nK[:, columns.sparse][row, column]
            at += len(row)
            if len(columns.dense):
                dense = act_nK[:scored, columns.dense]
                slot.dense_TP[:scored, columns.dense_at] = np.clip(dense, -_F16_MAX, _F16_MAX)
            slot.norm_TH[:scored, hook] = stat_n3[:scored, 0]
        return Written(scored_rows=scored, fires=at, silent=False)


def _rows_that_fit(found: Sequence[tuple[Any, ...]], rows: int, room: int) -> int:
    """How many leading rows have all their activations within `room`."""
    per_row = sum(np.bincount(row, minlength=rows) for row, _column in found)
    return int(np.searchsorted(np.cumsum(per_row), room, side="right"))


class HostBuffers:
    """The op's buffers on the CPU: numpy sees them where they are."""

    def __init__(self, hooks: Sequence[ArmedHook]) -> None:
        self._hooks = hooks
        self._acts = [hook.act_TK.numpy() for hook in hooks]
        self._stats = [hook.stat_T3.numpy() for hook in hooks]

    def views(self, rows: int) -> tuple[list[F32], list[F32]]:
        return [act[:rows] for act in self._acts], [stat[:rows] for stat in self._stats]

    def reset(self) -> None:
        for stat in self._stats:
            stat[0, 0] = SENTINEL


class DeviceCopy:
    """One step's scores on their way from the GPU to pinned host memory.

    The snapshot is queued on the stream that ran the forward, so that the next forward cannot write over it, and the
    copy to the host runs on a side stream. `ready()` asks the event; nothing here waits for the GPU.
    """

    def __init__(self, hooks: Sequence[ArmedHook]) -> None:
        self._hooks = hooks
        device = hooks[0].act_TK.device
        # torch's stubs leave these two untyped.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._snapshot = [(torch.empty_like(h.act_TK), torch.empty_like(h.stat_T3)) for h in hooks]
        self._host = [
            (torch.empty(h.act_TK.shape, pin_memory=True), torch.empty(h.stat_T3.shape, pin_memory=True)) for h in hooks
        ]
        self._arrays = [(act.numpy(), stat.numpy()) for act, stat in self._host]

    def start(self, rows: int) -> None:
        """Queue the copy of the first `rows` rows; returns at once."""
        for hook, (act, stat) in zip(self._hooks, self._snapshot, strict=True):
            act[:rows].copy_(hook.act_TK[:rows])
            stat[:rows].copy_(hook.stat_T3[:rows])
            hook.stat_T3[:1].fill_(SENTINEL)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for (act, stat), (act_host, stat_host) in zip(self._snapshot, self._host, strict=True):
                act_host[:rows].copy_(act[:rows], non_blocking=True)
                stat_host[:rows].copy_(stat[:rows], non_blocking=True)
            self._event.record(self._stream)

    def ready(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        """Only for a step without a forward: the engine is idle then."""
        self._event.synchronize()

    def views(self, rows: int) -> tuple[list[F32], list[F32]]:
        return [act[:rows] for act, _ in self._arrays], [stat[:rows] for _, stat in self._arrays]
