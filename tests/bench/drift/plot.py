"""Draw drift.json as an SVG, without any plotting library: false pages on the nulls, delays on the drifts."""

from __future__ import annotations

import math
from typing import Any

WIDTH, ROW, LEFT = 560, 17, 250
COLOURS = {
    "latentwatch": "#1b6ca8", "CUSUM": "#d1495b", "CUSUM, hourly rates": "#e8899a", "Page-Hinkley": "#2e8b57",
    "PSI": "#7d5ba6", "KS": "#c47f17", "ADWIN": "#666",
}  # fmt: skip


def drawn(result: dict[str, Any]) -> str:
    """The whole SVG as text: one line per null or drift, one dot per detector, logarithmic."""
    nulls = [(r["name"], r["detector"], max(r["false_pages_per_month"], 0.1)) for r in result["nulls"]]
    drifts = [(r["name"], r["detector"], r["median_delay_minutes"]) for r in result["drifts"]]
    left, height = panel(nulls, "false pages a month, 256 features (0 drawn at 0.1)", 0.1, 1e5, 0)
    right, other = panel(drifts, "median delay, minutes (right edge: not found)", 0.1, 1e4, WIDTH + 40)
    height = max(height, other) + 60
    legend = "".join(
        f'<circle cx="{20 + 140 * i}" cy="{height - 18}" r="5" fill="{colour}"/>'
        f'<text x="{30 + 140 * i}" y="{height - 14}">{name}</text>'
        for i, (name, colour) in enumerate(COLOURS.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH + 40}" height="{height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f"{left}{right}{legend}</svg>\n"
    )


def panel(rows: list[tuple[str, str, float | None]], title: str, low: float, high: float, at: int) -> tuple[str, int]:
    names = list(dict.fromkeys(name for name, _, _ in rows))
    bottom = 40 + ROW * len(names)

    def x(value: float | None) -> float:
        share = 1.0 if value is None else math.log(min(max(value, low), high) / low) / math.log(high / low)
        return at + LEFT + share * (WIDTH - LEFT - 20)

    parts = [f'<text x="{at + LEFT}" y="16" font-size="13">{title}</text>']
    for decade in range(round(math.log10(low)), round(math.log10(high)) + 1):
        tick = x(10.0**decade)
        parts.append(f'<line x1="{tick:.1f}" x2="{tick:.1f}" y1="24" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{tick:.1f}" y="{bottom + 14}" text-anchor="middle">{10.0**decade:g}</text>')
    for line, name in enumerate(names):
        y = 36 + ROW * line
        parts.append(f'<text x="{at + LEFT - 8}" y="{y + 4}" text-anchor="end">{name}</text>')
        of_name = [(detector, value) for row, detector, value in rows if row == name]
        # Ours is drawn last, so that it is on top.
        for detector, value in reversed(of_name):
            parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="4.5" fill="{COLOURS[detector]}" opacity="0.85"/>')
    return "".join(parts), bottom + 20
