"""Models shaped like vLLM's, and a worker around one: the attachment's other side without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from latentwatch.engines.vllm import request_ends

from tests.support import tiny


def normed(x: Any) -> Any:
    return x / x.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6)


class FusedNorm(torch.nn.Module):
    """As vLLM's RMSNorm: with a residual it returns (normed, sum)."""

    def forward(self, x: Any, residual: Any = None) -> Any:
        return normed(x) if residual is None else (normed(x + residual), x + residual)


class FusedLayer(torch.nn.Module):
    """As vLLM's Llama layer: the sum of what it returns is resid_post."""

    scored = True

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = FusedNorm()
        self.weight_DD = torch.nn.Parameter(torch.randn(tiny.D_MODEL, tiny.D_MODEL) / 8, requires_grad=False)

    def forward(self, hidden: Any, residual: Any) -> Any:
        normed_TD, residual = self.add(hidden, residual)
        return self.result(normed_TD @ self.weight_DD, residual)

    def add(self, hidden: Any, residual: Any) -> Any:
        """(the normed stream, the stream) of what the layer before returned."""
        if residual is None:
            return self.input_layernorm(hidden), hidden
        return self.input_layernorm(hidden, residual)

    def result(self, change: Any, stream: Any) -> Any:
        return change, stream

    def carried(self, output: Any) -> Any:
        """What the model gives the next layer of what this one returned."""
        return output

    def stream(self, output: Any) -> Any:
        """resid_post, from what the layer returned."""
        return output[0] + output[1]

    def end(self, norm: Any, hidden: Any, residual: Any) -> Any:
        """What the model returns, from what the last layer returned."""
        return norm(hidden, residual)[0]


class OtherNorm(FusedLayer):
    """Its norm goes by another name and is called with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = self.input_layernorm
        del self.input_layernorm

    def add(self, hidden: Any, residual: Any) -> Any:
        return (self.norm_1(hidden), hidden) if residual is None else self.norm_1(x=hidden, residual=residual)


class AddsItself(FusedLayer):
    """No norm gives the sum: the stream can only be read at the layer's output."""

    def add(self, hidden: Any, residual: Any) -> Any:
        stream = hidden if residual is None else hidden + residual
        return self.input_layernorm(stream), stream


class SwappedHalves(FusedLayer):
    """It returns the stream before its change first."""

    def result(self, change: Any, stream: Any) -> Any:
        return stream, change


class PlainLayer(FusedLayer):
    """As vLLM's GPT-2 block: it returns resid_post itself."""

    def result(self, change: Any, stream: Any) -> Any:
        return change + stream

    def carried(self, output: Any) -> Any:
        return output, None

    def stream(self, output: Any) -> Any:
        return output

    def end(self, norm: Any, hidden: Any, residual: Any) -> Any:
        return norm(hidden)


class StaleLayer(PlainLayer):
    """As vLLM's Exaone4 and Cohere: the stream and what it was before, which the next layer takes and ignores."""

    def add(self, hidden: Any, residual: Any) -> Any:
        return self.input_layernorm(hidden), hidden

    def result(self, change: Any, stream: Any) -> Any:
        return change + stream, stream

    def carried(self, output: Any) -> Any:
        return output

    def stream(self, output: Any) -> Any:
        return output[0]


class StaleFirst(StaleLayer):
    """The same, the other way round."""

    def result(self, change: Any, stream: Any) -> Any:
        return stream, change + stream

    def carried(self, output: Any) -> Any:
        return output[1], output[0]

    def stream(self, output: Any) -> Any:
        return output[1]


class NoResidual(StaleLayer):
    """As vLLM's MiniCPM and Gemma4: (the stream, None)."""

    def result(self, change: Any, stream: Any) -> Any:
        return change + stream, None


class BatchOfOne(PlainLayer):
    """As a layer of Hugging Face's: [1, T, D]."""

    def forward(self, hidden: Any, residual: Any) -> Any:
        return super().forward(hidden if hidden.dim() == 3 else hidden[None], residual)

    def stream(self, output: Any) -> Any:
        return output[0]


class Refused(FusedLayer):
    """Layers whose stream is not in one tensor nor in the sum of two."""

    scored = False

    def stream(self, output: Any) -> Any:
        return None


class ScaledHalf(Refused):
    """The next layer adds a half of one half."""

    def add(self, hidden: Any, residual: Any) -> Any:
        return super().add(hidden if residual is None else hidden * 0.5, residual)

    def end(self, norm: Any, hidden: Any, residual: Any) -> Any:
        return norm(hidden * 0.5, residual)[0]


class NormedBeside(Refused):
    """It returns (the next layer's normed input, the stream), and the next layer takes both as they are."""

    def add(self, hidden: Any, residual: Any) -> Any:
        return (normed(hidden), hidden) if residual is None else (hidden, residual)

    def result(self, change: Any, stream: Any) -> Any:
        return normed(change + stream), change + stream

    def end(self, norm: Any, hidden: Any, residual: Any) -> Any:
        return hidden


class ThreeParts(Refused):
    """The stream is a sum of three."""

    def result(self, change: Any, stream: Any) -> Any:
        return change * 0.5, stream, change * 0.5

    def carried(self, output: Any) -> Any:
        return output[0] + output[2], output[1]


class InADictionary(Refused):
    def result(self, change: Any, stream: Any) -> Any:
        return {"hidden": change, "residual": stream}

    def carried(self, output: Any) -> Any:
        return output["hidden"], output["residual"]


class SeveralStreams(Refused):
    """As vLLM's Gemma3n: four streams beside each other."""

    def add(self, hidden: Any, residual: Any) -> Any:
        return self.input_layernorm(hidden if hidden.dim() == 2 else hidden.mean(dim=0)), hidden

    def result(self, change: Any, stream: Any) -> Any:
        return stream + torch.stack([change * i for i in range(4)])

    def carried(self, output: Any) -> Any:
        return output, None

    def end(self, norm: Any, hidden: Any, residual: Any) -> Any:
        return norm(hidden.mean(dim=0))


class UnreadResult(Refused):
    """Nothing follows from what it returns."""

    def carried(self, output: Any) -> Any:
        return torch.ones_like(output[0]), None

    def end(self, norm: Any, hidden: Any, residual: Any) -> Any:
        return norm(hidden)


class Model(torch.nn.Module):
    """Layers of one kind, run `passes` times, and a final norm; `skips`: to whose result the first half is added."""

    def __init__(
        self, layer: type[FusedLayer], layers: int = tiny.LAYERS, *, passes: int = 1, skips: bool = False
    ) -> None:
        super().__init__()
        self.layers: Any = torch.nn.ModuleList(layer() for _ in range(layers))
        self.norm = FusedNorm()
        self.passes, self.skips = passes, skips
        self.streams: list[Any] = []

    def forward(self, hidden: Any) -> Any:
        residual, skipped = None, 0.0
        self.streams = []
        for layer in [*self.layers] * self.passes:
            output = layer(hidden, residual)
            hidden, residual = layer.carried(output)
            self.streams.append(layer.stream(output))
            skipped = skipped + hidden
        result = self.layers[-1].end(self.norm, hidden, residual)
        return result + skipped if self.skips else result


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
