"""Does the work of the walk in forks of one process, which has imported vLLM once:
`python -m tests.bench.architectures.forks`.

Takes lines of four words from standard input: what to do, a job's file, where its result goes, where its log goes.
Each is done in a fork and answered with a line "done". A result that is not there says that it failed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.engine_run import ENVIRONMENT

Job = dict[str, Any]


def main() -> None:
    os.environ.update({**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    import transformers  # noqa: F401 - imported before the forks, for all of them, as what follows
    import vllm.entrypoints.llm
    import vllm.model_executor.models.transformers
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401 - as above
    from vllm.model_executor.models import registry

    # vLLM looks at a model's class in a process of its own, which imports vllm once more: half a minute a model.
    registry._run_in_subprocess = lambda look: look()
    for line in sys.stdin:
        what, job, result, log = line.split()
        child = os.fork()
        if not child:
            code = 1
            _write_to(log)
            try:
                WORK[what](json.loads(Path(job).read_text()), Path(result))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.waitpid(child, 0)
        print("done", flush=True)


def _write_to(log: str) -> None:
    """Send this process's output, and that of its children, to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def checkpoint(job: Job, result: Path) -> None:
    import torch

    from tests.bench.architectures import catalogue

    torch.set_num_threads(1)
    catalogue.checkpoint(catalogue.Row(**job["row"]), Path(job["path"]))
    result.write_text("{}")


def engine(job: Job, result: Path) -> None:
    """One engine, all requests at once: what it answers. Where the job has "layers", also the streams that its own
    modules read behind them, as `streams.npz` beside the result: see `_consumed`."""
    os.environ.update(job["env"])
    from vllm import LLM, SamplingParams

    llm = LLM(**{"skip_tokenizer_init": True, **job["engine"]})

    def answers(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False, ignore_eos=True)
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(one.outputs[0].token_ids) for one in llm.generate(inputs, sampling, use_tqdm=False)]

    outputs = answers(job["prompts"], job["max_tokens"])
    # The requests that ended in the last step are announced with the next one, and an idle engine makes none.
    llm.llm_engine.step()
    result.write_text(json.dumps({"outputs": outputs}))
    if job["layers"]:
        streams, alone, readers = _consumed(llm, answers, job)
        np.savez(result.with_name("streams.npz"), **streams)
        result.write_text(json.dumps({"outputs": outputs, "alone": alone, "readers": readers}))
    if "LATENTWATCH_WATCHLIST" in job["env"]:
        # An engine that ends the ordinary way gives the exporter its time; it takes seconds.
        llm.llm_engine.engine_core.shutdown()


def _consumed(llm: Any, answers: Callable[..., Any], job: Job) -> tuple[dict[str, Any], Any, list[str]]:
    """By "<request>-<layer>": what the first module that runs behind the layer is given, its parts added, [T, D]; or,
    where the job says "returned", what the layer itself returns, its parts added.

    One request runs at a time, so its rows come in order. Second: the answers. Third: what kind of module that is, by
    layer.
    """
    import torch

    layers, returned = job["layers"], job["returned"]
    rows: dict[int, list[Any]] = {}
    readers: dict[int, str] = {}
    waiting: list[int] = []

    def ended(layer: int) -> Callable[..., None]:
        def see(module: Any, _args: Any, output: Any) -> None:
            waiting[:] = [layer]
            if returned:
                reads(module, output if isinstance(output, tuple) else (output,), {})

        return see

    def reads(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not waiting:
            return
        floats = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if floats:
            layer = waiting.pop()
            width = floats[0].shape[-1]
            parts = [x.detach().float().reshape(-1, width) for x in floats if x.shape == floats[0].shape]
            rows.setdefault(layer, []).append(torch.stack(parts).sum(dim=0).numpy())
            readers[layer] = f"{type(module).__name__} of {len(parts)}"

    def watch(model: Any) -> None:
        decoder = _layers(model, job["layer_count"])
        for layer in layers:
            decoder[layer].register_forward_hook(ended(layer))
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(reads, with_kwargs=True)

    llm.apply_model(watch)
    streams, alone = {}, []
    for i, prompt in enumerate(job["prompts"]):
        rows.clear()
        alone += answers([prompt], job["max_tokens"])
        fed = len(prompt) + job["max_tokens"] - 1
        streams.update({f"{i}-{layer}": np.concatenate(rows[layer])[:fed] for layer in layers if rows.get(layer)})
    return streams, alone, [readers.get(layer, "") for layer in layers]


def _layers(model: Any, count: int) -> Any:
    """The first list of so many modules whose name ends as that of decoder layers does."""
    import torch

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    lists.sort(key=lambda item: item[0].rpartition(".")[2] not in ("layers", "h", "blocks"))
    return lists[0][1]


def hugging_face(job: Job, result: Path) -> None:
    """resid_post by "<request>-<layer>" from Hugging Face's own forward, and its most likely next tokens, as .npz."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model: Any = getattr(transformers, job["made_by"]).from_pretrained(
        job["path"], dtype=getattr(torch, job["dtype"]), attn_implementation="eager"
    )
    model.eval()
    caught: dict[int, Any] = {}

    def catch(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            # hidden_states[-1] of the model's output would be behind the final norm.
            caught[layer] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    decoder = _layers(model, job["layer_count"])
    for layer in job["layers"]:
        decoder[layer].register_forward_hook(catch(layer))
    found: dict[str, Any] = {}
    for i, tokens in enumerate(job["fed"]):
        with torch.inference_mode():
            found[f"{i}-next"] = model(torch.tensor([tokens]), use_cache=False).logits[0].argmax(dim=-1).numpy()
        for layer in job["layers"]:
            x = caught[layer].float().numpy()
            found[f"{i}-{layer}"] = x.reshape(len(tokens), -1) if x.ndim <= 3 else x[0].reshape(len(tokens), -1)
    with result.open("wb") as file:
        np.savez(file, **found)


WORK: dict[str, Callable[[Job, Path], None]] = {
    "checkpoint": checkpoint,
    "engine": engine,
    "hugging_face": hugging_face,
}

if __name__ == "__main__":
    main()
