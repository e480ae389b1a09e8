"""Times of CUDA work as a server sees it: replays of a graph, cold weights, medians and spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

LAUNCHES = 20
"""Calls per graph: enough that the graph's own start is a small part, few enough that a replay stays short."""
REPLAYS = 60
COLD_BYTES = 128 << 20
"""More than twice an H200's second-level cache: what was read that many bytes ago must come from memory."""


class Times(NamedTuple):
    """Microseconds of one call."""

    p20: float
    p50: float
    p80: float


def replayed(calls: Sequence[Callable[[], object]]) -> Times:
    """Time the calls back to back inside one CUDA graph, as many in turn as there are input sets.

    Each sample is a replay of at least LAUNCHES calls, divided by their number, so that a sample is the mean of that
    many calls and the percentiles are over replays.
    """
    sequence = [calls[i % len(calls)] for i in range(max(LAUNCHES, len(calls)))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in sequence:
            call()
    for _ in range(3):
        graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for began, ended in marks:
        began.record()
        graph.replay()
        ended.record()
    torch.cuda.synchronize()
    samples = torch.tensor([began.elapsed_time(ended) * 1000 / len(sequence) for began, ended in marks])
    return Times(*(float(samples.quantile(q)) for q in (0.2, 0.5, 0.8)))


def sets_needed(bytes_of_one: int) -> int:
    """How many input sets make each of them cold again by the time its turn comes."""
    return max(1, -(-COLD_BYTES // max(1, bytes_of_one)))


class Machine(NamedTuple):
    """The three ceilings of this GPU, measured in this run."""

    launch_us: float
    bytes_per_us: float
    flops_per_us: float

    def floor_us(self, *, bytes_moved: int, flops: int) -> float:
        return max(self.launch_us, bytes_moved / self.bytes_per_us, flops / self.flops_per_us)


def measure_machine() -> Machine:
    """An empty kernel, a copy far larger than the cache (bytes read and written), a large bfloat16 product."""
    tiny = torch.zeros(1, device="cuda")
    launch_us = replayed([lambda: tiny.add_(1.0)]).p50
    return Machine(launch_us, _copied_bytes_per_us(2 << 30), _product_flops_per_us(8192))


def _copied_bytes_per_us(size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / replayed([lambda: target.copy_(source)]).p50


def _product_flops_per_us(n: int) -> float:
    # Random operands: a product of zeros runs measurably faster than any real one.
    left, right = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * n**3 / replayed([lambda: torch.mm(left, right, out=out)]).p50
