"""Time candidate shapes of the score kernel and print the best for each row of its table.

    python -m tests.bench.kernels.sweep [--minutes N] [--out FILE]

`latentwatch.kernels.score_triton.TABLE` is edited by hand from what this prints: nothing is tuned while serving.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from latentwatch.kernels import score_triton

from tests.bench.kernels.run import Point, Sets, floor_us, time_op
from tests.bench.kernels.timing import measure_machine

D = 4096
STEPS = {8: 16, 64: 64, 256: 256, 1024: 1024, 2048: 2048, 8192: 1 << 30}
"""Tokens to time at, and the row of the table that they stand for."""
SHARED_BYTES = 227 << 10


def candidates(T: int, K: int) -> Iterator[score_triton.Variant]:
    """Around what could work: at most some 4 waves of programs, a tile that the registers hold."""
    tall = (16,) if T <= 16 else (16, 32, 64, 128)
    for block_t, block_k, block_d, split in itertools.product(tall, (16, 32, 64, 128), (32, 64, 128), (1, 2, 4, 8, 16)):
        tiles = score_triton.ceil_div(T, block_t) * score_triton.ceil_div(K, block_k)
        wide = block_t * block_k
        if block_k > max(16, K) or wide > 128 * 128 or not 32 <= tiles * split <= 1100:
            continue
        warps = 8 if wide >= 64 * 64 else 4
        for stages in (3, 4):
            shape = score_triton.Variant(block_t, block_k, block_d, split, warps, stages)
            if stages * 4 * block_d * (block_t + block_k) <= SHARED_BYTES and shape == shape.fit(K, D, split=True):
                yield shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU: torch sees no CUDA device")
    deadline = time.monotonic() + 60 * options.minutes
    machine = measure_machine()
    found: dict[str, list[tuple[float, score_triton.Variant]]] = {}
    points = [(T, K) for K in (64, 256, 1024) for T in STEPS]
    for place, (T, K) in enumerate(points):
        point = Point(D, K, T, True)
        sets = Sets(point)
        now = score_triton.choose(T, K, D, split=True)
        times = [(time_op(sets, now).p50, now)]
        share = time.monotonic() + (deadline - time.monotonic()) / (len(points) - place)
        for shape in candidates(T, K):
            if time.monotonic() > share:
                break
            try:
                times.append((time_op(sets, shape).p50, shape))
            except Exception as error:  # a shape that does not compile or fit is one candidate less
                print(f"# {shape}: {type(error).__name__}", file=sys.stderr)
        table_us = times[0][0]
        times.sort()
        found[f"T<={STEPS[T]} K<={K}"] = times[:5]
        best_us, best = times[0]
        ratio = best_us / floor_us(point, machine)
        print(f"T {T:5d} K {K:5d}: {best_us:8.2f} us ({ratio:.2f} x floor) {tuple(best)}; table: {table_us:.2f} us")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
