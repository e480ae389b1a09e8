"""Compile the GPU kernels ahead of time, without a GPU, and report what each takes. Run as a script: JSON lines out.

    python -m tests.support.kernel_aot [--arch 80,90,100] [--all]

Needs a process without TRITON_INTERPRET. What is read: registers and stack from cuobjdump (a stack frame is a spill),
shared memory from Triton, the kind of matrix instruction from the PTX.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from monitor.kernels import score

EXTRA = {}
WIDTHS = (2048, 4096, 5120, 8192)
FEATURES = (8, 64, 256, 1024)
STEPS = (1, 64, 256, 1024, 2048, 8192)
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Build(NamedTuple):
    """One kernel as one set of compile-time arguments makes it."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int


def score_build(
    shape: score.Variant, D: int, *, dtype: torch.dtype = torch.bfloat16, residual: bool = True, lo: bool = True
) -> Build:
    function = score._score_kernel
    constants: dict[str, Any] = score.constants(shape, D, dtype) | {"INTERPRETED": False}
    signature = dict.fromkeys(function.arg_names, "*fp32")
    signature |= {"x_ptr": POINTER[dtype], "residual_ptr": POINTER[dtype], "hi_ptr": "*bf16", "lo_ptr": "*bf16"}
    signature |= {"T": "i32", "K": "i32", "x_stride": "i32", "residual_stride": "i32"}
    for name, present in (("residual_ptr", residual), ("lo_ptr", lo), ("scratch_ptr", shape.split > 1)):
        if not present:
            constants[name] = None
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"score D{D} {'x'.join(map(str, shape[:4]))} w{shape.warps} s{shape.stages} {str(dtype)[6:]}"
    name += "" if residual else " summed"
    return Build(name + ("" if lo else " hi"), function, signature, constants, shape.warps, shape.stages)


def compiled(build: Build, arch: int) -> dict[str, Any]:
    """Compile for sm_<arch>; the arguments are marked as a launch would specialise them."""
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(build.function.arg_names)
        if build.signature[name].startswith("*") or name.endswith("stride") or name == "K"
    }
    kernel = triton.compile(
        ASTSource(fn=build.function, signature=build.signature, constexprs=build.constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": True, **EXTRA},
    )
    ptx = kernel.asm["ptx"]
    registers, stack = resources(kernel.asm["cubin"])
    return {
        "kernel": build.name,
        "arch": arch,
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "matrix": sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx))),
        "tf32": "tf32" in ptx,
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread)"""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def every_build() -> Iterator[Build]:
    shapes = {
        score.choose(T, K, D, split=split) for T in STEPS for K in FEATURES for D in WIDTHS for split in (True, False)
    }
    for shape in sorted(shapes | {score.INVARIANT.fit(K, 4096, split=False) for K in FEATURES}):
        yield score_build(shape, 4096)
        yield score_build(shape, 4096, residual=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="80,90,100")
    parser.add_argument("--match", default="")
    options = parser.parse_args()
    for build in every_build():
        for arch in map(int, options.arch.split(",")):
            if options.match in build.name:
                print(json.dumps(compiled(build, arch)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
