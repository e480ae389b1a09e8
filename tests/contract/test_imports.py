"""The collector runs where torch and vLLM are not installed; the engine's side loads no gRPC."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "latentwatch.collector.service",
        "latentwatch.exporter.process",
        "latentwatch.cli.collector",
        "latentwatch.export.metrics",
    ],
)
def test_no_torch_on_this_side_of_the_ring(module):
    assert not {"torch", "triton", "vllm", "transformers"} & loaded_by(module)


@pytest.mark.parametrize(
    "module", ["latentwatch.engines.vllm.plugin", "latentwatch.engines.vllm.attach", "latentwatch.handover.ring"]
)
def test_no_grpc_in_the_engine(module):
    assert "grpc" not in loaded_by(module)


def test_the_plugin_alone_loads_neither_torch_nor_vllm():
    """vLLM imports it in every process, before it knows whether it is wanted."""
    assert not {"torch", "vllm"} & loaded_by("latentwatch.engines.vllm.plugin")
