"""The score kernel in Triton's interpreter against its reference. Collected by `test_in_interpreter.py`.

The interpreter runs programs one after the other on one thread: it proves arithmetic, masks and addresses, and says
nothing about races, shared memory or registers (tests/gpu and test_ahead_of_time.py do).

Dimension key: T tokens, D d_model, K features at one hook point.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.kernels import score_triton
from torch import Tensor

from tests.support.kernel_cases import Case, assert_matches, make_case, poisoned_buffers

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = score_triton.Variant(16, 16, 32, 1, 4, 2)
SHAPES = [SMALL, score_triton.Variant(16, 32, 64, 4, 4, 2), score_triton.Variant(32, 16, 32, 2, 4, 2)]
# A row that is not finite, or zero, makes numpy warn where a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
WIDE_GRID = os.environ.get("LATENTWATCH_KERNELS_FULL") == "1"


def run(
    case: Case,
    variant: score_triton.Variant,
    *,
    lo: bool = True,
    rows: int | None = None,
    scratch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Buffers poisoned with NaN, and scratch too but for its counters, which must come back as they were."""
    act_TK, stat_T3 = poisoned_buffers(rows or case.tokens, case.features)
    hi_KD = case.w_KD.bfloat16()
    lo_KD = (case.w_KD - hi_KD.float()).bfloat16()
    if scratch is None:
        scratch = torch.full((score_triton.COUNTERS + variant.scratch_words(case.tokens, case.features),), math.nan)
        scratch[: score_triton.COUNTERS] = 0
    score_triton.score(
        case.x_TD, case.residual_TD, hi_KD, lo_KD if lo else None, case.scale_6K, act_TK, stat_T3, scratch, variant
    )
    assert scratch[: score_triton.COUNTERS].view(torch.int32).eq(0).all(), "a counter was left behind"
    return act_TK, stat_T3


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, a, b in zip(("act_TK", "stat_T3"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", SHAPES, ids=lambda v: "x".join(map(str, v[:4])))
@pytest.mark.parametrize("residual", [True, False], ids=["two-halves", "summed"])
def test_scores_equal_the_reference(variant: score_triton.Variant, dtype: torch.dtype, residual: bool) -> None:
    case = make_case(19, 200, 21, dtype=dtype, residual=residual, norms=[0, 1, 2, 3])
    assert_matches(case, *run(case, variant))


@settings(max_examples=200 if WIDE_GRID else 12, deadline=None)
@given(
    T=st.integers(1, 35),
    D=st.integers(2, 150),
    K=st.integers(1, 37),
    norm=st.integers(0, 3),
    variant=st.sampled_from(SHAPES),
    seed=st.integers(0, 999),
)
def test_scores_equal_the_reference_for_any_shape_and_norm(
    T: int, D: int, K: int, norm: int, variant: score_triton.Variant, seed: int
) -> None:
    case = make_case(T, D, K, dtype=torch.bfloat16, residual=bool(seed % 2), norms=[0, norm], seed=seed)
    assert_matches(case, *run(case, variant))


@pytest.mark.parametrize("K", [8, 64, 256, 1024] if WIDE_GRID else [8, 64])
@pytest.mark.parametrize("T", [1, 64, 300] if WIDE_GRID else [1])
def test_the_tables_own_shapes_equal_the_reference(T: int, K: int) -> None:
    case = make_case(T, 1000, K, dtype=torch.bfloat16)
    assert_matches(case, *run(case, score_triton.choose(T, K, 1000, split=True)))


def test_without_the_second_term_scores_are_those_of_the_rounded_rows() -> None:
    case = make_case(9, 100, 12, dtype=torch.bfloat16)
    rounded = Case(case.x_TD, case.residual_TD, case.w_KD.bfloat16().float(), case.scale_6K)
    assert_matches(rounded, *run(case, SMALL, lo=False))


def test_rows_beyond_the_step_keep_what_they_held() -> None:
    case = make_case(17, 64, 6, dtype=torch.bfloat16)
    act_TK, stat_T3 = run(case, SMALL, rows=40)
    assert act_TK[17:].isnan().all() and stat_T3[17:].isnan().all()
    assert not act_TK[:17].isnan().any() and not stat_T3[:17].isnan().any()


def test_rows_that_stand_apart_in_memory_are_read_where_they_stand() -> None:
    """vLLM hands out slices of wider buffers; the kernel takes their row stride."""
    case = make_case(9, 64, 6, dtype=torch.bfloat16)
    apart_TD = torch.full((9, 100), math.nan, dtype=torch.bfloat16)
    apart_TD[:, :64] = case.x_TD
    apart = Case(apart_TD[:, :64], case.residual_TD, case.w_KD, case.scale_6K)
    assert_same(run(apart, SMALL), run(case, SMALL))


@pytest.mark.parametrize("variant", SHAPES, ids=lambda v: "x".join(map(str, v[:4])))
def test_a_non_finite_row_is_named_and_poisons_no_other(variant: score_triton.Variant) -> None:
    case = make_case(20, 150, 18, dtype=torch.bfloat16, norms=[0, 1, 2, 3])
    clean_TK, clean_T3 = run(case, variant)
    case.x_TD[3, 140], case.x_TD[3, 2], case.x_TD[3, 3] = math.nan, math.inf, -math.inf
    case.x_TD[18, 0] = 1e30
    act_TK, stat_T3 = run(case, variant)
    assert stat_T3[3].tolist() == [math.inf, math.inf, 3.0]
    assert stat_T3[18].tolist() == [math.inf, math.inf, 1.0]
    assert act_TK[[3, 18]].eq(0).all()
    others = [t for t in range(20) if t not in (3, 18)]
    assert_same((act_TK[others], stat_T3[others]), (clean_TK[others], clean_T3[others]))


def test_a_zero_row_divides_by_nothing() -> None:
    case = make_case(4, 64, 8, dtype=torch.bfloat16, residual=False, norms=[0, 1, 2, 3])
    case.x_TD[1] = 0
    assert_matches(case, *run(case, SMALL))


def test_the_stream_is_rounded_to_nearest_even_before_it_is_scored() -> None:
    """The interpreter's own cast truncates; with it this test and every bfloat16 score here would be wrong."""
    x_TD = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    half_TD = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    case = make_case(16, 64, 16, dtype=torch.bfloat16)
    halves = Case(x_TD, half_TD, case.w_KD, case.scale_6K)
    summed = Case(x_TD + half_TD, None, case.w_KD, case.scale_6K)
    assert_same(run(halves, SMALL), run(summed, SMALL))


@pytest.mark.parametrize("variant", [SMALL, SHAPES[1]], ids=["whole", "split"])
def test_a_row_scores_the_same_bits_whatever_stands_beside_it(variant: score_triton.Variant) -> None:
    """Wherever it stands in its tile too, but that only a GPU can show: numpy's product rounds by position."""
    case = make_case(21, 96, 18, dtype=torch.bfloat16, norms=[0, 1, 2, 3])
    act_TK, stat_T3 = run(case, variant)
    others = make_case(21, 96, 18, dtype=torch.bfloat16, seed=7)
    others.x_TD[::3] = case.x_TD[::3]
    assert case.residual_TD is not None and others.residual_TD is not None
    others.residual_TD[::3] = case.residual_TD[::3]
    mixed = Case(others.x_TD, others.residual_TD, case.w_KD, case.scale_6K)
    mixed_TK, mixed_T3 = run(mixed, variant)
    assert_same((mixed_TK[::3], mixed_T3[::3]), (act_TK[::3], stat_T3[::3]))


def test_scratch_serves_step_after_step_and_hook_after_hook() -> None:
    """Graph replay runs the same launches over the same scratch; nothing of one may leak into the next."""
    variant = score_triton.Variant(16, 16, 32, 4, 4, 2)
    scratch = torch.zeros(score_triton.COUNTERS + variant.scratch_words(40, 40))
    for T, K, seed in [(33, 40, 1), (5, 7, 2), (33, 40, 3), (40, 1, 4)]:
        case = make_case(T, 128, K, dtype=torch.bfloat16, seed=seed)
        assert_matches(case, *run(case, variant, scratch=scratch))


def test_a_step_too_large_for_the_scratch_is_scored_without_it() -> None:
    variant = score_triton.Variant(16, 16, 32, 4, 4, 2)
    case = make_case(33, 128, 20, dtype=torch.bfloat16)
    assert_matches(case, *run(case, variant, scratch=torch.zeros(score_triton.COUNTERS + 10)))
