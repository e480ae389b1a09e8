"""Inline SVG for the demo's report: text in, text out; colours come from the page's CSS variables.

Every plot is `svg.WIDTH` units wide and scales with the page. Numbers in the path data are in those units.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from latentwatch.demo.run.svg import WIDTH, cut, drawing, element, round_numbers, scale, text_at, tick_at

LEFT: Final = 250.0
"""Where the time axis begins; labels stand left of it."""
RIGHT: Final = WIDTH - 16.0
LABEL_CHARACTERS: Final = 28
"""What fits left of LEFT at the page's label size; a lane's smaller type takes LANE_CHARACTERS."""
LANE_CHARACTERS: Final = 31
AXIS: Final = 30.0
"""Height of the time axis below the rows."""


@dataclass(frozen=True)
class Span:
    """A time axis from 0 to `seconds`, with the incident shaded from `begin` to `end` (seconds on the axis)."""

    seconds: float
    begin: float
    end: float

    def x(self, at: float) -> float:
        return LEFT + (RIGHT - LEFT) * min(max(at / self.seconds, 0.0), 1.0)


@dataclass(frozen=True)
class Dot:
    """One request in a strip: when, how strong, whether it was feared, whether it went over the limit, its tooltip."""

    at: float
    value: float
    feared: bool
    over: bool
    title: str


@dataclass(frozen=True)
class Strip:
    """The requests' scores on one feature, above and below its limit."""

    label: str
    detail: str
    limit: float
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Lane:
    """One feature's firing rate (0 to 1) in equal time bins."""

    label: str
    detail: str
    rates: Sequence[float]


@dataclass(frozen=True)
class Part:
    """A part of a bar: CSS class, name, tokens."""

    style: str
    name: str
    tokens: int


@dataclass(frozen=True)
class Event:
    """A moment on the way from token to page, in seconds after the first."""

    at: float
    name: str
    detail: str


def strips(rows: Sequence[Strip], span: Span) -> str:
    """One strip of dots per feature, the limit as a line; the incident is shaded through all of them."""
    height, gap = 84.0, 10.0
    bottom = len(rows) * (height + gap) - gap
    tops = [i * (height + gap) for i in range(len(rows))]
    body = [element("rect", "panel", x=LEFT, y=top, width=RIGHT - LEFT, height=height) for top in tops]
    body.append(_incident("incident", span, 0.0, bottom))
    for row, top in zip(rows, tops, strict=True):
        y = scale([dot.value for dot in row.dots] + [row.limit], top + height - 7, top + 7)
        limit = y(row.limit)
        # The limit's own text goes where there is room for it.
        text_y = limit - 4 if limit - top > 20 else limit + 14
        body += _row_label(row.label, row.detail, top + height / 2)
        body.append(element("line", "limit", x1=LEFT, x2=RIGHT, y1=limit, y2=limit))
        body.append(text_at("small limit-text", LEFT + 6, text_y, f"limit {row.limit:.3g}"))
        # Feared requests last, so that they are not hidden under ordinary ones.
        for dot in sorted(row.dots, key=lambda dot: (dot.feared, dot.over)):
            style = f"dot {'feared' if dot.feared else 'ordinary'}{' over' if dot.over else ''}"
            radius = 4.0 if dot.over else 3.0
            body.append(element("circle", style, dot.title, cx=span.x(dot.at), cy=y(dot.value), r=radius))
    body += _time_axis(span, bottom)
    return drawing(bottom + AXIS, body, "Scores of every request over time, by feature")


def lanes(rows: Sequence[Lane], span: Span) -> str:
    """A heat map: one row per feature, shaded by its firing rate relative to its own highest."""
    height, first = 17.0, 16.0
    bottom = first + len(rows) * height
    body = [_incident("bracket", span, 4.0, 6.0)]
    for i, row in enumerate(rows):
        top = first + i * height
        width = (RIGHT - LEFT) / max(1, len(row.rates))
        highest = max(row.rates, default=0.0)
        body.append(
            text_at(
                "lane", LEFT - 10, top + 12.5, cut(row.label, LANE_CHARACTERS), "end", f"{row.label} · {row.detail}"
            )
        )
        body += [
            element(
                "rect",
                "heat",
                f"{row.label}: {rate:.1%} of tokens",
                x=LEFT + j * width,
                y=top + 1,
                width=width - 0.6,
                height=height - 2,
                fill_opacity=0.15 + 0.85 * rate / highest,
            )
            for j, rate in enumerate(row.rates)
            if rate > 0
        ]
    body += _time_axis(span, bottom)
    return drawing(bottom + AXIS, body, "Firing rate of the watched features over time")


def bars(rows: Sequence[tuple[str, Sequence[Part]]]) -> str:
    """Stacked bars on one common scale; the tokens stand in the parts that are wide enough."""
    height, gap = 34.0, 10.0
    totals = [sum(part.tokens for part in parts) for _, parts in rows]
    units = (RIGHT - LEFT) / max([*totals, 1])
    body = []
    for i, ((label, parts), total) in enumerate(zip(rows, totals, strict=True)):
        top, left = i * (height + gap), LEFT
        body += _row_label(label, f"{total:,} tokens", top + height / 2)
        for part in parts:
            width = part.tokens * units
            title = f"{part.name} {part.tokens:,}"
            body.append(element("rect", f"part {part.style}", title, x=left, y=top, width=width, height=height))
            # 8 units a letter is the widest that this type runs.
            if width > 8 * len(title) + 16:
                body.append(text_at("on-part", left + 10, top + 22, title))
            left += width
    return drawing(len(rows) * (height + gap), body, "Tokens that vLLM fed and what became of them")


def timeline(events: Sequence[Event]) -> str:
    """Events on a line of seconds; labels go to four heights in turn, so that close ones do not touch."""
    if not events:
        return ""
    middle, left, right = 84.0, 24.0, WIDTH - 24.0
    total = max(event.at for event in events) or 1.0
    units = (right - left) / total
    body = [element("line", "axis", x1=left, x2=right, y1=middle, y2=middle)]
    body += [tick_at(left + tick * units, middle - 4, middle + 4) for tick in round_numbers(total)]
    for i, event in enumerate(events):
        x = left + event.at * units
        anchor = "start" if x < WIDTH * 0.35 else "end" if x > WIDTH * 0.65 else "middle"
        stem, text_y = ((-14, -20), (16, 32), (-44, -50), (46, 62))[i % 4]
        body += [
            element("line", "stem", x1=x, x2=x, y1=middle, y2=middle + stem),
            element("circle", "moment", cx=x, cy=middle, r=5.0),
            text_at("event", x, middle + text_y, f"{event.name}  {event.detail}", anchor),
        ]
    return drawing(160.0, body, "From the first anomalous token to the page")


def _incident(style: str, span: Span, y: float, height: float) -> str:
    begin, end = span.x(span.begin), span.x(span.end)
    return element("rect", style, "the incident", x=begin, y=y, width=end - begin, height=height)


def _row_label(label: str, detail: str, middle: float) -> list[str]:
    """Up to two lines of the label over one of detail, centred on `middle`."""
    lines = textwrap.wrap(label, LABEL_CHARACTERS, max_lines=2, placeholder="…")
    first = middle + 6 - 9 * len(lines)
    texts = [text_at("label", LEFT - 12, first + 17 * i, line, "end", label) for i, line in enumerate(lines)]
    return [*texts, text_at("small muted", LEFT - 12, first + 17 * len(lines), cut(detail, LANE_CHARACTERS), "end")]


def _time_axis(span: Span, top: float) -> list[str]:
    body = [element("line", "axis", x1=LEFT, x2=RIGHT, y1=top, y2=top)]
    for tick in round_numbers(span.seconds):
        body.append(tick_at(span.x(tick), top, top + 5))
        body.append(text_at("small muted", span.x(tick), top + 19, f"{tick:g} s", "middle"))
    return body
