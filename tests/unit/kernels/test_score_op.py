"""The op on a CPU: what it computes, and that it survives compilation with its buffers as graph inputs.

Dimension key: T tokens, D d_model, K features at one hook point.
"""

from __future__ import annotations

import importlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch import kernels
from latentwatch.errors import EngineRefused
from latentwatch.kernels import reference, score_op
from torch._inductor.utils import run_and_get_code

from tests.support.kernel_cases import Case, assert_matches, canonical_rows, make_case, poisoned_buffers

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def run(case: Case, *, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    act_TK, stat_T3 = poisoned_buffers(rows or case.tokens, case.features)
    torch.ops.latentwatch.score(case.x_TD, case.residual_TD, case.w_KD, None, case.scale_6K, act_TK, stat_T3)
    return act_TK, stat_T3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["two-halves", "summed"])
@pytest.mark.parametrize("T, D, K", [(1, 64, 1), (7, 96, 5), (33, 257, 40)], ids=lambda n: str(n))
def test_cpu_scores_equal_the_reference(T: int, D: int, K: int, dtype: torch.dtype, residual: bool) -> None:
    case = make_case(T, D, K, dtype=dtype, residual=residual, seed=T * D + K)
    assert_matches(case, *run(case))


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 20), D=st.integers(2, 130), K=st.integers(1, 20), norm=st.integers(0, 3), seed=st.integers(0, 999)
)
def test_cpu_scores_equal_the_reference_for_any_shape_and_norm(T: int, D: int, K: int, norm: int, seed: int) -> None:
    case = make_case(T, D, K, dtype=torch.bfloat16, residual=bool(seed % 2), norms=[norm], seed=seed)
    assert_matches(case, *run(case))


def test_rows_beyond_the_step_keep_what_they_held() -> None:
    """CUDA graphs replay into the same buffers; a later row belongs to nobody, but must not be half-written."""
    case = make_case(5, 64, 6)
    act_TK, stat_T3 = run(case, rows=9)
    assert act_TK[5:].isnan().all() and stat_T3[5:].isnan().all()
    assert not act_TK[:5].isnan().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_non_finite_row_is_named_and_poisons_no_other(poison: float) -> None:
    case = make_case(6, 64, 8, norms=[0, 1, 2, 3])
    clean_TK, clean_T3 = run(case)
    case.x_TD[2, 5] = poison
    case.x_TD[2, 9] = poison
    act_TK, stat_T3 = run(case)
    others = [0, 1, 3, 4, 5]
    assert act_TK[2].eq(0).all()
    assert stat_T3[2].tolist() == [math.inf, math.inf, 2.0]
    torch.testing.assert_close(act_TK[others], clean_TK[others], rtol=0, atol=0)
    torch.testing.assert_close(stat_T3[others], clean_T3[others], rtol=0, atol=0)


def test_a_row_whose_squares_overflow_counts_as_not_finite() -> None:
    case = make_case(3, 64, 4, dtype=torch.bfloat16, residual=False)
    case.x_TD[1, 0] = 1e30
    act_TK, stat_T3 = run(case)
    assert stat_T3[1].tolist() == [math.inf, math.inf, 1.0]
    assert act_TK[1].eq(0).all()


def test_a_zero_row_scores_zero_under_every_norm_but_the_bias() -> None:
    case = make_case(2, 64, 4, norms=[0, 1, 2, 3], residual=False)
    case.x_TD[0] = 0
    assert_matches(case, *run(case))


def test_a_dense_feature_is_scored_on_every_row_and_a_sparse_one_is_exactly_zero_below_its_threshold() -> None:
    case = make_case(64, 64, 8)
    act_TK, _ = run(case)
    dense_K = case.scale_6K[0].isneginf()
    assert dense_K.any() and not dense_K.all()
    assert act_TK[:, dense_K].ne(0).all()
    assert 0 < act_TK[:, ~dense_K].eq(0).sum() < act_TK[:, ~dense_K].numel()


def test_a_feature_at_its_threshold_does_not_fire_and_just_above_it_does() -> None:
    """JumpReLU's definition: s > tau."""
    x_TD = torch.tensor([[2.0], [math.nextafter(2.0, 3.0)], [2.0 + 2.0**-20]])
    scale_6K = torch.tensor([2.0, 1.0, 0.0, 0.0, 1.0, 0.0])[:, None].contiguous()
    act_TK, stat_T3 = poisoned_buffers(3, 1)
    torch.ops.latentwatch.score(x_TD, None, torch.ones(1, 1), None, scale_6K, act_TK, stat_T3)
    assert act_TK[:, 0].tolist() == [0.0, 0.0, 2.0 + 2.0**-20]
    expected_TK, _ = reference.score(x_TD, None, torch.ones(1, 1), scale_6K)
    assert torch.equal(act_TK, expected_TK)


def test_the_stream_is_rounded_to_the_model_dtype_before_it_is_scored() -> None:
    """1 + 2^-9 rounds to 1 in bfloat16; Hugging Face's own stream holds 1, so scores must come from 1."""
    x_TD = torch.ones(1, 2, dtype=torch.bfloat16)
    residual_TD = torch.full((1, 2), 2.0**-9, dtype=torch.bfloat16)
    scale_6K = torch.tensor([-math.inf, 1.0, 0.0, -math.inf, 1.0, 0.0])[:, None].contiguous()
    act_TK, stat_T3 = poisoned_buffers(1, 1)
    torch.ops.latentwatch.score(x_TD, residual_TD, torch.ones(1, 2), None, scale_6K, act_TK, stat_T3)
    assert act_TK.item() == 2.0


def test_a_step_longer_than_the_buffers_is_left_unscored() -> None:
    """To raise would fail the server's forward; the poison that stays is what tells the engine's side."""
    act_TK, stat_T3 = run(make_case(5, 64, 4), rows=4)
    assert act_TK.isnan().all()
    assert stat_T3.isnan().all()


def test_the_op_is_registered_once_however_often_it_is_imported() -> None:
    importlib.reload(score_op)
    case = make_case(2, 64, 4)
    assert_matches(case, *run(case))


def test_the_op_passes_torchs_own_checks() -> None:
    case = make_case(4, 64, 6)
    act_TK, stat_T3 = torch.zeros(4, 6), torch.zeros(4, 3)
    torch.library.opcheck(
        torch.ops.latentwatch.score.default,
        (case.x_TD, case.residual_TD, case.w_KD, None, case.scale_6K, act_TK, stat_T3),
    )


class Layers(torch.nn.Module):
    """Two decoder layers with the op behind each, as the engine's hooks leave them; scratch is one buffer for both."""

    def __init__(self, case: Case, rows: int) -> None:
        super().__init__()
        self.hooked = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
        scratch = torch.zeros(64)
        for module in self.hooked:
            act_TK, stat_T3 = poisoned_buffers(rows, case.features)
            for name, value in (("w", case.w_KD), ("scale", case.scale_6K), ("act", act_TK), ("stat", stat_T3)):
                module.register_buffer(name, value, persistent=False)
            module.register_buffer("scratch", scratch, persistent=False)

    def forward(self, x_TD: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
        for m in self.hooked:
            x_TD = torch.tanh(x_TD)
            torch.ops.latentwatch.score(x_TD, residual_TD, m.w, None, m.scale, m.act, m.stat, m.scratch)
        return x_TD * 2


@pytest.mark.parametrize("functionalized_v2", [False, True], ids=["as-vllm-does", "as-torch-does"])
def test_the_compiled_op_writes_the_same_buffers_whatever_the_number_of_tokens(functionalized_v2: bool) -> None:
    """vLLM compiles once with a dynamic token count and keeps the buffers as graph inputs; no buffer may be copied."""
    torch._dynamo.reset()
    case = make_case(16, 64, 8)
    layers = Layers(case, rows=16)
    addresses = [m.act.data_ptr() for m in layers.hooked]
    with (
        torch.inference_mode(),
        torch._inductor.config.patch(enable_auto_functionalized_v2=functionalized_v2, force_disable_caches=True),
    ):
        compiled = torch.compile(layers, fullgraph=True, dynamic=True)
        _, code = run_and_get_code(compiled, case.x_TD, case.residual_TD)
        calls = [line for source in code for line in source.splitlines() if "latentwatch.score.default(" in line]
        assert len(calls) == 2
        assert not [line for source in code for line in source.splitlines() if "copy_(" in line or "clone" in line]
        for T in (16, 5, 9, 2):
            for m in layers.hooked:
                m.act.fill_(math.nan)
                m.stat.fill_(math.nan)
            compiled(case.x_TD[:T], case.residual_TD[:T])
            x_TD = case.x_TD[:T]
            for m in layers.hooked:
                x_TD = torch.tanh(x_TD)
                step = Case(x_TD, case.residual_TD[:T], case.w_KD, case.scale_6K)
                assert_matches(step, m.act[:T], m.stat[:T])
                assert m.act[T:].isnan().all()
    assert [m.act.data_ptr() for m in layers.hooked] == addresses


def test_packed_rows_are_the_cards_rows() -> None:
    rows = canonical_rows(D=64, K=5)
    w_KD, w_lo_KD, scale_6K = score_op.pack(rows, "cpu", torch.bfloat16)
    assert w_lo_KD is None and w_KD.dtype == torch.float32
    assert w_KD.numpy().tobytes() == rows.w_KD.tobytes()
    assert scale_6K.numpy().tobytes() == rows.scale_6K.tobytes()


def test_rows_packed_for_a_gpu_keep_the_cards_bit_patterns() -> None:
    rows = canonical_rows(D=64, K=5)
    hi_KD, lo_KD, _ = score_op.pack(rows, "meta", torch.bfloat16)
    assert lo_KD is not None and hi_KD.dtype == lo_KD.dtype == torch.bfloat16


def test_a_model_dtype_that_the_op_cannot_read_is_refused() -> None:
    with pytest.raises(EngineRefused, match="float64"):
        score_op.pack(canonical_rows(D=64, K=5), "cpu", torch.float64)


def test_the_reference_applies_each_norm_as_its_definition_says() -> None:
    x_TD = torch.tensor([[1.0, 3.0, 5.0]], dtype=torch.float64)
    assert reference.normalised(x_TD, "none").tolist() == [[1, 3, 5]]
    assert reference.normalised(x_TD, "centre").tolist() == [[-2, 0, 2]]
    torch.testing.assert_close(
        reference.normalised(x_TD, "layer_norm"), torch.tensor([[-1.0, 0, 1]], dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert reference.normalised(x_TD, "constant_norm").norm().item() == pytest.approx(math.sqrt(3))


def test_a_batch_of_one_is_scored_as_its_rows() -> None:
    """Hugging Face's models have that dimension, also inside vLLM."""
    case = make_case(7, 64, 5, residual=True)
    expected_TK, expected_T3 = run(case)
    assert case.residual_TD is not None
    for x_TD, residual_TD in (
        (case.x_TD[None], case.residual_TD[None]),
        (case.x_TD[None], case.residual_TD),
        (case.x_TD.t().contiguous().t(), case.residual_TD),
    ):
        act_TK, stat_T3 = poisoned_buffers(7, 5)
        torch.ops.latentwatch.score(x_TD, residual_TD, case.w_KD, None, case.scale_6K, act_TK, stat_T3)
        torch.testing.assert_close(act_TK, expected_TK)
        torch.testing.assert_close(stat_T3, expected_T3)


UNREADABLE = {
    "rank 4": torch.ones(1, 1, 7, 64),
    "rank 1": torch.ones(64),
    "rank 0": torch.tensor(1.0),
    "two batches": torch.ones(2, 7, 64),
    "too wide": torch.ones(7, 65),
    "too many rows": torch.ones(10, 64),
    "float64": torch.ones(7, 64, dtype=torch.float64),
    "float8": torch.ones(7, 64).to(torch.float8_e4m3fn),
    "complex": torch.ones(7, 64, dtype=torch.complex64),
    "integers": torch.ones(7, 64, dtype=torch.int64),
    "no device": torch.ones(7, 64, device="meta"),
    "sparse": torch.ones(7, 64).to_sparse(),
    "wants a gradient": torch.ones(7, 64, requires_grad=True),
}


@pytest.mark.parametrize("as_residual", [False, True], ids=["stream", "residual"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_raises_nothing_and_leaves_the_sentinel(name: str, as_residual: bool) -> None:
    """To raise in a forward would end the server."""
    case = make_case(7, 64, 5)
    act_TK, stat_T3 = torch.zeros(9, 5), torch.full((9, 3), reference.UNWRITTEN)
    given = UNREADABLE[name]
    x_TD, residual_TD = (torch.ones(7, 64), given) if as_residual else (given, None)
    torch.ops.latentwatch.score(x_TD, residual_TD, case.w_KD, None, case.scale_6K, act_TK, stat_T3)
    assert stat_T3[0, 0] == reference.UNWRITTEN


def test_a_kernel_that_fails_raises_nothing_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_args: object) -> None:
        raise MemoryError("no room")

    case = make_case(7, 64, 5)
    monkeypatch.setattr(score_op.score_cpu, "score", failing)
    monkeypatch.setattr(score_op, "_reported", set())
    stat_T3 = torch.full((9, 3), reference.UNWRITTEN)
    for _ in range(3):
        torch.ops.latentwatch.score(case.x_TD, None, case.w_KD, None, case.scale_6K, torch.zeros(9, 5), stat_T3)
    assert stat_T3[0, 0] == reference.UNWRITTEN
    assert len(caplog.records) == 1 and "MemoryError: no room" in caplog.text


@pytest.mark.parametrize("shape", [(1, 7, 64), (2, 7, 64), (7, 65), (1, 1, 7, 64)], ids=str)
def test_a_compiled_graph_holds_the_op_whatever_the_stream_is(shape: tuple[int, ...]) -> None:
    """Nothing of ours may fail while a model is traced either."""
    case = make_case(7, 64, 5)
    act_TK, stat_T3 = torch.zeros(9, 5), torch.full((9, 3), reference.UNWRITTEN)

    @torch.compile(fullgraph=True, dynamic=True)
    def model(x: torch.Tensor) -> torch.Tensor:
        torch.ops.latentwatch.score(x * 2, None, case.w_KD, None, case.scale_6K, act_TK, stat_T3)
        return x + 1

    torch.testing.assert_close(model(torch.ones(shape)), torch.full(shape, 2.0))
    assert (stat_T3[0, 0] != reference.UNWRITTEN) == (shape == (1, 7, 64))


def test_on_a_gpu_too_a_batch_of_one_is_rows_and_a_launch_that_fails_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the function that stands behind the op there; Triton's launch is stood in for."""
    case = make_case(7, 64, 5, residual=True)
    act_TK, stat_T3 = poisoned_buffers(7, 5)
    launched: list[tuple[int, ...]] = []

    def score(x_TD: torch.Tensor, residual_TD: torch.Tensor, *_rest: object) -> None:
        launched.append((*x_TD.shape, *residual_TD.shape))
        raise RuntimeError("Triton Error [CUDA]: out of resources")

    monkeypatch.setitem(sys.modules, "latentwatch.kernels.score_triton", SimpleNamespace(score=score))
    monkeypatch.setattr(kernels, "score_triton", SimpleNamespace(score=score), raising=False)
    monkeypatch.setattr(score_op, "_reported", set())
    assert case.residual_TD is not None
    halves = case.x_TD[None], case.residual_TD[None]
    score_op._score_cuda(*halves, case.w_KD, None, case.scale_6K, act_TK, stat_T3)
    score_op._score_cuda(case.x_TD[None, None], None, case.w_KD, None, case.scale_6K, act_TK, stat_T3)
    assert launched == [(7, 64, 7, 64)]
    assert "out of resources" in caplog.text and "cannot be read" in caplog.text
