"""The engine's KV cache as far as the exporter must follow it: which block a token lies in."""

from __future__ import annotations

from typing import NamedTuple

from latentwatch.engines.vllm.interfaces import VllmConfig, Worker


class KvCache(NamedTuple):
    """The blocks of the KV cache group that holds every token of a request."""

    group: int
    """Its place in the engine's groups, and in `block_ids`."""
    blocks: int
    block_size: int
    """Tokens."""


def followed(worker: Worker) -> KvCache | None:
    """The cache whose blocks say what a prefix-cache hit contains, None where that cannot be told.

    Only full attention keeps all tokens (a sliding window gives its blocks back). An engine with a KV connector gets
    blocks filled from elsewhere, and decode context parallelism spreads a block over ranks.
    """
    config = worker.vllm_config
    if not getattr(config.cache_config, "enable_prefix_caching", False) or has_kv_connector(config):
        return None
    if getattr(worker.parallel_config, "decode_context_parallel_size", 1) > 1:
        return None
    from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

    kv_cache = worker.model_runner.kv_cache_config
    for place, group in enumerate(kv_cache.kv_cache_groups):
        spec = group.kv_cache_spec
        specs = list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
        if all(isinstance(each, FullAttentionSpec) for each in specs):
            return KvCache(place, int(kv_cache.num_blocks), int(spec.block_size))
    return None


def has_kv_connector(config: VllmConfig) -> bool:
    """Whether a KV connector may fill blocks that this engine never computed."""
    return getattr(config, "kv_transfer_config", None) is not None
