"""One engine in a process of its own: reads a wave per line of standard input, generates it, answers with its times.

    python -m tests.bench.engine_gpu.child JOB.json

JOB: {"engine": AsyncEngineArgs arguments, "hooked_layers": [layer, ...]}; with layers, forward hooks copy their
output on every step, which is what interpretability libraries do to an eager engine.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main(job_path: str) -> None:
    asyncio.run(_serve(json.loads(Path(job_path).read_text())))


async def _serve(job: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**job["engine"]))
    try:
        if job["hooked_layers"]:
            await engine.collective_rpc(_hook_layers, args=(job["hooked_layers"],))
        print("READY", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            wave = json.loads(line)
            if wave.get("memory"):
                answer = await engine.collective_rpc(_allocated_bytes)
            else:
                answer = await _generate(engine, wave)
            print("DONE", json.dumps(answer), flush=True)
    finally:
        engine.shutdown()


async def _generate(engine: Any, wave: dict[str, Any]) -> dict[str, Any]:
    """A closed loop: `concurrency` clients, each sending its next request when the last one is answered."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rng = np.random.default_rng(wave["seed"])
    prompts = rng.integers(3, wave["vocabulary"], size=(wave["requests"], wave["input_tokens"]))
    sampling = SamplingParams(
        temperature=0,
        max_tokens=wave["output_tokens"],
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    todo = iter(range(wave["requests"]))
    outputs: list[list[int]] = [[] for _ in range(wave["requests"])]
    first_seconds: list[float] = []
    gap_seconds: list[float] = []

    async def client() -> None:
        for i in todo:
            sent = last = time.perf_counter()
            prompt: Any = {"prompt_token_ids": prompts[i].tolist()}
            async for output in engine.generate(prompt, sampling, f"{wave['seed']}-{i}"):
                now = time.perf_counter()
                tokens = output.outputs[0].token_ids
                if tokens:
                    if outputs[i]:
                        # Several tokens at once reached the client together; the gap is theirs to share.
                        gap_seconds.extend([(now - last) / len(tokens)] * len(tokens))
                    else:
                        first_seconds.append(now - sent)
                    outputs[i] += tokens
                    last = now

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(wave["concurrency"])))
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": wave["requests"] * (wave["input_tokens"] + wave["output_tokens"]) / seconds,
        "p50_itl_ms": 1000 * float(np.percentile(gap_seconds, 50)),
        "p99_itl_ms": 1000 * float(np.percentile(gap_seconds, 99)),
        "ttft_ms": 1000 * float(np.percentile(first_seconds, 50)),
        "outputs": outputs if wave.get("keep") else [],
    }


def _hook_layers(worker: Any, layers: list[int]) -> None:
    """Runs in the worker: copy the residual stream of these layers aside on every forward."""

    def copy(_module: Any, _args: Any, output: Any) -> None:
        held[:] = [part.clone() for part in output] if isinstance(output, tuple) else [output.clone()]

    held: list[Any] = []
    model = worker.model_runner.get_model()
    for layer in layers:
        model.model.layers[layer].register_forward_hook(copy)


def _allocated_bytes(worker: Any) -> int:
    import torch

    return int(torch.cuda.memory_allocated(worker.device)) if torch.cuda.is_available() else 0


if __name__ == "__main__":
    main(sys.argv[1])
