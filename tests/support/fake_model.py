"""Models shaped like vLLM's, and a worker around one: the attachment's other side without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from latentwatch.engines.vllm import request_ends

from tests.support import tiny


class FusedNorm(torch.nn.Module):
    """As vLLM's RMSNorm: with a residual it returns (normed, sum)."""

    def forward_native(self, x: Any, residual: Any = None) -> Any:
        return x if residual is None else (x * 0.5, x + residual)

    def forward(self, *args: Any) -> Any:
        return self.forward_native(*args)


class FusedLayer(torch.nn.Module):
    """As vLLM's Llama layer: the sum of what it returns is resid_post."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = FusedNorm()

    def forward(self, hidden: Any, residual: Any) -> Any:
        if residual is None:
            hidden, residual = self.input_layernorm(hidden), hidden
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        return hidden * 0.1, residual


class OtherNorm(FusedLayer):
    """A fused layer whose norm goes by another name: the stream can only be read at its output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = self.input_layernorm
        del self.input_layernorm

    def forward(self, hidden: Any, residual: Any) -> Any:
        hidden, residual = (self.norm_1(hidden), hidden) if residual is None else self.norm_1(hidden, residual)
        return hidden * 0.1, residual


class PlainLayer(torch.nn.Module):
    """As vLLM's GPT-2 block: it returns resid_post itself."""

    def forward(self, hidden: Any) -> Any:
        return hidden * 1.1


class PairLayer(torch.nn.Module):
    """It takes one tensor and returns two: the stream, and something else of its shape."""

    def forward(self, hidden: Any) -> Any:
        return hidden * 1.1, hidden


class Model(torch.nn.Module):
    def __init__(self, layer: type[torch.nn.Module], layers: int = tiny.LAYERS) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layer() for _ in range(layers))
        self.norm = FusedNorm()
        self.streams: list[Any] = []

    def forward(self, hidden: Any) -> Any:
        residual = None
        self.streams = []
        for layer in self.layers:
            if isinstance(layer, PlainLayer | PairLayer):
                returned = layer(hidden)
                hidden = returned[0] if isinstance(returned, tuple) else returned
                self.streams.append(hidden)
            else:
                hidden, residual = layer(hidden, residual)
                self.streams.append(hidden + residual)
        return hidden if residual is None else self.norm(hidden, residual)[0]


class Worker:
    """What the attachment touches of a vLLM worker: four methods, a runner in V1's shape, a configuration."""

    rank = 0
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.parallel_config = SimpleNamespace(world_size=1, pipeline_parallel_size=1, data_parallel_rank=0)
        self.vllm_config: Any = SimpleNamespace(
            parallel_config=self.parallel_config,
            model_config=SimpleNamespace(
                hf_config=SimpleNamespace(
                    architectures=["LlamaForCausalLM"],
                    hidden_size=tiny.D_MODEL,
                    num_hidden_layers=tiny.LAYERS,
                    vocab_size=tiny.VOCABULARY,
                ),
                dtype=torch.float32,
                runner_type="generate",
                enforce_eager=True,
                served_model_name="fake",
            ),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=8, async_scheduling=False),
            compilation_config=SimpleNamespace(pass_config=SimpleNamespace()),
            cache_config=SimpleNamespace(),
            speculative_config=None,
        )
        self.model_config = self.vllm_config.model_config
        self.model = Model(FusedLayer)
        batch = SimpleNamespace(req_ids=[], num_reqs=0, num_computed_tokens_cpu=np.zeros(8, np.int32))
        self.model_runner = SimpleNamespace(
            input_batch=batch, execute_model_state=None, get_model=lambda: self.model, _dummy_run=self._forward
        )

    def load_model(self) -> None: ...

    def compile_or_warm_up_model(self) -> None: ...

    def shutdown(self) -> None: ...

    def execute_model(self, output: Any) -> str:
        """One step, with the batch in the order of `num_scheduled_tokens` and its starts in `starts`."""
        batch = self.model_runner.input_batch
        batch.req_ids = list(output.num_scheduled_tokens)
        batch.num_reqs = len(batch.req_ids)
        batch.num_computed_tokens_cpu[: batch.num_reqs] = [output.starts[name] for name in batch.req_ids]
        if output.total_num_scheduled_tokens:
            self._forward(output.total_num_scheduled_tokens)
        return "the engine's own result"

    def _forward(self, rows: int) -> None:
        self.model(torch.randn(rows, tiny.D_MODEL))


def lone_forward(worker: Any, rows: int) -> Any:
    """What the attachment proves the stream's place with: rows that are alike."""
    with torch.inference_mode():
        return worker.model(torch.ones(rows, tiny.D_MODEL))


def scheduled(
    counts: dict[str, int],
    *,
    starts: dict[str, int] | None = None,
    new: list[tuple[str, int]] | None = None,
    blocks: dict[str, list[int]] | None = None,
    hits: dict[str, int] | None = None,
    resumed: set[str] | None = None,
    finished: dict[str, tuple[int, bool]] | None = None,
) -> Any:
    """A SchedulerOutput with the fields that the tap reads.

    Tokens per request; (id, prompt tokens) of new ones; KV blocks given, of one cache group; tokens that new and
    resumed requests found in the prefix cache.
    """
    blocks, hits, running = blocks or {}, hits or {}, [name for name in counts if name not in dict(new or [])]
    output = SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=[0] * prompt,
                num_computed_tokens=hits.get(name, 0),
                block_ids=(blocks.get(name, []),),
                lora_request=None,
                sampling_params=None,
            )
            for name, prompt in new or []
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=running,
            resumed_req_ids=resumed or set(),
            new_block_ids=[(blocks[name],) if name in blocks else None for name in running],
            num_computed_tokens=[hits.get(name, 0) for name in running],
        ),
        finished_req_ids=set(finished or {}),
        total_num_scheduled_tokens=sum(counts.values()),
        num_scheduled_tokens=counts,
        starts=starts or {},
    )
    setattr(output, request_ends.ATTRIBUTE, finished or {})
    return output
