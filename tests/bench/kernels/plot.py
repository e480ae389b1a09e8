"""Draw kernels-gpu.json as an SVG, without any plotting library: `python -m tests.bench.kernels.plot [JSON] [SVG]`.

Left: the op's median against its floor. Right: how many times faster than the better of two torch.compile baselines.
One line per number of features, for d_model 4096 with the residual add.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from tests.bench.kernels.run import RESULT

WIDTH, HEIGHT, MARGIN = 420, 300, 50
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#7d5ba6")
D_MODEL = 4096


def drawn(result: dict[str, Any]) -> str:
    """The whole SVG as text."""
    rows = [row for row in result["rows"] if row["d"] == D_MODEL and row["residual_add"]]
    panels = [
        panel(rows, "times_floor", "times its floor", 0),
        panel(rows, "speedup_vs_compile", "times faster than torch.compile", WIDTH),
    ]
    title = f"score op, d_model {D_MODEL}, x + residual, {result['hardware']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{HEIGHT + 30}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{WIDTH}" y="18" text-anchor="middle" font-size="13">{title}</text>{"".join(panels)}</svg>\n'
    )


def panel(rows: list[dict[str, Any]], column: str, label: str, left: int) -> str:
    steps = sorted({row["T"] for row in rows})
    widest = max((row[column] for row in rows), default=1.0)
    top = max(2, math.ceil(widest))

    def x(T: int) -> float:
        return left + MARGIN + steps.index(T) * (WIDTH - 2 * MARGIN) / max(1, len(steps) - 1)

    def y(value: float) -> float:
        return 30 + (HEIGHT - MARGIN) * (1 - value / top)

    parts = [f'<text x="{left + WIDTH / 2}" y="{HEIGHT + 22}" text-anchor="middle">tokens in the step; {label}</text>']
    for tick in range(0, top + 1, max(1, top // 6)):
        ends = f'x1="{left + MARGIN}" x2="{left + WIDTH - MARGIN}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
        parts.append(f'<line {ends} stroke="#ddd"/>')
        parts.append(f'<text x="{left + MARGIN - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    parts += [f'<text x="{x(T):.1f}" y="{HEIGHT - 4}" text-anchor="middle">{T}</text>' for T in steps]
    for colour, K in zip(COLOURS, sorted({row["K"] for row in rows}), strict=False):
        line = sorted((row["T"], row[column]) for row in rows if row["K"] == K)
        points = " ".join(f"{x(T):.1f},{y(value):.1f}" for T, value in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        last_T, last = line[-1]
        parts.append(f'<text x="{x(last_T) + 4:.1f}" y="{y(last) + 4:.1f}" fill="{colour}">K {K}</text>')
    return "".join(parts)


def main(arguments: list[str]) -> None:
    source = Path(arguments[0]) if arguments else RESULT
    target = Path(arguments[1]) if len(arguments) > 1 else source.with_suffix(".svg")
    target.write_text(drawn(json.loads(source.read_text())))
    print(f"wrote {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
