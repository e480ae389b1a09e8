"""Drives one real vLLM engine in a process of its own: `python -m tests.support.engine_run JOB.json RESULT.json`.

A process per engine, because vLLM keeps global state and its patches last for the process. The job:
{"engine": LLM(...) arguments, "waves": [[{"prompt": [ids], "max_tokens": n}, ...], ...], "runner": "v1"|"v2",
 "compile": "default"|"vllm"}. Each wave is generated concurrently. The result: {"outputs": [[ids], ...] in order,
 "metrics": {...}, "start_seconds": s}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    os.environ.update({**ENVIRONMENT, **job.get("env", {})})
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    llm = LLM(skip_tokenizer_init=True, disable_log_stats=False, **job["engine"])
    start_seconds = time.monotonic() - started
    outputs: list[list[int]] = []
    wave_seconds: list[float] = []
    for wave in job["waves"]:
        prompts: Any = [{"prompt_token_ids": item["prompt"]} for item in wave]
        sampling = [
            SamplingParams(
                temperature=0, max_tokens=item["max_tokens"], detokenize=False, stop_token_ids=item.get("stop")
            )
            for item in wave
        ]
        began = time.monotonic()
        outputs += [list(result.outputs[0].token_ids) for result in llm.generate(prompts, sampling, use_tqdm=False)]
        wave_seconds.append(time.monotonic() - began)
    metrics = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if hasattr(metric, "value") and metric.name.endswith("tokens")
    }
    Path(result_path).write_text(
        json.dumps(
            {"outputs": outputs, "metrics": metrics, "start_seconds": start_seconds, "wave_seconds": wave_seconds}
        )
    )
    # The exporter drains on its own; an engine that ends the ordinary way gives it the time.
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
