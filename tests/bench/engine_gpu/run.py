"""The monitor on / off inside vLLM on a GPU: `make bench-engine-gpu` writes results/engine-gpu.json.

    python -m tests.bench.engine_gpu.run [--models llama,moe] [--runners v2,v1] [--minutes N] [--out FILE]

Two engines with dummy weights are up at once on one GPU, compiled and with CUDA graphs, one with the monitor and one
without. They serve the same waves in turn, A B B A ..., and each pair gives one ratio, so that a machine whose speed
drifts slows both alike. Checked on the way: the tokens are the same, and the collector's books hold every one of them.
The peer "eager-hooks" is an engine that copies the same layers out by forward hooks, which needs eager mode: what
vllm-lens and nnsight do; they themselves are measured where they are installed next to this vLLM, and named.

A row is written when it is complete; with --minutes the run stops in time and the next one goes on. `--check` runs the
whole path on the CPU engine with a tiny model and writes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from latentwatch.watchlist import file as watchlist_file

from tests.bench.engine_gpu import models
from tests.support.engines import ROOT, cache_root
from tests.support.recording import RecordingCollector

RESULT = ROOT / "tests/bench/results/engine-gpu.json"
CONCURRENCIES = (8, 128, 1, 32, 256)
MIXES = {"decode": (64, 128), "prefill": (2048, 8)}
"""Input and output tokens of a request."""
PAIRS = 5
FEATURES, HOOK_POINTS = 256, 4
PEERS = ("vllm_lens", "nnsight")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # The children answer how much memory their worker holds, and the peer's hooks are put in, by sent functions.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # FlashInfer's sampler compiles with nvcc, which a serving machine may lack.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
ENGINE = {
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
    "max_model_len": 4096,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 256,
    # Fixed, so that two engines share the GPU and their memory can be compared; each asks for less than half of it.
    "kv_cache_memory_bytes": 16 << 30,
    "gpu_memory_utilization": 0.45,
}
CHECK_ENGINE = {**ENGINE, "max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 8}


class Cell(NamedTuple):
    model: str
    mode: str
    concurrency: int
    mix: str
    peer: str


class Engine:
    """One child process."""

    def __init__(self, folder: Path, name: str, engine: dict[str, Any], env: dict[str, str], hooked: list[int]) -> None:
        job = folder / f"{name}.json"
        job.write_text(json.dumps({"engine": engine, "hooked_layers": hooked}))
        self.log = folder / f"{name}.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.engine_gpu.child", str(job)],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(cache_root()), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def wait_for(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise RuntimeError(f"an engine ended early:\n{self.log.read_text(errors='replace')[-6000:]}")

    def ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self.wait_for("DONE"))

    def close(self) -> None:
        """End it, at the latest by force; harmless when it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Bench:
    """The engines of one model and runner: with the monitor, without it, and the eager peer."""

    def __init__(self, stack: ExitStack, model: str, mode: str, *, peer: str, check: bool = False) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lw")))
        self.vocabulary = models.config(model).vocab_size
        self.collector = stack.enter_context(RecordingCollector(folder / "c.sock"))
        self.sent = 0
        path = models.write(model, folder)
        watchlist = models.watchlist(model, folder / "w.safetensors", features=FEATURES, hook_points=HOOK_POINTS)
        engine = {**(CHECK_ENGINE if check else ENGINE), "model": str(path)}
        runner = {"VLLM_USE_V2_MODEL_RUNNER": "1" if mode == "v2" else "0"} if not check else {}
        off = {**runner, "LATENTWATCH_DISABLE": "1"}
        if check:
            engine.pop("kv_cache_memory_bytes")
            off["VLLM_CPU_KVCACHE_SPACE"] = runner["VLLM_CPU_KVCACHE_SPACE"] = "1"
        if peer:
            hooked = [rows.hook_point.layer for rows in watchlist.hooks]
            self.on = Engine(folder, "peer", {**engine, "enforce_eager": True}, off, hooked)
        else:
            on = {
                "LATENTWATCH_WATCHLIST": str(folder / "w.safetensors"),
                "LATENTWATCH_COLLECTOR": self.collector.target,
            }
            self.on = Engine(folder, "on", engine, {**runner, **on}, [])
        self.peer = peer
        self.features = len(watchlist_file.read(folder / "w.safetensors").features)
        # One after the other: two engines that profile the same GPU at once mistake each other's memory for their own.
        stack.callback(self.on.close)
        self.on.wait_for("READY")
        self.off = Engine(folder, "off", engine, off, [])
        stack.callback(self.off.close)
        self.off.wait_for("READY")

    def memory_bytes(self) -> int:
        """What the monitored worker has allocated beyond the plain one."""
        return int(self.on.ask({"memory": True})[0]) - int(self.off.ask({"memory": True})[0])

    def wave(self, engine: Engine, cell: Cell, seed: int, *, keep: bool = False) -> dict[str, Any]:
        input_tokens, output_tokens = MIXES[cell.mix]
        requests = cell.concurrency if cell.concurrency >= 128 else max(8, 2 * cell.concurrency)
        if engine is self.on:
            self.sent += requests
        answer: dict[str, Any] = engine.ask(
            {
                "concurrency": cell.concurrency,
                "requests": requests,
                "input_tokens": input_tokens,
                "output_tokens": output_tokens,
                "vocabulary": self.vocabulary,
                "seed": seed,
                "keep": keep,
            }
        )
        return answer

    def row(self, cell: Cell, pairs: int) -> dict[str, Any]:
        """Waves in turn on both engines, and the medians of their ratios, on / off."""
        first_on, first_off = (self.wave(engine, cell, 0, keep=True) for engine in (self.on, self.off))
        same = float(np.mean([a == b for a, b in zip(first_on["outputs"], first_off["outputs"], strict=True)]))
        on: list[dict[str, Any]] = []
        off: list[dict[str, Any]] = []
        for pair in range(pairs):
            for engine in (self.on, self.off) if pair % 2 else (self.off, self.on):
                (on if engine is self.on else off).append(self.wave(engine, cell, 1 + pair))
        ratio = {
            key: [a[key] / b[key] for a, b in zip(on, off, strict=True)]
            for key in ("tokens_per_second", "p50_itl_ms", "p99_itl_ms", "ttft_ms")
        }
        spread = np.percentile(ratio["tokens_per_second"], [20, 80])
        return {
            **cell._asdict(),
            "throughput_ratio": round(float(np.median(ratio["tokens_per_second"])), 4),
            "p50_itl_ratio": round(float(np.median(ratio["p50_itl_ms"])), 4),
            "p99_itl_ratio": round(float(np.median(ratio["p99_itl_ms"])), 4),
            "ttft_ratio": round(float(np.median(ratio["ttft_ms"])), 4),
            "throughput_ratio_p20": round(float(spread[0]), 4),
            "throughput_ratio_p80": round(float(spread[1]), 4),
            "tokens_per_second_off": round(float(np.median([wave["tokens_per_second"] for wave in off])), 1),
            "p50_itl_ms_off": round(float(np.median([wave["p50_itl_ms"] for wave in off])), 3),
            "p99_itl_ms_off": round(float(np.median([wave["p99_itl_ms"] for wave in off])), 3),
            "ttft_ms_off": round(float(np.median([wave["ttft_ms"] for wave in off])), 2),
            "requests_with_equal_outputs": round(same, 4),
            "pairs": pairs,
        }

    def finish(self) -> None:
        """End the engines; then every token of every request that was served is in the collector's books."""
        # A worker learns with the next step that a request ended; the last ones are told of at the end.
        self.on.close()
        self.off.close()
        if self.peer:
            return
        self.collector.wait_closed(self.sent, seconds=60)
        batches = self.collector.sink.batches
        closed = [event for batch in batches for event in batch.closed]
        counted = sum(int(batch.segments_S["count"].sum()) for batch in batches)
        assert len(closed) == self.sent, f"{len(closed)} of {self.sent} requests were closed"
        assert counted == sum(event.total_tokens for event in closed), "the books do not balance"
        assert all(hello.armed for hello in self.collector.sink.hellos), self.collector.sink.hellos


def cells(model: str, mode: str, peer: str) -> Iterator[Cell]:
    for concurrency in CONCURRENCIES:
        for mix in MIXES:
            yield Cell(model, mode, concurrency, mix, peer)


def run(out: Path, chosen: list[str], runners: list[str], minutes: float) -> None:
    import torch
    import vllm
    from latentwatch import __version__

    deadline = time.monotonic() + 60 * minutes
    result: dict[str, Any] = {
        "what": "vLLM with CUDA graphs, the monitor on / off: the same waves in turn on two engines of one GPU",
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(),
        "versions": {
            "latentwatch": __version__,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "features": FEATURES,
        "hook_points": HOOK_POINTS,
        "peers_installed": [name for name in PEERS if importlib.util.find_spec(name)],
        "plugin_gpu_bytes": {},
        "rows": [],
    }
    if out.exists():
        before = json.loads(out.read_text())
        result["rows"], result["plugin_gpu_bytes"] = before["rows"], before["plugin_gpu_bytes"]
    for model in chosen:
        for mode in runners:
            for peer in ("", "eager-hooks"):
                done = {Cell(*(row[field] for field in Cell._fields)) for row in result["rows"]}
                left = [cell for cell in cells(model, mode, peer) if cell not in done]
                if not left or time.monotonic() > deadline:
                    continue
                with ExitStack() as stack:
                    bench = Bench(stack, model, mode, peer=peer)
                    if not peer:
                        result["plugin_gpu_bytes"][f"{model} {mode}"] = bench.memory_bytes()
                    for cell in left:
                        if time.monotonic() > deadline:
                            print(f"time is over; {cell} and what follows is left for the next run")
                            break
                        result["rows"].append(bench.row(cell, PAIRS))
                        print(result["rows"][-1], flush=True)
                        out.parent.mkdir(parents=True, exist_ok=True)
                        out.write_text(json.dumps(result, indent=1) + "\n")
                    bench.finish()


def check() -> None:
    """The whole path but the GPU: two CPU engines, the grid's smallest cell, the books; nothing is written."""
    MIXES["decode"] = (16, 8)
    with ExitStack() as stack:
        bench = Bench(stack, models.TINY, "default", peer="", check=True)
        row = bench.row(Cell(models.TINY, "default", 1, "decode", ""), 2)
        assert bench.memory_bytes() == 0, "a CPU engine holds no GPU memory"
        bench.finish()
    assert row["requests_with_equal_outputs"] == 1.0, "the monitor changed the model's output"
    fires = sum(len(batch.fires_N) for batch in bench.collector.sink.batches)
    rows = sum(batch.rows for batch in bench.collector.sink.batches)
    print(f"engine benchmark: checked on the CPU engine, {rows} tokens scored, {fires} fires; nothing was measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama", help="llama, moe or both, with a comma (default: %(default)s)")
    parser.add_argument("--runners", default="v2,v1", help="vLLM's model runners (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=600.0, help="start no further cell after this long")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--check", action="store_true", help="no GPU: the path on a CPU engine; writes nothing")
    options = parser.parse_args()
    if options.check:
        check()
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU: torch sees no CUDA device. Run it on a machine with one, or with --check.")
    names = {"llama": models.LLAMA_8B, "moe": models.MOE}
    run(options.out, [names[name] for name in options.models.split(",")], options.runners.split(","), options.minutes)


if __name__ == "__main__":
    main()
