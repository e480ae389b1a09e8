"""What is read of vLLM's own objects, about which it promises nothing: a new version may change any of it.

What stands here is there in every version that is supported; what may be missing is read with getattr and a default,
where it is needed. Verified against vLLM 0.26, 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from latentwatch.arrays import Array


class NewRequest(Protocol):
    """NewRequestData: a request that is scheduled for the first time, or again on the runner that re-adds it."""

    req_id: str
    prompt_token_ids: Sequence[int] | None
    """None where the prompt is given as embeddings; see step_tap.prompt_tokens_of."""
    num_computed_tokens: int
    block_ids: Sequence[Sequence[int]]
    """Per KV cache group."""
    sampling_params: object
    lora_request: object


class CachedRequests(Protocol):
    """CachedRequestData: requests that go on, as parallel lists."""

    req_ids: Sequence[str]
    resumed_req_ids: Collection[str]
    """Preempted before; their blocks are given anew."""
    num_computed_tokens: Sequence[int]
    new_block_ids: Sequence[Sequence[Sequence[int]] | None]
    """Per request and KV cache group."""


class SchedulerOutput(Protocol):
    """One step, as the scheduler wants it."""

    scheduled_new_reqs: Sequence[NewRequest]
    scheduled_cached_reqs: CachedRequests
    num_scheduled_tokens: Mapping[str, int]
    total_num_scheduled_tokens: int
    finished_req_ids: Collection[str]


class Batch(Protocol):
    """The runner's batch in the order of its rows."""

    req_ids: Sequence[str]
    num_reqs: int


class BatchV1(Batch, Protocol):
    num_computed_tokens_cpu: Array


class BatchV2(Batch, Protocol):
    num_computed_tokens_np: Array
    query_start_loc_np: Array


class KvCacheSpec(Protocol):
    block_size: int


class KvCacheGroup(Protocol):
    kv_cache_spec: KvCacheSpec


class KvCacheConfig(Protocol):
    num_blocks: int
    kv_cache_groups: Sequence[KvCacheGroup]


class ModelRunner(Protocol):
    """GPUModelRunner or CPUModelRunner; `input_batch` is that of the first generation of runners only."""

    input_batch: BatchV1
    kv_cache_config: KvCacheConfig

    def get_model(self) -> torch.nn.Module: ...

    def maybe_dummy_run_with_lora(
        self,
        lora_config: object,
        num_scheduled_tokens: Array,
        num_sampled_tokens: Array,
    ) -> AbstractContextManager[None]: ...

    def _dummy_run(self, num_tokens: int) -> object: ...


class TextConfig(Protocol):
    """Of transformers, for the language model in it."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int


class LoadConfig(Protocol):
    load_format: str
    download_dir: str | None


class ModelConfig(Protocol):
    model: str
    """A folder, or a name on the hub."""
    revision: str | None
    hf_overrides: object
    """A mapping, or a function."""
    hf_config: Any
    """PretrainedConfig of transformers; see TextConfig."""
    dtype: torch.dtype
    runner_type: str
    served_model_name: str | list[str]
    enforce_eager: bool

    def get_inputs_embeds_size(self) -> int: ...


class ParallelConfig(Protocol):
    world_size: int
    pipeline_parallel_size: int
    data_parallel_rank: int


class Group(Protocol):
    """GroupCoordinator: ranks that exchange tensors."""

    world_size: int
    rank_in_group: int


class SchedulerConfig(Protocol):
    max_num_batched_tokens: int
    max_num_seqs: int
    async_scheduling: bool


class CompilationConfig(Protocol):
    pass_config: object


class SpeculativeConfig(Protocol):
    method: str


class VllmConfig(Protocol):
    model_config: ModelConfig
    load_config: LoadConfig
    parallel_config: ParallelConfig
    scheduler_config: SchedulerConfig
    cache_config: object
    compilation_config: CompilationConfig
    speculative_config: SpeculativeConfig | None


class Worker(Protocol):
    """WorkerBase: one process of the engine, with one device."""

    rank: int
    device: torch.device
    vllm_config: VllmConfig
    model_config: ModelConfig
    parallel_config: ParallelConfig
    model_runner: ModelRunner


class Request(Protocol):
    """In the scheduler's process."""

    request_id: str
    status: object
    num_output_tokens: int
    num_prompt_tokens: int
    num_computed_tokens: int
