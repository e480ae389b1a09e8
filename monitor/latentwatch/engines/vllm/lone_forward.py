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

_TALKS_BY_ITSELF: Final = ("MiniMaxText01RMSNormTP",)
"""Modules of vLLM's whose kernels wait for those of other ranks."""
_COLLECTIVES: Final = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all", "all_to_all_single"),
    *("reduce_scatter", "reduce_scatter_tensor", "broadcast", "barrier"),
)
"""Of torch.distributed: what calls them past vLLM's groups is not answered."""
_UNFILLED: Final = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def run(worker: Worker, rows: int) -> object:
    """Returns what the model returns: hidden states of `rows` rows.

    Raises: EngineRefused: ranks would have to take part. Whatever the model raises is passed on.
    """
    from vllm.forward_context import set_forward_context

    parallel, runner = worker.parallel_config, worker.model_runner
    _check_alone(worker)
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
        return runner.get_model()(**_arguments(worker, rows))


def _check_alone(worker: Worker) -> None:
    """Raises: EngineRefused: a part of the model exchanges tensors past what `_alone` answers, and would never end."""
    parallel, config = worker.parallel_config, worker.model_config
    found = ""
    if getattr(parallel, "data_parallel_size", 1) > 1 and (
        getattr(parallel, "enable_expert_parallel", False)
        or getattr(parallel, "is_moe_model", False)
        or getattr(config, "is_moe", False)
    ):
        found = "its experts are spread over data-parallel engines"
    elif int(parallel.world_size) > 1:
        found = ", ".join(
            f"{type(module).__name__} exchanges tensors by itself"
            for module in worker.model_runner.get_model().modules()
            if type(module).__name__ in _TALKS_BY_ITSELF
        )[:200]
    if found:
        raise EngineRefused(
            f"residual stream of {type(worker.model_runner.get_model()).__name__}",
            found=f"{found}, so one rank cannot make a forward alone, and where the stream is cannot be proven",
            instead="Serve it on one rank, or without latentwatch.",
            reason=RefusalReason.STREAM_UNPROVEN,
        )


def needs_embeddings(worker: Worker) -> bool:
    """Whether the model is given embeddings, since pictures or sounds may stand between its tokens. Such a model may
    also add something to the stream between two layers, where a prompt has them.
    """
    return bool(getattr(worker.model_runner, "supports_mm_inputs", False))


def _arguments(worker: Worker, rows: int) -> dict[str, Tensor | None]:
    """As vLLM's own profiling run has them."""
    config, model = worker.model_config, worker.model_runner.get_model()
    embeddings = None
    if needs_embeddings(worker):
        size = config.get_inputs_embeds_size()
        embeddings = torch.ones(rows, size, dtype=config.dtype, device=worker.device)
    raw = embeddings is None or getattr(model, "requires_raw_input_tokens", False)
    return {
        "input_ids": torch.ones(rows, dtype=torch.int32, device=worker.device) if raw else None,
        "positions": _positions(worker, rows),
        "intermediate_tensors": None,
        "inputs_embeds": embeddings,
    }


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
    with runner.maybe_dummy_run_with_lora(lora, one, np.ones(1, dtype=np.int32)):
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
    with ExitStack() as patched:
        for name, answer in answers.items():
            if name in GroupCoordinator.__dict__:
                patched.enter_context(_replaced(GroupCoordinator, name, answer))
        for name in _COLLECTIVES:
            patched.enter_context(_replaced(torch.distributed, name, _unanswered))
        yield


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _unanswered(*_args: object, **_kwargs: object) -> None:
    raise RuntimeError("the model calls torch.distributed itself, and no other rank makes this forward")


def _gathered(group: Group, x: Tensor | list[Tensor], dim: int = -1) -> Tensor | list[Tensor]:
    if isinstance(x, list):
        return [torch.cat([one] * group.world_size, dim=dim) for one in x]
    return torch.cat([x] * group.world_size, dim=dim)


def _scattered(group: Group, x: Tensor, dim: int = -1) -> Tensor:
    return x.chunk(group.world_size, dim=dim)[group.rank_in_group].contiguous()
