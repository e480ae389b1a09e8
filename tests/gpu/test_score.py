"""The score kernel on a GPU: exact, the same every time, and at home in CUDA graphs.

Dimension key: T tokens, D d_model, K features at one hook point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton
from latentwatch.kernels import score_op, score_triton
from torch import Tensor

from tests.support.kernel_cases import Case, assert_matches, make_case, poisoned_buffers

GRID = [
    # Each (T, K) takes another row of the table; D as served models have it, odd sizes among them.
    (1, 2048, 1),
    (1, 4096, 64),
    (3, 2304, 8),
    (17, 4096, 256),
    (64, 8192, 1024),
    (77, 5120, 33),
    (256, 4096, 64),
    (300, 2048, 1024),
    (1000, 4096, 256),
    (2048, 4096, 64),
    (2049, 3072, 100),
    (4100, 2048, 1024),
    (8192, 4096, 64),
]


class Loaded:
    """A case on the GPU with the op's tensors, as an engine holds them."""

    def __init__(self, T: int, D: int, K: int, **options: object) -> None:
        self.case: Case = make_case(T, D, K, **{"dtype": torch.bfloat16, **options}).to("cuda")
        self.hi_KD = self.case.w_KD.bfloat16()
        self.lo_KD = (self.case.w_KD - self.hi_KD.float()).bfloat16()
        self.scratch = score_op.scratch(max(T, 8192), [K], D, "cuda")
        self.act_TK, self.stat_T3 = poisoned_buffers(T, K, "cuda")

    def score(
        self, rows: Tensor | slice = slice(None), variant: score_triton.Variant | None = None
    ) -> tuple[Tensor, Tensor]:
        """The chosen rows scored as one step, into poisoned buffers."""
        x_TD = self.case.x_TD[rows]
        residual_TD = None if self.case.residual_TD is None else self.case.residual_TD[rows]
        act_TK, stat_T3 = poisoned_buffers(x_TD.shape[0], self.case.features, "cuda")
        arguments = (x_TD, residual_TD, self.hi_KD, self.lo_KD, self.case.scale_6K, act_TK, stat_T3, self.scratch)
        if variant is None:
            torch.ops.latentwatch.score(*arguments)
        else:
            score_triton.score(*arguments, variant)
        return act_TK, stat_T3


def assert_same_bits(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, a, b in zip(("act_TK", "stat_T3"), found, expected, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32)), name


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    compiled: list[str] = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(str(event.get("repr", event)))
    try:
        yield compiled
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook


@pytest.mark.parametrize(("T", "D", "K"), GRID, ids=lambda n: str(n))
@pytest.mark.parametrize("residual", [True, False], ids=["two-halves", "summed"])
def test_scores_equal_the_float64_reference(T: int, D: int, K: int, residual: bool) -> None:
    loaded = Loaded(T, D, K, residual=residual, norms=[0, 1, 2, 3])
    assert_matches(loaded.case, *loaded.score())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "D", "K"), [(5, 4096, 64), (300, 2304, 40), (2048, 2048, 256)], ids=lambda n: str(n))
def test_scores_of_other_dtypes_equal_the_float64_reference(T: int, D: int, K: int, dtype: torch.dtype) -> None:
    loaded = Loaded(T, D, K, dtype=dtype, norms=[0, 1, 2, 3])
    assert_matches(loaded.case, *loaded.score())


@pytest.mark.parametrize("K", [8, 64, 256, 1024])
@pytest.mark.parametrize("T", [8, 64, 256, 1024, 2048, 8192])
def test_every_run_gives_the_same_bits_while_other_kernels_disturb_the_order(T: int, K: int) -> None:
    loaded = Loaded(T, 4096, K, norms=[0, 1, 2, 3])
    expected = loaded.score()
    noise = torch.randn(4096, 4096, device="cuda")
    beside = torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(beside):
            noise = noise @ noise.t() / 4096
        assert_same_bits(loaded.score(), expected)


@pytest.mark.parametrize("K", [8, 64, 256, 1024])
@pytest.mark.parametrize("T", [16, 64, 256, 1024, 2048, 4096])
def test_a_row_gives_the_same_bits_wherever_it_stands_in_a_step_of_one_shape(T: int, K: int) -> None:
    loaded = Loaded(T, 4096, K, norms=[0, 1, 2, 3])
    variant = score_triton.choose(T, K, 4096, split=True, capability=score_triton._capability(loaded.case.x_TD.device))
    act_TK, stat_T3 = loaded.score(variant=variant)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(T)).cuda()
    assert_same_bits(loaded.score(order, variant), (act_TK[order], stat_T3[order]))
    few = order[: max(1, T // 3)]
    assert_same_bits(loaded.score(few, variant), (act_TK[few], stat_T3[few]))


def test_the_invariant_shape_gives_a_row_the_same_bits_in_every_step() -> None:
    loaded = Loaded(8192, 4096, 64, norms=[0, 1, 2, 3])
    variant = score_triton.INVARIANT.fit(64, 4096, split=False)
    act_TK, stat_T3 = loaded.score(variant=variant)
    for T in (1, 7, 16, 100, 1000):
        assert_same_bits(loaded.score(slice(T), variant), (act_TK[:T], stat_T3[:T]))


@pytest.mark.parametrize("K", [64, 1024])
def test_shapes_differ_by_no_more_than_the_stated_bound(K: int) -> None:
    """sqrt(D) * 2^-24 * ||x|| * ||w|| on a pre-activation, what `score` promises across the table."""
    T, D = 16, 4096
    loaded = Loaded(T, D, K)
    loaded.case.scale_6K[0], loaded.case.scale_6K[3] = -math.inf, -math.inf
    loaded.case.scale_6K[1], loaded.case.scale_6K[2] = 1.0, 0.0
    bound_TK = math.sqrt(D) * 2.0**-24 * loaded.case.stream.float().norm(dim=1)[:, None] * loaded.case.w_KD.norm(dim=1)
    shapes = {score_triton.choose(step, K, D, split=True) for step in score_triton.steps(8192)}
    acts = [loaded.score(variant=shape)[0] for shape in sorted(shapes)]
    for act_TK in acts[1:]:
        assert ((act_TK - acts[0]).abs() <= bound_TK).all()


def test_a_non_finite_row_is_named_and_poisons_no_other() -> None:
    for T in (40, 3000):
        loaded = Loaded(T, 4096, 64, norms=[0, 1, 2, 3])
        clean = loaded.score()
        loaded.case.x_TD[7, 4000], loaded.case.x_TD[7, 1], loaded.case.x_TD[30, 9] = math.nan, math.inf, 1e30
        act_TK, stat_T3 = loaded.score()
        assert stat_T3[7].tolist() == [math.inf, math.inf, 2.0]
        assert stat_T3[30].tolist() == [math.inf, math.inf, 1.0]
        assert act_TK[[7, 30]].eq(0).all()
        others = [t for t in range(T) if t not in (7, 30)]
        assert_same_bits((act_TK[others], stat_T3[others]), (clean[0][others], clean[1][others]))


def test_graph_replays_score_what_stands_in_the_buffers_now_whatever_graph_ran_before() -> None:
    """As an engine does: one graph per padded token count, all over the same scratch, buffers and pool."""
    longest, D, K = 512, 4096, 64
    loaded = Loaded(longest, D, K, norms=[0, 1, 2, 3])
    score_op.warm_up(
        loaded.hi_KD,
        loaded.lo_KD,
        loaded.case.scale_6K,
        loaded.act_TK,
        loaded.stat_T3,
        loaded.scratch,
        dtype=torch.bfloat16,
        residual=True,
    )
    x_TD, residual_TD = torch.zeros_like(loaded.case.x_TD), torch.zeros_like(loaded.case.x_TD)
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    pool = torch.cuda.graph_pool_handle()
    with counted_compilations() as compiled:
        for T in (512, 256, 64, 16, 4, 1):
            graphs[T] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[T], pool=pool):
                torch.ops.latentwatch.score(
                    x_TD[:T],
                    residual_TD[:T],
                    loaded.hi_KD,
                    loaded.lo_KD,
                    loaded.case.scale_6K,
                    loaded.act_TK,
                    loaded.stat_T3,
                    loaded.scratch,
                )
    assert compiled == [], "the warm-up left a shape uncompiled"
    for seed, T in enumerate((16, 512, 1, 64, 4, 256, 512, 1, 16)):
        step = make_case(T, D, K, dtype=torch.bfloat16, norms=[0, 1, 2, 3], seed=seed).to("cuda")
        step = Case(step.x_TD, step.residual_TD, loaded.case.w_KD, loaded.case.scale_6K)
        assert step.residual_TD is not None
        x_TD[:T], residual_TD[:T] = step.x_TD, step.residual_TD
        loaded.act_TK.fill_(math.nan)
        loaded.stat_T3.fill_(math.nan)
        graphs[T].replay()
        assert_matches(step, loaded.act_TK[:T], loaded.stat_T3[:T])
        assert loaded.act_TK[T:].isnan().all() and loaded.stat_T3[T:].isnan().all()
    assert loaded.scratch is not None
    assert loaded.scratch[: score_triton.COUNTERS].view(torch.int32).eq(0).all()


def test_the_compiled_op_stays_one_call_with_its_buffers_in_place() -> None:
    loaded = Loaded(64, 4096, 64)

    def layer(x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        hidden_TD = torch.tanh(x_TD)
        torch.ops.latentwatch.score(
            hidden_TD,
            residual_TD,
            loaded.hi_KD,
            loaded.lo_KD,
            loaded.case.scale_6K,
            loaded.act_TK,
            loaded.stat_T3,
            loaded.scratch,
        )
        return hidden_TD * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    assert loaded.case.residual_TD is not None
    for T in (64, 3, 17):
        loaded.act_TK.fill_(math.nan)
        loaded.stat_T3.fill_(math.nan)
        compiled(loaded.case.x_TD[:T], loaded.case.residual_TD[:T])
        step = Case(
            torch.tanh(loaded.case.x_TD[:T]), loaded.case.residual_TD[:T], loaded.case.w_KD, loaded.case.scale_6K
        )
        assert_matches(step, loaded.act_TK[:T], loaded.stat_T3[:T])
        assert loaded.act_TK[T:].isnan().all()


def test_a_step_of_any_length_compiles_nothing_after_the_warm_up() -> None:
    """vLLM's JIT monitor, and a user's latency, notice a kernel that is compiled while serving."""
    loaded = Loaded(8192, 4096, 64)
    arguments = (loaded.hi_KD, loaded.lo_KD, loaded.case.scale_6K, loaded.act_TK, loaded.stat_T3, loaded.scratch)
    score_op.warm_up(*arguments, dtype=torch.bfloat16, residual=True)
    with counted_compilations() as compiled:
        for T in (1, 2, 15, 16, 17, 32, 64, 65, 100, 256, 999, 1024, 2000, 4096, 5000, 8192):
            loaded.score(slice(T))
    assert compiled == []
