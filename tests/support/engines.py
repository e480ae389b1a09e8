"""Running real engines from tests: the subprocess, its environment, and its outcome as values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class EngineResult:
    """What an engine run gave."""

    outputs: list[list[int]]
    metrics: dict[str, float]
    start_seconds: float
    wave_seconds: list[float]
    log: str


def cache_root() -> Path:
    """vLLM's compile cache for the tests: kept between runs, so that only the first one compiles."""
    return Path(os.environ.get("LATENTWATCH_TEST_CACHE", ROOT / ".cache")) / "vllm"


def run_engine(
    folder: Path,
    *,
    engine: dict[str, Any],
    waves: list[list[dict[str, Any]]],
    env: dict[str, str] | None = None,
    cache: Path | None = None,
    timeout: float = 400.0,
) -> EngineResult:
    """Run one engine to its end. Raises AssertionError with the log's tail where it failed."""
    job, result, log = folder / "job.json", folder / "result.json", folder / "engine.log"
    result.unlink(missing_ok=True)
    environment = {"VLLM_CACHE_ROOT": str(cache or cache_root()), **(env or {})}
    job.write_text(json.dumps({"engine": engine, "waves": waves, "env": environment}))
    with log.open("w") as output:
        code = subprocess.run(
            [sys.executable, "-m", "tests.support.engine_run", str(job), str(result)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        ).returncode
    text = log.read_text(errors="replace")
    assert result.exists(), f"engine ended with code {code} and no result:\n{text[-6000:]}"
    return EngineResult(log=text, **json.loads(result.read_text()))


def random_prompts(
    count: int, *, vocabulary: int, longest: int, seed: int, max_tokens: int = 16
) -> list[dict[str, Any]]:
    """Distinct prompts of many lengths, as engine_run takes them."""
    rng = np.random.default_rng(seed)
    return [
        {"prompt": rng.integers(3, vocabulary, size=int(n)).tolist(), "max_tokens": max_tokens}
        for n in rng.integers(3, longest, size=count)
    ]
