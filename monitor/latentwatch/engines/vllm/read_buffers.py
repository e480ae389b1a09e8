"""From the op's static buffers to a ring slot: compact the non-zeros, copy the dense columns and norms.

Legend: n rows of the step, K features at one hook point, F features of the watchlist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from latentwatch.arrays import F32, U16, Array
from latentwatch.engines.vllm.arming import ArmedHook
from latentwatch.handover.ring import Slot
from latentwatch.kernels.reference import UNWRITTEN, Compacted

_F16_MAX = float(np.finfo(np.float16).max)


class Written(NamedTuple):
    """What was put into the slot."""

    scored_rows: int
    fires: int
    silent: bool


UNSCORED: Final = Written(scored_rows=0, fires=0, silent=False)


class DeviceHandover(Protocol):
    """One step on its way from the GPU: kernels.compact.Handover, which a CPU engine must not import."""

    def start(self, rows: int) -> None: ...

    def ready(self) -> bool: ...

    def wait(self) -> None: ...

    def result(self) -> tuple[Compacted, bool]: ...


class _Columns(NamedTuple):
    """Where one hook point's features stand in its buffer and in the watchlist."""

    sparse: slice | npt.NDArray[np.intp]
    sparse_feature: U16
    dense: npt.NDArray[np.intp]
    dense_at: slice


class SlotWriter:
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
        silent = any(stat_n3[0, 0] == UNWRITTEN for stat_n3 in stats)
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


def _rows_that_fit(found: Sequence[tuple[Array, ...]], rows: int, room: int) -> int:
    """How many leading rows have all their activations within `room`."""
    per_row = sum(np.bincount(row, minlength=rows) for row, _column in found)
    return int(np.searchsorted(np.cumsum(per_row), room, side="right"))


class HostBuffers:
    """The op's buffers on the CPU: numpy sees them where they are, and they are compacted on the engine's thread."""

    def __init__(self, hooks: Sequence[ArmedHook]) -> None:
        self._writer = SlotWriter(hooks)
        self._acts = [hook.act_TK.numpy() for hook in hooks]
        self._stats = [hook.stat_T3.numpy() for hook in hooks]

    def write(self, slot: Slot, rows: int) -> Written:
        return self._writer.write(slot, [act[:rows] for act in self._acts], [stat[:rows] for stat in self._stats])

    def reset(self) -> None:
        """Mark the buffers as unwritten, once the step is written or given up."""
        for stat in self._stats:
            stat[0, 0] = UNWRITTEN


def write_compacted(slot: Slot, step: Compacted, *, silent: bool) -> Written:
    """Copy a step that the GPU compacted into a slot. Rows behind `scored_rows` do not fit and are left out."""
    if silent:
        return Written(scored_rows=0, fires=0, silent=True)
    scored, fires = step.scored_rows, len(step.row_N)
    slot.fires_N["row"][:fires] = step.row_N.numpy()
    slot.fires_N["feature"][:fires] = step.feature_N.numpy()
    slot.fires_N["act"][:fires] = step.act_N.numpy()
    slot.dense_TP[:scored] = step.dense_TP[:scored].numpy()
    slot.norm_TH[:scored] = step.norm_TH[:scored].numpy()
    return Written(scored_rows=scored, fires=fires, silent=False)


def device_handovers(hooks: Sequence[ArmedHook], capacity: int, count: int) -> list[DeviceHandover]:
    """`count` ways for a step from the GPU to the host, compacted there. Only where the hooks' buffers are on a GPU."""
    # Imported here, so that a CPU engine never loads Triton.
    from latentwatch.kernels.compact import Compactor, Handover

    dense_F = torch.tensor([feature.dense for hook in hooks for feature in hook.rows.features])
    acts, stats = [hook.act_TK for hook in hooks], [hook.stat_T3 for hook in hooks]
    compactor = Compactor(acts, stats, dense_F, capacity=capacity)
    compactor.warm_up()
    # torch's stubs leave it untyped.
    stream = torch.cuda.Stream(acts[0].device)  # type: ignore[no-untyped-call]
    return [Handover(compactor, stream) for _ in range(count)]
