"""The compaction kernel in Triton's interpreter against its reference. Collected by `test_in_interpreter.py`.

Dimension key: T rows, H hook points, F features of all hook points.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.kernels import compact, reference
from torch import Tensor

POISON = 0x7FC07FC0
"""NaN as float32 and as float16, and no row or feature number as an integer."""


class Buffers:
    """Score buffers of several hook points, as the op leaves them, and a compactor over them."""

    def __init__(
        self, widths: list[int], *, T_max: int = 24, firing: float = 0.3, capacity: int = 10_000, seed: int = 0
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.rng = rng
        self.acts = [
            torch.rand(T_max, K, generator=rng) * (torch.rand(T_max, K, generator=rng) < firing) for K in widths
        ]
        self.stats = [torch.zeros(T_max, 3) for _ in widths]
        self.dense_F = torch.arange(sum(widths)) % 5 == 1
        self.compactor = compact.Compactor(self.acts, self.stats, self.dense_F, capacity=capacity)

    def write(self) -> None:
        for stat in self.stats:
            stat.copy_(torch.rand(stat.shape, generator=self.rng))

    def compacted(self, rows: int) -> tuple[reference.Compacted, bool]:
        out = torch.full((self.compactor.layout(rows).words,), POISON, dtype=torch.int32)
        self.compactor.run(rows, out)
        return self.compactor.unpack(out, rows)

    def expected(self, rows: int, capacity: int) -> reference.Compacted:
        return reference.compact(self.acts, self.stats, self.dense_F, rows, capacity=capacity)


def assert_equal(found: reference.Compacted, expected: reference.Compacted) -> None:
    for name, a, b in zip(reference.Compacted._fields, found, expected, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert a == b, name


@settings(max_examples=10, deadline=None)
@given(
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    rows=st.integers(1, 24),
    firing=st.sampled_from([0.0, 0.05, 1.0]),
    capacity=st.sampled_from([1, 40, 10_000]),
    seed=st.integers(0, 99),
)
def test_non_zeros_columns_and_norms_equal_the_reference(
    widths: list[int], rows: int, firing: float, capacity: int, seed: int
) -> None:
    buffers = Buffers(widths, firing=firing, capacity=capacity, seed=seed)
    buffers.write()
    expected = buffers.expected(rows, capacity)
    found, silent = buffers.compacted(rows)
    assert_equal(found, expected)
    assert not silent


def test_an_overflowing_step_keeps_the_first_rows_that_fit_whole() -> None:
    buffers = Buffers([9], T_max=12, firing=1.0, capacity=30)
    buffers.write()
    found, _ = buffers.compacted(12)
    sparse = int((~buffers.dense_F).sum())
    assert found.scored_rows == 30 // sparse
    assert len(found.row_N) == found.scored_rows * sparse


def test_a_hook_point_whose_op_did_not_run_is_told_apart_and_every_step_asks_anew() -> None:
    buffers = Buffers([5, 5])
    buffers.write()
    assert buffers.compacted(3)[1] is False
    assert buffers.compacted(3)[1] is True, "nothing was written since"
    buffers.stats[0][0] = torch.tensor([2.0, 1.0, 0.0])
    assert buffers.compacted(3)[1] is True, "one of two"
    buffers.write()
    assert buffers.compacted(3)[1] is False


def test_dense_scores_beyond_float16_are_clipped_and_infinite_norms_are_kept() -> None:
    buffers = Buffers([5], firing=0.0)
    buffers.write()
    buffers.acts[0][0, 1], buffers.acts[0][1, 1] = 1e9, -1e9
    buffers.stats[0][2, 0] = math.inf
    found, _ = buffers.compacted(3)
    assert found.dense_TP[:, 0].tolist() == [65504.0, -65504.0, 0.0]
    assert found.norm_TH[2, 0] == math.inf


@pytest.mark.parametrize("rows", [1, 5])
def test_the_work_buffer_is_left_zero_for_the_next_step(rows: int) -> None:
    buffers = Buffers([6, 3], capacity=4, firing=1.0)
    for _ in range(2):
        buffers.write()
        assert_equal(
            buffers.compacted(rows)[0]._replace(norm_TH=torch.empty(0)),
            buffers.expected(rows, 4)._replace(norm_TH=torch.empty(0)),
        )
        assert buffers.compactor._work.eq(0).all()
