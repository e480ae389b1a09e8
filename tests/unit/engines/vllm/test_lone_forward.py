"""The forward of one rank alone: no other rank is waited for, nothing is compiled, new memory is no noise."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentwatch.engines.vllm import lone_forward
from latentwatch.errors import EngineRefused


class Group:
    """As vLLM's GroupCoordinator, on a rank whose others make no forward."""

    world_size, rank_in_group = 2, 1

    def _never(self, *_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("waits for another rank for ever")

    all_reduce = all_gather = reduce_scatter = broadcast = _never


class Model(torch.nn.Module):
    """A model that vLLM would compile, and that asks its group."""

    do_not_compile = False
    requires_raw_input_tokens = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}
        self.extra: Any = None

    def forward(self, **given: Any) -> Any:
        assert self.do_not_compile, "compiled"
        self.seen = given
        if self.extra is not None:
            return self.extra()
        x_TD = torch.ones(len(given["positions"]), 4)
        group = Group()
        assert group.all_gather(group.all_reduce(x_TD)).shape == (len(x_TD), 8)
        assert group.reduce_scatter(x_TD, dim=0).shape == (len(x_TD) // 2, 4)
        return torch.empty(64, 64)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(
        sys.modules,
        "vllm.forward_context",
        SimpleNamespace(set_forward_context=lambda *_, **__: contextlib.nullcontext()),
    )
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", SimpleNamespace(GroupCoordinator=Group))
    model = Model()
    return SimpleNamespace(
        device=torch.device("cpu"),
        vllm_config=None,
        parallel_config=SimpleNamespace(world_size=2, data_parallel_size=1),
        model_config=SimpleNamespace(dtype=torch.float32, get_inputs_embeds_size=lambda: 16),
        model_runner=SimpleNamespace(get_model=lambda: model),
        model=model,
    )


def test_no_other_rank_is_asked_nothing_is_compiled_and_everything_is_as_before(worker: Any) -> None:
    before = {name: getattr(Group, name) for name in ("all_reduce", "all_gather", "broadcast")}
    collective = torch.distributed.all_reduce
    for _ in range(3):
        made = lone_forward.run(worker, 4)
        assert isinstance(made, torch.Tensor) and not made.any()
    assert {name: getattr(Group, name) for name in before} == before
    assert torch.distributed.all_reduce is collective
    assert worker.model.do_not_compile is False
    assert torch.empty(1).is_inference() is False


def test_a_model_that_calls_torch_distributed_itself_fails_at_once_and_everything_is_as_before(worker: Any) -> None:
    worker.model.extra = lambda: torch.distributed.all_reduce(torch.ones(1))
    collective = torch.distributed.all_reduce
    with pytest.raises(RuntimeError, match="no other rank makes this forward"):
        lone_forward.run(worker, 4)
    assert torch.distributed.all_reduce is collective
    assert worker.model.do_not_compile is False


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"data_parallel_size": 2, "is_moe_model": True}, "experts are spread over data-parallel engines"),
        ({"data_parallel_size": 2, "enable_expert_parallel": True}, "experts are spread over data-parallel engines"),
    ],
)
def test_experts_of_several_engines_are_refused_and_not_waited_for(worker: Any, changed: Any, found: str) -> None:
    vars(worker.parallel_config).update(changed)
    with pytest.raises(EngineRefused, match=found) as caught:
        lone_forward.run(worker, 4)
    assert caught.value.reason == "stream_unproven"
    assert not worker.model.seen


def test_a_module_whose_kernel_waits_for_other_ranks_is_refused_by_name(worker: Any) -> None:
    worker.model.norm = type("MiniMaxText01RMSNormTP", (torch.nn.Module,), {})()
    with pytest.raises(EngineRefused, match="MiniMaxText01RMSNormTP exchanges tensors by itself"):
        lone_forward.run(worker, 4)
    assert not worker.model.seen


def test_a_model_of_tokens_is_given_tokens_and_one_of_pictures_embeddings(worker: Any) -> None:
    lone_forward.run(worker, 4)
    assert worker.model.seen["input_ids"].tolist() == [1] * 4 and worker.model.seen["inputs_embeds"] is None
    worker.model_runner.supports_mm_inputs = True
    lone_forward.run(worker, 4)
    assert worker.model.seen["input_ids"] is None and worker.model.seen["inputs_embeds"].shape == (4, 16)


@pytest.mark.parametrize("positions", [{"uses_mrope": True}, {"uses_mrope": False, "uses_xdrope_dim": 4}], ids=str)
def test_positions_have_the_parts_that_the_model_wants(worker: Any, positions: dict[str, Any]) -> None:
    vars(worker.model_config).update(positions)
    worker.model.extra = lambda: torch.empty(3)
    lone_forward.run(worker, 4)
    parts = 3 if positions["uses_mrope"] else 4
    assert worker.model.seen["positions"].shape == (parts, 4)
