"""The compaction kernel and the way to the host on a GPU.

Dimension key: T rows of the step, F features of all hook points.
"""

from __future__ import annotations

import time

import pytest
import torch
from latentwatch.kernels import compact, reference
from torch import Tensor


class Engine:
    """Score buffers of four hook points on the GPU, filled anew by each step."""

    def __init__(self, features: int, *, T_max: int = 8192, firing: float = 0.01, capacity: int = 1 << 18) -> None:
        widths = [features // 4] * 3 + [features - 3 * (features // 4)]
        self.rng = torch.Generator("cuda").manual_seed(features)
        self.firing, self.capacity = firing, capacity
        self.acts = [torch.zeros(T_max, K, device="cuda") for K in widths]
        self.stats = [torch.zeros(T_max, 3, device="cuda") for _ in widths]
        self.dense_F = torch.arange(features, device="cuda") % 16 == 3
        self.compactor = compact.Compactor(self.acts, self.stats, self.dense_F, capacity=capacity)

    def step(self) -> None:
        for act in self.acts:
            uniform = torch.rand(act.shape, generator=self.rng, device="cuda")
            act.copy_(torch.where(uniform < self.firing, torch.rand(act.shape, generator=self.rng, device="cuda"), 0.0))
        for stat in self.stats:
            stat.copy_(torch.rand(stat.shape, generator=self.rng, device="cuda"))

    def expected(self, rows: int) -> reference.Compacted:
        acts, stats = [act.cpu() for act in self.acts], [stat.cpu() for stat in self.stats]
        capacity = self.compactor.layout(rows).capacity
        return reference.compact(acts, stats, self.dense_F.cpu(), rows, capacity=capacity)


def assert_equal(found: reference.Compacted, expected: reference.Compacted) -> None:
    for name, a, b in zip(reference.Compacted._fields, found, expected, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
        else:
            assert a == b, name


@pytest.mark.parametrize("features", [8, 256, 1024])
@pytest.mark.parametrize("rows", [1, 8, 200, 2049, 8192])
def test_a_step_equals_the_reference(rows: int, features: int) -> None:
    engine = Engine(features)
    out = torch.empty(engine.compactor.layout(8192).words, dtype=torch.int32, device="cuda")
    for _ in range(3):
        engine.step()
        expected = engine.expected(rows)
        out.fill_(0x7FC07FC0)
        engine.compactor.run(rows, out)
        found, silent = engine.compactor.unpack(out.cpu(), rows)
        assert_equal(found, expected)
        assert not silent
    assert engine.compactor._work.eq(0).all()


@pytest.mark.parametrize("rows", [40, 1000])
def test_an_overflowing_step_equals_the_reference(rows: int) -> None:
    engine = Engine(256, T_max=1024, firing=0.5, capacity=3000)
    engine.step()
    expected = engine.expected(rows)
    out = torch.empty(engine.compactor.layout(rows).words, dtype=torch.int32, device="cuda")
    engine.compactor.run(rows, out)
    found, _ = engine.compactor.unpack(out.cpu(), rows)
    assert 0 < found.scored_rows < rows
    assert_equal(found, expected)


def test_every_run_gives_the_same_bytes() -> None:
    engine = Engine(1024)
    outs = []
    for _ in range(20):
        engine.rng.manual_seed(5)
        engine.step()
        outs.append(torch.zeros(engine.compactor.layout(8192).words, dtype=torch.int32, device="cuda"))
        engine.compactor.run(8192, outs[-1])
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_captured_compaction_reads_what_the_step_before_it_wrote() -> None:
    engine = Engine(64, T_max=512)
    engine.compactor.warm_up()
    out = torch.empty(engine.compactor.layout(512).words, dtype=torch.int32, device="cuda")
    engine.compactor.run(512, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.compactor.run(512, out)
    for _ in range(3):
        engine.step()
        expected = engine.expected(512)
        graph.replay()
        assert_equal(engine.compactor.unpack(out.cpu(), 512)[0], expected)


def test_steps_reach_the_host_whole_while_the_next_ones_overwrite_the_buffers() -> None:
    engine = Engine(256, T_max=2048)
    stream = torch.cuda.Stream()
    ways = [compact.Handover(engine.compactor, stream) for _ in range(3)]
    waiting: list[tuple[compact.Handover, reference.Compacted]] = []
    for step in range(12):
        engine.step()
        expected = engine.expected(100 + step)
        way = ways[step % 3]
        if len(waiting) == 3:
            assert_arrived(*waiting.pop(0))
        way.start(100 + step)
        for act in engine.acts:
            act.fill_(9.0)
        waiting.append((way, expected))
    for way, expected in waiting:
        assert_arrived(way, expected)


def assert_arrived(way: compact.Handover, expected: reference.Compacted) -> None:
    deadline = time.monotonic() + 10
    while not way.ready():
        assert time.monotonic() < deadline
    assert_equal(way.result()[0], expected)
