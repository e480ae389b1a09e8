"""The collector runs where no GPU stack is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["latentwatch.collector.service", "latentwatch.cli.collector", "latentwatch.export.metrics"]
)
def test_the_collector_side_imports_without_torch_triton_or_vllm(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'triton', 'vllm') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr
