"""`python -m latentwatch.engines.vllm.capture_process FOLDER`: run the job that lies in FOLDER, part by part.

A process of its own, so that the engine's memory is free again when it ends, and one that the system kills takes no
work with it: parts that are written stay. One line of JSON on standard output for each part: {"done", "of", "tokens"};
at a refusal {"refused": {...}}. vLLM's own log goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from latentwatch.errors import EngineRefused, Refusal, RefusalReason
from latentwatch.watchlist import captured
from latentwatch.watchlist.captured import CapturedRequest, CaptureJob

if TYPE_CHECKING:
    from latentwatch.engines.vllm.capture import Capture

_ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker is in this process, where the hooks write
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "LATENTWATCH_DISABLE": "1",  # nothing is monitored here
}
_BATCHED_TOKENS: Final = 2048
_AT_ONCE: Final = 128


def main(folder: Path) -> int:
    """Returns the exit code."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # vLLM prints to standard output too, where the parent reads.
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _run(folder, lambda fields: print(json.dumps(fields), file=told, flush=True))
    except Refusal as error:
        refused = {"what": error.what, "found": error.found, "instead": error.instead, "reason": error.reason}
        print(json.dumps({"refused": refused}), file=told, flush=True)
        return 2
    return 0


def _run(folder: Path, tell: Any) -> None:
    job = CaptureJob.read(folder)
    llm, capture = _engine(job)
    from vllm import SamplingParams

    tokens = 0
    for number in captured.missing_parts(folder, job):
        wanted = job.parts[number]
        prompts: Any = [{"prompt_token_ids": list(job.prompts[r])} for r in wanted]
        sampling = [
            SamplingParams(temperature=0, max_tokens=max(1, job.decode_tokens[r]), ignore_eos=True, detokenize=False)
            for r in wanted
        ]
        results = llm.generate(prompts, sampling, use_tqdm=False)
        streams = {_own(name): capture.pop(name) for name in capture.request_ids}
        found = [
            CapturedRequest(*streams[_own(result.request_id)], tuple(result.outputs[0].token_ids)) for result in results
        ]
        tokens += sum(request.x_LTD.shape[1] for request in found)
        captured.write_part(folder, number, found)
        tell({"done": number + 1, "of": len(job.parts), "tokens": tokens})


def _own(request_id: str) -> str:
    """The number that LLM.generate gave; the engine puts something random behind it."""
    return str(request_id).partition("-")[0]


_ENGINE: Final[dict[str, Any]] = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": _BATCHED_TOKENS,
    "max_num_seqs": _AT_ONCE,
    "seed": 0,
}


def _engine(job: CaptureJob) -> tuple[Any, Capture]:
    """Raises: EngineRefused: the engine does not start with this model, or its stream is not found."""
    from vllm import LLM

    from latentwatch.engines.vllm.capture import Capture

    try:
        llm = LLM(
            model=job.model,
            dtype=job.dtype,
            max_model_len=job.max_model_len,
            **_ENGINE,
        )
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise EngineRefused(
            f"vLLM with model {job.model}",
            found=f"it does not start: {' '.join(str(error).split())[:300]}",
            instead="Its log is above. A model that is too large for the memory here can be served with less "
            "precision (--dtype bfloat16), or on a machine that holds it.",
            reason=RefusalReason.ENGINE_MODE,
        ) from error

    def attach(wrapper: Any) -> Capture:
        return Capture(getattr(wrapper, "worker", wrapper), job.layers, job.skip_first)

    captures: list[Capture] = llm.collective_rpc(attach)
    return llm, captures[0]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
