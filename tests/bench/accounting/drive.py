"""Drives real vLLM engines through scripted workloads: `python -m tests.bench.accounting.drive`.

Takes lines of three paths from standard input: a job, where its result goes, where its log goes. Each job runs in a
fork of this process, which has imported vLLM once, and is answered with a line "done". The engine runs in that fork,
so that one call is one engine step: arrivals and aborts happen at the same step in every run, with the monitor and
without. What the engine computed for each request is read from its scheduler.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.support.engine_run import ENVIRONMENT

COUNTERS = (
    "vllm:num_preemptions",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
)


def main() -> None:
    os.environ.update({**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401 - imported before the forks, for all of them

    for line in sys.stdin:
        job, result, log = line.split()
        child = os.fork()
        if not child:
            _become(log)
            try:
                run(Path(job), Path(result))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)
        print("done", flush=True)


def _become(log: str) -> None:
    """Send this process's output, and that of its children, to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def run(job_path: Path, result_path: Path) -> None:
    job = json.loads(job_path.read_text())
    os.environ.update(job["env"])
    from vllm import LLM

    if job["keep_async"]:
        _keep_async_scheduling()
    llm = LLM(**{"skip_tokenizer_init": True, "disable_log_stats": False, **job["engine"]})
    script = Script(llm, job)
    script.play()
    metrics = {m.name: getattr(m, "value", 0) for m in llm.get_metrics() if m.name in COUNTERS}
    requests = [
        {"outputs": script.outputs[i], "computed": script.computed[i], "aborted": i in script.aborted}
        | {"embedding": script.embeddings.get(i)}
        for i in range(len(job["requests"]))
    ]
    result_path.write_text(json.dumps({"requests": requests, "metrics": metrics}))
    llm.llm_engine.engine_core.shutdown()


def _keep_async_scheduling() -> None:
    """The CPU platform turns it off, as "not required"; the engine's loop and its runner do it all the same."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        original(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


class Script:
    """One workload on one engine. Requests go by their index, in `job["requests"]` and in the engine's ids."""

    def __init__(self, llm: Any, job: Any) -> None:
        self._engine = llm.llm_engine
        self._pooling = llm.model_config.runner_type == "pooling"
        self._adapters = job["adapters"]
        self._requests = job["requests"]
        self._id: dict[int, str] = {}
        self._began: dict[int, int] = {}
        self.outputs: list[list[int]] = [[] for _ in self._requests]
        self.embeddings: dict[int, list[float]] = {}
        self.computed = [0] * len(self._requests)
        self.aborted: set[int] = set()
        self.steps = 0

    def play(self) -> None:
        """One wave after the other; within a wave, requests arrive at their steps."""
        for wave in sorted({request["wave"] for request in self._requests}):
            waiting = [i for i, request in enumerate(self._requests) if request["wave"] == wave]
            began = self.steps
            while waiting or self._engine.has_unfinished_requests():
                for i in [i for i in waiting if self._requests[i]["arrive"] <= self.steps - began]:
                    self._add(i)
                    waiting.remove(i)
                self._step()
        # The requests that ended in the last step are announced with the next one, and an idle engine makes none.
        self._engine.step()

    def _add(self, i: int) -> None:
        from vllm import PoolingParams, SamplingParams
        from vllm.lora.request import LoRARequest

        request = self._requests[i]
        adapter = request["adapter"]
        lora = None
        if adapter:
            lora = LoRARequest(adapter, 1 + sorted(self._adapters).index(adapter), self._adapters[adapter])
        params: Any = (
            PoolingParams(task="embed")
            if self._pooling
            else SamplingParams(
                temperature=0, max_tokens=request["max_tokens"], detokenize=False, stop_token_ids=request["stop"]
            )
        )
        self._id[i] = self._engine.add_request(
            str(i), {"prompt_token_ids": request["prompt"]}, params, lora_request=lora, priority=request["priority"]
        )
        self._began[i] = self.steps

    def _step(self) -> None:
        for output in self._engine.step():
            if self._pooling:
                self.embeddings[_index(output.request_id)] = output.outputs.data.tolist()
            else:
                self.outputs[_index(output.request_id)] = list(output.outputs[0].token_ids)
        self.steps += 1
        scheduler = self._engine.engine_core.engine_core.scheduler
        for name, state in scheduler.requests.items():
            i = _index(name)
            self.computed[i] = max(self.computed[i], int(state.num_computed_tokens))
            if self._must_abort(i):
                self.aborted.add(i)
        self._engine.abort_request(
            [self._id[i] for i in self.aborted if self._id[i] in scheduler.requests], internal=True
        )

    def _must_abort(self, i: int) -> bool:
        steps, tokens = self._requests[i]["abort_after_steps"], self._requests[i]["abort_after_outputs"]
        if steps is not None and self.computed[i]:
            return self.steps - self._began[i] >= steps
        return tokens is not None and len(self.outputs[i]) >= tokens


def _index(request_id: str) -> int:
    return int(request_id.partition("-")[0])


if __name__ == "__main__":
    main()
