"""compute-sanitizer over every shape of both kernels: stray accesses, and races within a program.

Races between programs (the partial sums, the compaction's offsets) it cannot see; those rest on the acquire and release
that the kernels state, and on the bit-for-bit repetitions in test_score.py and test_compact.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("no GPU tools: compute-sanitizer is not on the PATH")
    # A caching allocator would hide a store past the end of one tensor inside its neighbour.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--kernel-regex", "kns=_kernel", "--error-exitcode", "9"]
    finished = subprocess.run(
        [*command, sys.executable, "-m", "tests.gpu.exercise"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    report = finished.stdout[-6000:] + finished.stderr[-2000:]
    if "Device not supported" in report:
        pytest.skip("no GPU access for compute-sanitizer: the driver refuses it under this runtime")
    assert finished.returncode == 0 and "exercised" in finished.stdout, report
