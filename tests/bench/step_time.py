"""Step time with the monitor on / off on the CPU engine: `make bench-step-time` writes results/step-time.json.

Two engines with one model are up at once, one with the monitor and one without, compiled as vLLM ships. They
generate the same waves in turn, A B B A ..., so that a machine whose speed drifts slows both alike, and each pair of
waves gives one ratio. Checked first: both give the same tokens, and the collector's books hold every one of them.
The demo's model is the worst case there is, a step of a millisecond; the larger one has random weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch.watchlist import file as watchlist_file

from tests.support import tiny
from tests.support.engine_run import ENVIRONMENT
from tests.support.engines import ROOT, cache_root, random_prompts
from tests.support.recording import RecordingCollector

RESULT = ROOT / "tests/bench/results/step-time.json"
ASSETS = ROOT / "monitor/latentwatch/demo/assets"
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "initializer_range": 0.05,
}
HOOKED_LAYERS = (5, 11)
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Case:
    """A model to serve and what to watch on it."""

    name: str
    model: Path
    watchlist: Path
    pairs: int
    output_tokens: int


def demo_case(_folder: Path) -> Case:
    return Case("demo, 1M", ASSETS / "model", ASSETS / "demo.watchlist.safetensors", pairs=15, output_tokens=64)


def large_case(folder: Path) -> Case:
    """Random weights of a size that makes a step as long as a small served model's; 1 % of the activations fire."""
    import torch
    from transformers import LlamaForCausalLM

    model = tiny.llama(folder / "model", **LARGE)
    network = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.inference_mode():
        states = network(torch.randint(3, tiny.VOCABULARY, (4, 64)), output_hidden_states=True).hidden_states
    spread = float(torch.stack([states[layer + 1] for layer in HOOKED_LAYERS]).float().std())
    tiny.watchlist(
        folder / "w.safetensors",
        layers=HOOKED_LAYERS,
        sparse=24,
        dense=2,
        d_model=LARGE["hidden_size"],
        num_layers=LARGE["num_hidden_layers"],
        threshold=2.33 * spread,
    )
    millions = network.num_parameters() / 1e6
    return Case(f"random, {millions:.0f}M", model, folder / "w.safetensors", pairs=9, output_tokens=16)


def child(model: str, output_tokens: int) -> None:
    """An engine that generates the wave on each line of standard input, and says how long it took."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=32, enable_prefix_caching=False)
    print("READY", flush=True)
    for line in sys.stdin:
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in json.loads(line)]
        sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        print("DONE", json.dumps([seconds, [list(o.outputs[0].token_ids) for o in outputs]]), flush=True)
    llm.llm_engine.engine_core.shutdown()


class Engine:
    """One child process."""

    def __init__(self, case: Case, log: Path, env: dict[str, str]) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.step_time", "--child", str(case.model), str(case.output_tokens)],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(cache_root()), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def wait_for(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"an engine ended early; see {self._log.name}")

    def run(self, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(prompts) + "\n")
        self._process.stdin.flush()
        seconds, outputs = json.loads(self.wait_for("DONE"))
        return seconds, outputs

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def measure(case: Case, on: Engine, off: Engine, batch: int) -> dict[str, Any]:
    """One row: the paired ratios of `batch` concurrent requests."""
    prompts = [item["prompt"] for item in random_prompts(batch, vocabulary=tiny.VOCABULARY, longest=24, seed=batch)]
    assert on.run(prompts)[1] == off.run(prompts)[1], "the monitor changed the model's output"
    on_seconds, off_seconds = [], []
    for pair in range(case.pairs):
        for engine in (on, off) if pair % 2 else (off, on):
            (on_seconds if engine is on else off_seconds).append(engine.run(prompts)[0])
    ratio = np.array(off_seconds) / np.array(on_seconds)
    # The prompt's step and one per further token; scheduling alone, so the count is the same on both sides.
    step_ms = 1000 * np.median(off_seconds) / case.output_tokens
    p20, p50, p80 = np.percentile(ratio, [20, 50, 80])
    row = {"model": case.name, "batch": batch, "pairs": case.pairs, "step_ms_off": round(float(step_ms), 3)}
    return row | {
        f"throughput_ratio_{name}": round(float(value), 4) for name, value in (("p20", p20), ("p50", p50), ("p80", p80))
    }


def run(make_case: Callable[[Path], Case]) -> list[dict[str, Any]]:
    """The rows of one model."""
    with tempfile.TemporaryDirectory(prefix="lw") as name, RecordingCollector(Path(name) / "c.sock") as collector:
        folder = Path(name)
        case = make_case(folder)
        env = {"LATENTWATCH_WATCHLIST": str(case.watchlist), "LATENTWATCH_COLLECTOR": collector.target}
        on = Engine(case, folder / "on.log", env)
        on.wait_for("READY")
        off = Engine(case, folder / "off.log", {"LATENTWATCH_DISABLE": "1"})
        off.wait_for("READY")
        rows = []
        for batch in BATCHES:
            rows.append(
                {"features": len(watchlist_file.read(case.watchlist).features), **measure(case, on, off, batch)}
            )
            print(rows[-1], flush=True)
        requests = sum((1 + case.pairs) * batch for batch in BATCHES)
        collector.wait_closed(requests)
        closed = [c for b in collector.sink.batches for c in b.closed]
        books = sum(int(b.segments_S["count"].sum()) for b in collector.sink.batches)
        assert len(closed) == requests and books == sum(c.total_tokens for c in closed), "the books do not balance"
        on.close()
        off.close()
    return rows


def main() -> None:
    import torch
    import vllm
    from latentwatch import __version__

    rows = [*run(demo_case), *run(large_case)]
    RESULT.write_text(
        json.dumps(
            {
                "what": "throughput with the monitor on / off: the same waves in turn on two CPU engines",
                "date": datetime.date.today().isoformat(),
                "hardware": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
                "versions": {
                    "latentwatch": __version__,
                    "vllm": vllm.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"wrote {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args().child
    child(args[0], int(args[1])) if args else main()
