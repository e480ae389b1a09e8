"""Compile the GPU kernels ahead of time, without a GPU, and report what each takes. JSON lines out.

    python -m tests.support.kernel_aot [--all] [--arch 80,90,100] [--match TEXT]

Needs a process without TRITON_INTERPRET. Registers and stack are what cuobjdump reads from the machine code (a stack
frame is a spill), shared memory what Triton asks for, the kind of matrix instruction what stands in the PTX.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from latentwatch.kernels import compact, score_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WIDTHS = (2048, 4096, 5120, 8192)
FEATURES = (8, 64, 256, 1024)
STEPS = (1, 64, 256, 1024, 2048, 4096, 8192)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Build(NamedTuple):
    """One kernel as one set of compile-time arguments makes it."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def score_build(
    shape: score_triton.Variant, D: int, *, dtype: torch.dtype = torch.bfloat16, residual: bool = True, lo: bool = True
) -> Build:
    function = score_triton._score_kernel
    constants: dict[str, Any] = {**score_triton.constants(shape, D, dtype)}
    signature = dict.fromkeys(function.arg_names, "*fp32")
    signature |= {"x_ptr": POINTERS[dtype], "residual_ptr": POINTERS[dtype], "hi_ptr": "*bf16", "lo_ptr": "*bf16"}
    signature |= {"T": "i32", "K": "i32", "x_stride": "i32", "residual_stride": "i32"}
    for name, present in (("residual_ptr", residual), ("lo_ptr", lo), ("scratch_ptr", shape.split > 1)):
        if not present:
            constants[name] = None
    name = (
        f"score {str(dtype).removeprefix('torch.')} D{D} {'x'.join(map(str, shape[:4]))} w{shape.warps} s{shape.stages}"
    )
    name += (" x+residual" if residual else " summed") + (" hi+lo" if lo else " hi")
    return Build(
        name, function, signature | dict.fromkeys(constants, "constexpr"), constants, {**score_triton.options(shape)}
    )


def compact_build(F: int, P: int, H: int, rows: int) -> Build:
    acts = [torch.zeros(8, F // H) for _ in range(H)]
    stats = [torch.zeros(8, 3) for _ in range(H)]
    compactor = compact.Compactor(acts, stats, torch.arange(F) < P, capacity=1 << 16)
    function = compact._compact_kernel
    constants: dict[str, Any] = dict(compactor.constants(rows))
    signature = {name: "*i32" if name.endswith("_ptr") else "i32" for name in function.arg_names}
    signature |= {"column_ptr": "*i64", "stat_ptr": "*i64"} | dict.fromkeys(constants, "constexpr")
    name = f"compact F{F} P{P} H{H} {constants['BLOCK_R']}x{constants['BLOCK_F']}"
    return Build(name, function, signature, constants, {**compact.OPTIONS})


def compiled(build: Build, arch: int) -> dict[str, Any]:
    """Compile for sm_<arch>, with the arguments marked as a launch would specialise them."""
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(build.function.arg_names)
        if build.signature[name].startswith("*") or name.endswith("stride") or name == "K"
    }
    kernel = triton.compile(
        ASTSource(fn=build.function, signature=build.signature, constexprs=build.constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options=build.options,
    )
    registers, stack = resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return {
        "kernel": build.name,
        "arch": arch,
        "threads": 32 * build.options["num_warps"],
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "matrix": sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx))),
        "tf32": "tf32" in ptx,
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of stack of a thread)"""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def sample(arch: int) -> Iterator[Build]:
    """Every kind of shape once, for tests that run at each change."""
    yield score_build(score_triton.choose(8, 64, 4096, split=True, capability=arch), 4096)
    yield score_build(score_triton.choose(8192, 64, 4096, split=True, capability=arch), 4096)
    yield score_build(score_triton.choose(8192, 1024, 4096, split=True, capability=arch), 4096, residual=False)
    if arch == 90:
        half = score_triton.choose(300, 256, 4096, split=True, dtype=torch.float16, capability=arch)
        yield score_build(half, 4096, dtype=torch.float16)
        yield score_build(
            score_triton.choose(300, 64, 2304, split=True, dtype=torch.float32), 2304, dtype=torch.float32
        )
        yield score_build(score_triton.INVARIANT.fit(64, 4096, split=False), 4096, lo=False)
        yield compact_build(256, 16, 4, 256)


def everything(arch: int) -> Iterator[Build]:
    """Every shape that the table can give for the benchmark's grid."""
    for D in WIDTHS:
        for shape in _shapes(D, torch.bfloat16, arch):
            for residual in (True, False):
                yield score_build(shape, D, residual=residual)
                if D == 4096:
                    yield score_build(shape, D, residual=residual, lo=False)
    for shape in _shapes(4096, torch.float16, arch):
        for residual in (True, False):
            yield score_build(shape, 4096, residual=residual, dtype=torch.float16)
    for shape in _shapes(4096, torch.float32, arch):
        yield score_build(shape, 4096, dtype=torch.float32)
    for F, P, H in ((8, 0, 1), (256, 16, 4), (1024, 64, 8)):
        for rows in (256, 4096, 8192, 65536):
            yield compact_build(F, P, H, rows)


def _shapes(D: int, dtype: torch.dtype, arch: int) -> list[score_triton.Variant]:
    return sorted(
        {
            score_triton.choose(T, K, D, split=split, dtype=dtype, invariant=invariant, capability=arch)
            for T in STEPS
            for K in FEATURES
            for split in (True, False)
            for invariant in (True, False)
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every shape of the table instead of one of each kind")
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities (default: %(default)s)")
    parser.add_argument("--match", default="", help="only kernels whose name holds this text")
    options = parser.parse_args()
    for arch in map(int, options.arch.split(",")):
        for build in (everything if options.all else sample)(arch):
            if options.match in build.name:
                print(json.dumps(compiled(build, arch)), flush=True)


if __name__ == "__main__":
    main()
