"""The table that gives a step its kernel shape, as plain functions: nothing is compiled here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latentwatch.kernels import score_op, score_triton

MIB = 1 << 20


@given(T=st.integers(1, 200_000), K=st.integers(1, 1024), D=st.integers(64, 16384), split=st.booleans())
def test_a_shape_covers_the_step_and_cuts_no_part_below_two_blocks(T: int, K: int, D: int, split: bool) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for capability in (80, 90, 100):
            shape = score_triton.choose(T, K, D, split=split, dtype=dtype, capability=capability)
            assert 16 <= shape.block_k < 2 * max(16, K)
            assert shape.split == 1 or (split and D // shape.split >= 2 * shape.block_d)


@given(T_max=st.integers(1, 70_000), K=st.integers(1, 1024), step=st.floats(0, 1))
def test_scratch_made_for_the_longest_step_serves_every_shorter_one(T_max: int, K: int, step: float) -> None:
    T = max(1, round(T_max * step))
    for dtype in (torch.bfloat16, torch.float32):
        shape = score_triton.choose(T, K, 4096, split=True, dtype=dtype)
        assert score_triton.COUNTERS + shape.scratch_words(T, K) <= score_triton.scratch_words(T_max, K, 4096)
        assert shape.split == 1 or shape.tiles(T, K) <= score_triton.COUNTERS


def test_scratch_stays_within_32_mib_for_the_largest_watchlist() -> None:
    assert score_triton.scratch_words(8192, 1024, 4096) * 4 <= 32 * MIB


def test_a_batch_invariant_engine_gets_one_shape_whatever_the_step() -> None:
    assert len({score_triton.choose(T, 64, 4096, split=True, invariant=True) for T in (1, 16, 64, 300, 8192)}) == 1


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False), (None, False)])
def test_vllms_own_switch_asks_for_batch_invariance(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    assert score_triton.batch_invariant() is expected


@pytest.mark.parametrize("T_max", [1, 16, 100, 8192, 65536])
def test_warming_up_takes_every_shape_that_a_step_can_take(T_max: int) -> None:
    warmed = {score_triton.choose(T, 64, 4096, split=True) for T in score_triton.steps(T_max)}
    assert {score_triton.choose(T, 64, 4096, split=True) for T in range(1, T_max + 1, 7)} <= warmed


def test_a_cpu_needs_neither_scratch_nor_warming_up() -> None:
    assert score_op.scratch(8192, [64], 4096, "cpu") is None
    w_KD, scale_6K, act_TK, stat_T3 = torch.zeros(2, 8), torch.zeros(6, 2), torch.full((4, 2), 7.0), torch.zeros(4, 3)
    score_op.warm_up(w_KD, None, scale_6K, act_TK, stat_T3, None, dtype=torch.float32, residual=True)
    assert act_TK.eq(7).all()
