"""The score op on a GPU against its floor and against PyTorch: `make bench-kernels-gpu` writes kernels-gpu.json.

    python -m tests.bench.kernels.run [--grid full|core] [--minutes N] [--out FILE]

Everything is timed as replays of a CUDA graph. Weights are cold, as they are in a server between two steps; the stream
is cold where it is larger than the cache could hold beside the model's own traffic, and else stands where the layer
before left it. A row is written when it is complete; with --minutes the run stops in time, and the next one goes on
where it stopped. `--check` runs the harness's own parts without a GPU and writes nothing.

Dimension key: T tokens, D d_model, K features at one hook point.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from latentwatch import __version__
from latentwatch.kernels import score_op, score_triton
from torch import Tensor

from tests.bench.kernels import baselines
from tests.bench.kernels.timing import Machine, Times, measure_machine, replayed, sets_needed
from tests.support.kernel_cases import assert_matches, make_case

RESULT = Path(__file__).parents[1] / "results" / "kernels-gpu.json"
WIDTHS, FEATURES, STEPS = (4096, 2048, 8192), (64, 256, 8, 1024), (8, 64, 2048, 8192, 1, 256)
"""In the order of what matters most, should the time be short."""
HOT_BYTES = 8 << 20
"""A stream up to this size is still in the second-level cache when the op reads it."""
FULL_WIDTH = 65536
"""Features of a whole SAE, for the encode that scoring a subset replaces."""


class Point(NamedTuple):
    d: int
    K: int
    T: int
    residual_add: bool


class Sets:
    """Input sets for one point: as many weights as make each cold, streams alike where they are large."""

    def __init__(self, point: Point) -> None:
        self.point = point
        weights = sets_needed(4 * point.K * point.d)
        stream_bytes = (4 if point.residual_add else 2) * point.T * point.d
        streams = 1 if stream_bytes <= HOT_BYTES else sets_needed(stream_bytes)
        self.cases = [
            make_case(point.T, point.d, point.K, dtype=torch.bfloat16, residual=point.residual_add, seed=seed).to(
                "cuda"
            )
            for seed in range(min(streams, 3))
        ]
        case = self.cases[0]
        hi_KD = case.w_KD.bfloat16()
        lo_KD = (case.w_KD - hi_KD.float()).bfloat16()
        self.hi = [hi_KD.clone() for _ in range(min(weights, 1024))]
        self.lo = [lo_KD.clone() for _ in self.hi]
        self.scratch = score_op.scratch(8192, [point.K], point.d, "cuda")
        self.act_TK = torch.full((point.T, point.K), float("nan"), device="cuda")
        self.stat_T3 = torch.full((point.T, 3), float("nan"), device="cuda")

    def calls(self, scorer: Callable[[Tensor, Tensor | None, int], object]) -> list[Callable[[], object]]:
        """One call per set; scorer(x_TD, residual_TD, index of the weights)."""

        def call(i: int) -> Callable[[], object]:
            case = self.cases[i % len(self.cases)]
            return lambda: scorer(case.x_TD, case.residual_TD, i % len(self.hi))

        return [call(i) for i in range(max(len(self.hi), len(self.cases)))]


def floor_us(point: Point, machine: Machine) -> float:
    """The least time for what the op does: read the stream and both terms of the rows once, write what it returns."""
    stream = (4 if point.residual_add else 2) * point.T * point.d
    moved = stream + 4 * point.K * point.d + 4 * point.T * (point.K + 3)
    return machine.floor_us(bytes_moved=moved, flops=2 * 2 * point.T * point.d * point.K)


def time_op(sets: Sets, variant: score_triton.Variant | None = None) -> Times:
    """The op as it is served, or one variant of its kernel with as much scratch as that one takes."""
    scratch = sets.scratch
    if variant is not None:
        scratch = torch.zeros(score_triton.COUNTERS + variant.scratch_words(sets.point.T, sets.point.K), device="cuda")

    def scorer(x_TD: Tensor, residual_TD: Tensor | None, i: int) -> None:
        arguments = (x_TD, residual_TD, sets.hi[i], sets.lo[i], sets.cases[0].scale_6K, sets.act_TK, sets.stat_T3)
        if variant is None:
            torch.ops.latentwatch.score(*arguments, scratch)
        else:
            score_triton.score(*arguments, scratch, variant)

    return replayed(sets.calls(scorer))


def time_baseline(sets: Sets, baseline: baselines.Scorer) -> Times:
    def scorer(x_TD: Tensor, residual_TD: Tensor | None, i: int) -> None:
        baseline(x_TD, residual_TD, sets.hi[i], sets.cases[0].scale_6K, sets.act_TK, sets.stat_T3)

    return replayed(sets.calls(scorer))


def time_full_encode(point: Point) -> Times:
    w_FD = torch.randn(FULL_WIDTH, point.d, device="cuda", dtype=torch.bfloat16)
    bias_F = torch.randn(FULL_WIDTH, device="cuda", dtype=torch.bfloat16)
    stream_TD = torch.randn(point.T, point.d, device="cuda", dtype=torch.bfloat16)
    return replayed([lambda: baselines.full_encode(stream_TD, w_FD, bias_F)])


def measure(point: Point, machine: Machine) -> dict[str, Any]:
    sets = Sets(point)
    case = sets.cases[0]
    torch.ops.latentwatch.score(
        case.x_TD, case.residual_TD, sets.hi[0], sets.lo[0], case.scale_6K, sets.act_TK, sets.stat_T3, sets.scratch
    )
    assert_matches(case, sets.act_TK, sets.stat_T3)
    ours = time_op(sets)
    others: dict[str, float] = {}
    for name, backends in (("compile_autotune", "ATEN,TRITON"), ("compile_triton", "TRITON")):
        with baselines.compiled(backends) as baseline:
            others[name] = time_baseline(sets, baseline).p50
    others["cublaslt_epilogue"] = time_baseline(sets, baselines.epilogue).p50
    others["eager"] = time_baseline(sets, baselines.plain).p50
    if point.K == 64 and point.T <= 2048:
        others["full_encode"] = time_full_encode(point).p50
    best = min(others["compile_autotune"], others["compile_triton"])
    floor = floor_us(point, machine)
    return {
        **point._asdict(),
        "p20_us": round(ours.p20, 3),
        "p50_us": round(ours.p50, 3),
        "p80_us": round(ours.p80, 3),
        "compile_p50_us": round(best, 3),
        "floor_us": round(floor, 3),
        "speedup_vs_compile": round(best / ours.p50, 3),
        "times_floor": round(ours.p50 / floor, 3),
        **{f"{name}_p50_us": round(value, 3) for name, value in others.items()},
    }


def grid(which: str) -> Iterator[Point]:
    for d in WIDTHS if which == "full" else WIDTHS[:1]:
        for K in FEATURES:
            for T in STEPS:
                yield Point(d, K, T, True)
    for K in FEATURES:
        for T in STEPS:
            yield Point(4096, K, T, False)


def run(out: Path, which: str, minutes: float) -> None:
    deadline = time.monotonic() + 60 * minutes
    machine = measure_machine()
    head = {
        "what": "the score op in CUDA graph replays, against its floor and against torch.compile max-autotune",
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(),
        "versions": {
            "latentwatch": __version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "launch_us": round(machine.launch_us, 3),
        "copy_tb_per_s": round(machine.bytes_per_us / 1e6, 3),
        "bf16_tflop_per_s": round(machine.flops_per_us / 1e6, 1),
    }
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    done = {Point(row["d"], row["K"], row["T"], row["residual_add"]) for row in rows}
    for point in grid(which):
        if point in done:
            continue
        if time.monotonic() > deadline:
            print(f"time is over; {point} and what follows is left for the next run")
            break
        rows.append(measure(point, machine))
        print(rows[-1], flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


def check() -> None:
    """What needs no GPU: the grid is whole, floors are those worked out by hand, baselines equal the reference."""
    full = list(grid("full"))
    assert len(full) == len(set(full)) == 3 * 4 * 6 + 4 * 6, "a point stands twice or is missing"
    h200 = Machine(launch_us=2.0, bytes_per_us=4.3e6, flops_per_us=790e6)
    assert floor_us(Point(4096, 64, 8, True), h200) == 2.0
    assert 31 < floor_us(Point(4096, 64, 8192, True), h200) < 33
    assert sets_needed(4 * 64 * 4096) == 128
    case = make_case(5, 64, 10, dtype=torch.float32)
    act_TK, stat_T3 = torch.empty(5, 10), torch.empty(5, 3)
    baselines.plain(case.x_TD, case.residual_TD, case.w_KD, case.scale_6K, act_TK, stat_T3)
    assert_matches(case, act_TK, stat_T3)
    print("kernel benchmark: harness checked without a GPU; nothing was measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=["full", "core"], default="full", help="core: d_model 4096 only")
    parser.add_argument("--minutes", type=float, default=600.0, help="start no further point after this long")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--check", action="store_true", help="no GPU: check the harness, measure and write nothing")
    options = parser.parse_args()
    if options.check:
        check()
    elif torch.cuda.is_available():
        run(options.out, options.grid, options.minutes)
    else:
        sys.exit("no GPU: torch sees no CUDA device. Run it on a machine with one, or with --check.")


if __name__ == "__main__":
    main()
