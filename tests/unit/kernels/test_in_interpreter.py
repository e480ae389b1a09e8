"""Runs the tests under `interpreted/` in a process of their own: TRITON_INTERPRET must be set before the kernels are
imported, and an interpreted kernel cannot be compiled in the same process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("kernel", ["score_kernel", "compact_kernel"])
def test_interpreted_kernels_match_their_references(kernel: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "interpreted" / f"{kernel}.py"],
        cwd=HERE.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
