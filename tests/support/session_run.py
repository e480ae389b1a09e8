"""Drives one real AsyncLLM in a process of its own: `python -m tests.support.session_run JOB.json RESULT.json`.

The job: {"engine": AsyncEngineArgs, "env": {...}, "embeds": [{"rows": n, "seed": s, "max_tokens": n}, ...],
"sessions": [{"turns": [[ids], ...], "max_tokens": n, "stop": [ids]}, ...]}. A prompt of embeddings, or a session, which
is given its next tokens once it has answered the ones before. The result: {"embeds": [[ids], ...],
"sessions": [[[ids] for each turn], ...]}.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from tests.support.engine_run import ENVIRONMENT


async def drive(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(skip_tokenizer_init=True, **job["engine"]))

    def sampling(item: dict[str, Any]) -> Any:
        return SamplingParams(
            temperature=0,
            max_tokens=item["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            stop_token_ids=item.get("stop"),
            output_kind=RequestOutputKind.DELTA,
        )

    async def embedded(i: int, item: dict[str, Any]) -> list[int]:
        generator = torch.Generator().manual_seed(item["seed"])
        prompt: Any = {"prompt_embeds": torch.randn(item["rows"], item["width"], generator=generator)}
        made: list[int] = []
        async for output in engine.generate(prompt, sampling(item), f"embeds-{i}"):
            made += output.outputs[0].token_ids
        return made

    async def session(i: int, item: dict[str, Any]) -> list[list[int]]:
        answered: asyncio.Queue[None] = asyncio.Queue()
        made: list[list[int]] = [[]]

        async def turns() -> AsyncGenerator[Any, None]:
            for number, tokens in enumerate(item["turns"]):
                if number:
                    await answered.get()
                yield StreamingInput(prompt={"prompt_token_ids": tokens})
            await answered.get()

        async for output in engine.generate(turns(), sampling(item), f"session-{i}"):
            made[-1] += output.outputs[0].token_ids
            if output.outputs[0].finish_reason is not None:
                made.append([])
                answered.put_nowait(None)
        return [turn for turn in made if turn]

    embeds = await asyncio.gather(*(embedded(i, item) for i, item in enumerate(job["embeds"])))
    sessions = await asyncio.gather(*(session(i, item) for i, item in enumerate(job["sessions"])))
    engine.shutdown()
    return {"embeds": embeds, "sessions": sessions}


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    os.environ.update({**ENVIRONMENT, **job.get("env", {})})
    Path(result_path).write_text(json.dumps(asyncio.run(drive(job))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
