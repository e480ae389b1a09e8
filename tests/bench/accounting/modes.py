"""The table of modes: for each engine its arguments, its workload, and what must be seen, so that the mode did occur.

A mode is a row of the result. One engine can serve several modes, told apart by the label of their requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.bench.accounting.models import LOOPING, prompt_of_repeats
from tests.bench.accounting.workload import Workload
from tests.support.engines import ROOT

V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": str(ROOT / "tests/support/triton_on_cpu")}
PIECEWISE = {"PYTHONPATH": str(ROOT / "tests/support/vllm_compile_on_cpu")}
EAGER = {"enforce_eager": True}
SMALL = {"max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 8, "block_size": 32, "dtype": "float32"}
"""float32, so that what is left of an error is a wrong row and not rounding."""


LOADED = "Directly load AOT compilation"
"""What vLLM logs where it starts from its compile cache."""


@dataclass(frozen=True)
class Engine:
    """One engine, started twice: without the monitor and with it."""

    name: str
    workload: Callable[[], Workload]
    arguments: dict[str, Any] = field(default_factory=dict)
    architecture: str = "Llama"
    env: dict[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    served: bool = False
    """A server process, asked over HTTP."""
    engines: int = 1
    """Data-parallel engines, each of which must serve some of the requests."""
    keep_async: bool = False
    """Asynchronous scheduling, which the CPU platform would turn off."""
    cache: str = ""
    """Name of a compile cache of the run's own, shared by the engines that name it; they run in their order."""
    says: str = ""
    """What the engine's log must hold when the monitor is on."""
    refused: str = ""
    """Words that the refusal must hold, where the engine must not be armed."""
    preempts: bool = False
    """Preemptions must have occurred."""
    drafts: bool = False
    """Many drafts must have been accepted and many rejected."""
    plain_fault: str = ""
    """vLLM's own fault, without the monitor, that keeps scores from being compared: the same requests, asked alone, are
    answered otherwise. It must show, else the mode can be compared after all."""
    note: str = ""
    """What a reader of the row should know."""


def plain(requests: int) -> Callable[[], Workload]:
    """Random prompts, up to 8 at a time."""
    return lambda: Workload(1).wave("", requests, per_step=0.4)


def pressed(requests: int) -> Callable[[], Workload]:
    """Long answers, eight at a time, in a KV cache that cannot hold them."""
    return lambda: Workload(7).wave("", requests, longest=40, shortest=20, max_tokens=60, per_step=0.8).vary(stop=[[]])


def prefixes(requests: int) -> Workload:
    """A system prompt of three blocks: met first, found whole, found in part."""
    made = Workload(2)
    system = made.tokens(100)
    made.wave("prefix cache, cold", 1, prefix=system, longest=30)
    made.wave("prefix cache, hit", requests, prefix=system, longest=40, per_step=0.4)
    made.wave("prefix cache, partial hit", requests, prefix=system[:70], longest=60, per_step=0.4)
    return made


def default(requests: int) -> Callable[[], Workload]:
    def make() -> Workload:
        made = prefixes(requests // 2)
        made.wave("default", requests, per_step=0.4)
        made.wave("abort in prefill", requests // 2, shortest=130, longest=200, per_step=0.2).vary(
            abort_after_steps=[1, 2, None]
        )
        return made.wave("abort in decode", requests // 2, shortest=3, per_step=0.4).vary(
            abort_after_outputs=[1, 2, 5, None]
        )

    return make


def v2(requests: int) -> Callable[[], Workload]:
    """Fewer requests: a step through Triton's interpreter takes 50 ms and more."""

    def make() -> Workload:
        made = Workload(6)
        system = made.tokens(100)
        made.wave("V2 runner, prefix cache", 1, prefix=system, longest=30)
        made.wave("V2 runner, prefix cache", requests // 2, prefix=system, longest=40, per_step=0.4)
        made.wave("V2 runner", requests, per_step=0.4)
        return made.vary(abort_after_outputs=[1, 3, None, None])

    return make


def evicted(requests: int) -> Callable[[], Workload]:
    """Shared prefixes in a cache too small for them: found, evicted, computed again, found again."""

    def make() -> Workload:
        made = Workload(3)
        systems = [made.tokens(96) for _ in range(3)]
        for round_number in range(max(1, requests // 12)):
            made.wave("prefix cache, evicted and refilled", 12, longest=60, prefix=systems[round_number % 3])
        return made

    return make


def adapters(requests: int, names: tuple[str, ...]) -> Callable[[], Workload]:
    """No request for the base model: see `plain_fault` below."""
    return lambda: Workload(4).wave("", requests, per_step=0.4).vary(adapter=list(names))


def mixed(requests: int, names: tuple[str, ...]) -> Callable[[], Workload]:
    """Adapters beside the base model in the same batches."""
    return lambda: Workload(4).wave("", requests, per_step=4.0).vary(adapter=["", *names])


def repeats(requests: int) -> Callable[[], Workload]:
    """Repetitive prompts and long answers, in which n-gram drafting finds drafts, some of them wrong."""

    def make() -> Workload:
        made, rng = Workload(5), np.random.default_rng(5)
        made.wave("", requests, per_step=0.4, max_tokens=120)
        prompts = [prompt_of_repeats(rng, int(n)) for n in rng.integers(10, 90, size=40)]
        return made.vary(prompt=prompts, stop=[[]], abort_after_outputs=[7, None, None, None])

    return make


def asked(requests: int) -> Callable[[], Workload]:
    """For a server: clients that wait, and clients that ask for a stream and leave."""

    def make() -> Workload:
        made = Workload(8).wave("", requests)
        made.wave("streaming clients that disconnect", requests // 2, max_tokens=120).vary(stop=[[]])
        return made.vary(max_tokens=[90, 120], abort_after_outputs=[1, 3, 8, None])

    return make


NGRAM = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }
}
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
COLORS = ("red", "blue")
UNSEEN = "served on, every token counted as unseen{not_armed}"

ENGINES = (
    # The servers first: they take the longest to start.
    Engine("2 API servers", asked(40), {**EAGER, "api_server_count": 2}, served=True),
    Engine(
        "data parallel, 2 engines",
        lambda: Workload(8).wave("", 40),
        {**EAGER, "data_parallel_size": 2},
        served=True,
        engines=2,
    ),
    Engine("tensor parallel, 2 ranks", plain(60), {**EAGER, "tensor_parallel_size": 2}, note="scored on rank 0"),
    Engine(
        "pipeline parallel, 2 ranks",
        plain(20),
        # Compiled: an eager CPU engine makes no warm-up, and vLLM's second rank fails without one.
        {"pipeline_parallel_size": 2},
        refused="pipeline parallelism",
        note=f"the stream of a request is spread over two ranks' batches; {UNSEEN}",
    ),
    Engine("piecewise compile, cold", plain(20), env=PIECEWISE, cache="piecewise"),
    Engine("piecewise compile, warm", plain(20), env=PIECEWISE, cache="piecewise", says=LOADED),
    Engine(
        "piecewise compile, stale",
        plain(20),
        env={**PIECEWISE, "UNSALTED": "1"},
        cache="piecewise",
        refused="does not hold the op",
        says=LOADED,
        note=f"without our salt of the cache key: the canary finds the stale graph; {UNSEEN}",
    ),
    Engine("default", default(160), note="asynchronous scheduling off, as on every CPU engine"),
    Engine("default", plain(100), EAGER, architecture="Qwen3"),
    Engine("default", plain(100), EAGER, architecture="Gemma3"),
    Engine("default", plain(100), EAGER, architecture="Gemma2"),
    Engine("default", plain(100), EAGER, architecture="Qwen3Moe"),
    Engine("default", plain(100), EAGER, architecture="Mixtral"),
    Engine("default", plain(100), EAGER, architecture="GPT2"),
    Engine("default", plain(100), EAGER, architecture="OPT"),
    Engine("default", plain(20), EAGER, architecture="Cohere", note="its layers return the stream and a stale half"),
    Engine("V2 runner", v2(16), EAGER, env=V2),
    Engine("V2 runner, chunked prefill, 16-token budget", plain(12), {**EAGER, "max_num_batched_tokens": 16}, env=V2),
    Engine("V2 runner, preemption", pressed(10), {**EAGER, "num_gpu_blocks_override": 12}, env=V2, preempts=True),
    Engine("V2 runner, asynchronous scheduling", plain(16), EAGER, env=V2, keep_async=True),
    Engine("chunked prefill, 16-token budget", plain(120), {**EAGER, "max_num_batched_tokens": 16}),
    Engine("preemption", pressed(80), {**EAGER, "num_gpu_blocks_override": 14}, preempts=True),
    Engine("prefix cache, evicted and refilled", evicted(120), {**EAGER, "num_gpu_blocks_override": 20}),
    Engine("enforce_eager", plain(200), EAGER),
    Engine("n-gram drafts", repeats(100), {**EAGER, **NGRAM}, architecture=LOOPING, drafts=True),
    Engine("LoRA, 2 adapters", adapters(100, COLORS), {**EAGER, **LORA}, adapters=COLORS),
    Engine(
        "LoRA, 2 adapters beside the base model",
        mixed(40, COLORS),
        {**EAGER, **LORA},
        adapters=COLORS,
        plain_fault="vLLM 0.32's CPU kernels add the last adapter to base rows that share a batch with adapters",
    ),
    Engine(
        "pooling",
        plain(20),
        {**EAGER, "runner": "pooling", "convert": "embed", "skip_tokenizer_init": False},
        refused="pooling models",
        note=f"V2 clears the batch before it can be read; {UNSEEN}",
    ),
)
