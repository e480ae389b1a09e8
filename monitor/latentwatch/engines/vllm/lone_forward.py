"""One eager forward of the loaded model, by this rank alone and without a KV cache, for engines/vllm/proof.py.

It is what vLLM's own profiling run does, for a few rows: attention has nothing to attend to. All rows have the same
token at the same position, so they are alike. Collectives are answered from this rank's own part, for the other ranks
make no such forward; sums are then partial, but which tensor goes where is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentwatch.engines.vllm.interfaces import Group, ModelRunner, Worker
from latentwatch.errors import EngineRefused, RefusalReason

_UNFILLED: Final = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def run(worker: Worker, rows: int) -> object:
    """Returns what the model returns: hidden states of `rows` rows.

    Raises: EngineRefused: ranks would have to take part. Whatever the model raises is passed on.
    """
    from vllm.forward_context import set_forward_context

    parallel, runner = worker.parallel_config, worker.model_runner
    if getattr(parallel, "enable_expert_parallel", False) and getattr(parallel, "data_parallel_size", 1) > 1:
        raise EngineRefused(
            "residual stream of experts that are spread over engines",
            found="one rank cannot make a forward alone there, so where the stream is cannot be proven",
            instead="Serve without --enable-expert-parallel, or without latentwatch.",
            reason=RefusalReason.STREAM_UNPROVEN,
        )
    across = torch.full((getattr(parallel, "data_parallel_size", 1),), rows, dtype=torch.int32)
    with ExitStack() as during:
        during.enter_context(torch.inference_mode())
        during.enter_context(torch.compiler.set_stance("force_eager"))
        if across.numel() > 1 or int(parallel.world_size) > 1:
            during.enter_context(_alone())
        during.enter_context(_without_adapters(runner, rows))
        during.enter_context(_uncompiled(runner.get_model()))
        during.enter_context(
            set_forward_context(None, worker.vllm_config, num_tokens=rows, num_tokens_across_dp=across)
        )
        # torch leaves its modes without types.
        during.enter_context(_Filled())  # type: ignore[no-untyped-call]
        return runner.get_model()(
            input_ids=torch.ones(rows, dtype=torch.int32, device=worker.device),
            positions=_positions(worker, rows),
            intermediate_tensors=None,
            inputs_embeds=None,
        )


def _positions(worker: Worker, rows: int) -> torch.Tensor:
    config = worker.model_config
    parts = 3 if getattr(config, "uses_mrope", False) else int(getattr(config, "uses_xdrope_dim", 0) or 0)
    return torch.zeros((parts, rows) if parts else (rows,), dtype=torch.int64, device=worker.device)


@contextmanager
def _uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """vLLM compiles a module in its first call, unless this attribute of it says otherwise."""
    compiled = [module for module in model.modules() if getattr(module, "do_not_compile", None) is False]
    try:
        for module in compiled:
            module.do_not_compile = True  # type: ignore[assignment]  # torch wants tensors; vLLM has a bool there
        yield
    finally:
        for module in compiled:
            module.do_not_compile = False  # type: ignore[assignment]  # as above


@contextmanager
def _without_adapters(runner: ModelRunner, rows: int) -> Iterator[None]:
    """LoRA layers want to be told whose row is whose, here that no row has an adapter."""
    lora = getattr(runner, "lora_config", None)
    if lora is None:
        yield
        return
    one = np.array([rows], dtype=np.int32)
    with runner.maybe_dummy_run_with_lora(lora, one, np.ones(1, dtype=np.int32), num_active_loras=0):
        yield


# torch leaves its modes without types.
class _Filled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """New memory holds zeros: attention without a cache leaves its output as it was, which may be anything."""

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and func._schema.name.removeprefix("aten::") in _UNFILLED:
            made.zero_()
        return made


@contextmanager
def _alone() -> Iterator[None]:
    """Collectives of this process answer at once, for as long as this lasts."""
    from vllm.distributed.parallel_state import GroupCoordinator

    answers: dict[str, Callable[..., object]] = {
        "all_reduce": lambda _group, x, *_a, **_k: x.clone(),
        "_all_reduce_out_place": lambda _group, x, *_a, **_k: x.clone(),
        "all_gather": _gathered,
        "_all_gather_out_place": _gathered,
        "all_gatherv": lambda group, x, dim=0, **_k: _gathered(group, x, dim),
        "reduce_scatter": _scattered,
        "_reduce_scatter_out_place": _scattered,
        "reduce_scatterv": lambda group, x, dim=-1, **_k: _scattered(group, x, dim),
        "gather": lambda group, x, _dst=0, dim=-1: _gathered(group, x, dim),
        "broadcast": lambda _group, x, *_a, **_k: x,
        "barrier": lambda _group: None,
    }
    kept = {name: GroupCoordinator.__dict__[name] for name in answers if name in GroupCoordinator.__dict__}
    try:
        for name in kept:
            setattr(GroupCoordinator, name, answers[name])
        yield
    finally:
        for name, original in kept.items():
            setattr(GroupCoordinator, name, original)


def _gathered(group: Group, x: Tensor | list[Tensor], dim: int = -1) -> Tensor | list[Tensor]:
    if isinstance(x, list):
        return [torch.cat([one] * group.world_size, dim=dim) for one in x]
    return torch.cat([x] * group.world_size, dim=dim)


def _scattered(group: Group, x: Tensor, dim: int = -1) -> Tensor:
    return x.chunk(group.world_size, dim=dim)[group.rank_in_group].contiguous()
