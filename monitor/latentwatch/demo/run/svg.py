"""Elements of inline SVG for the demo's report: text in, text out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Final

WIDTH: Final = 1000.0
"""Of every drawing, in the units of its numbers; it scales with the page."""


def drawing(height: float, body: Iterable[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )


def element(tag: str, style: str, title: str = "", **numbers: float) -> str:
    """An SVG element with numeric attributes and, where given, a tooltip."""
    attributes = "".join(f' {name.replace("_", "-")}="{value:.2f}"' for name, value in numbers.items())
    return f'<{tag} class="{style}"{attributes}>{_tooltip(title)}</{tag}>'


def text_at(style: str, x: float, y: float, words: str, anchor: str = "start", title: str = "") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}{_tooltip(title)}</text>'
    )


def _tooltip(title: str) -> str:
    return f"<title>{escape(title)}</title>" if title else ""


def tick_at(x: float, top: float, bottom: float) -> str:
    return element("line", "axis", x1=x, x2=x, y1=top, y2=bottom)


def round_numbers(total: float) -> list[float]:
    """At most about eight round numbers from 0 to `total`."""
    step = 10 ** math.floor(math.log10(total / 8)) if total > 0 else 1.0
    step = next(step * factor for factor in (1, 2, 5, 10) if total / (step * factor) <= 8)
    return [round(i * step, 9) for i in range(int(total / step) + 1)]


def scale(values: Sequence[float], low: float, high: float) -> Callable[[float], float]:
    """A linear map of the values' range onto [low, high]; a range of one value sits in the middle."""
    least, most = min(values), max(values)
    if most == least:
        return lambda _: (low + high) / 2
    return lambda value: low + (high - low) * (value - least) / (most - least)


def cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
