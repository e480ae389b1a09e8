"""The kernels compile for each generation of GPU and keep to its means. No GPU is needed: Triton brings ptxas along.

Every kind of shape is compiled here; `python -m tests.support.kernel_aot --all` reports on each one of the table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""What a program may take. For sm_80 the 99 KiB of its smaller sisters (sm_86, sm_89), which run the same code."""
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""The instruction of a tall tile; one of 16 rows takes mma.sync everywhere."""
REGISTERS_OF_A_PROCESSOR = 65536


@pytest.fixture(scope="module")
def builds() -> list[dict[str, Any]]:
    """In a process of its own: a kernel imported for the interpreter cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.kernel_aot"],
        cwd=Path(__file__).parents[3],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads(line) for line in finished.stdout.splitlines()]


def test_every_architecture_is_compiled_for(builds: list[dict[str, Any]]) -> None:
    assert {build["arch"] for build in builds} == set(SHARED_BYTES)
    assert len(builds) >= 12


def test_no_kernel_spills_a_register(builds: list[dict[str, Any]]) -> None:
    assert {f"{b['kernel']} sm_{b['arch']}": b["stack"] for b in builds if b["stack"]} == {}


def test_every_kernel_fits_a_processors_shared_memory_and_registers(builds: list[dict[str, Any]]) -> None:
    assert [b for b in builds if b["shared"] > SHARED_BYTES[b["arch"]]] == []
    assert [b for b in builds if b["registers"] * b["threads"] > REGISTERS_OF_A_PROCESSOR] == []


def test_half_precision_scores_are_multiplied_by_tensor_cores(builds: list[dict[str, Any]]) -> None:
    for build in builds:
        if build["kernel"].startswith(("score bfloat16", "score float16")):
            rows = int(build["kernel"].split()[3].split("x")[0])
            expected = MATRIX[build["arch"]] if rows >= 64 else "mma.sync"
            assert expected in build["matrix"], build


def test_no_product_is_rounded_to_tf32(builds: list[dict[str, Any]]) -> None:
    """tl.dot of float32 defaults to it, with errors near 3e-4."""
    assert [build for build in builds if build["tf32"]] == []
