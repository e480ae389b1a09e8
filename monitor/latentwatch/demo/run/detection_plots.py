"""The plots by which a detector is judged: scores by class, ROC, what limits promised, and the tokens of a page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

import numpy as np

from latentwatch.arrays import F64
from latentwatch.demo.run.detection import HeatMap
from latentwatch.demo.run.svg import WIDTH, drawing, element, round_numbers, scale, text_at, tick_at
from latentwatch.demo.smollm2 import figures

LEFT: Final = 60.0
BINS: Final = 40
LEAST_RATE: Final = 1e-3
"""Where the logarithmic axes begin; rates below, zero included, stand there."""
DEEPEST: Final = 65
"""Per cent of colour behind the hottest token: more of it would hide the text."""
_ROW: Final = 132.0
_SQUARE: Final = 260.0


@dataclass(frozen=True)
class Classes:
    """Scores of one detector: of the incident's requests of its concern, and of ordinary ones."""

    label: str
    detail: str
    limit: float
    positive_P: F64
    negative_N: F64


@dataclass(frozen=True)
class Curve:
    """A detector and what it is compared with, in one ROC panel. Curves are (false, true) positive rates."""

    label: str
    ours: Sequence[tuple[float, float]]
    text: Sequence[tuple[float, float]]
    limit_rates: tuple[float, float]
    """Where the limit lies: false and true positive rate."""


@dataclass(frozen=True)
class Promise:
    """A threshold that promised to be exceeded by a share of ordinary requests, and how many of a run did."""

    label: str
    rate: float
    above: int
    requests: int


def distributions(rows: Sequence[Classes]) -> str:
    """Two histograms back to back for each detector: the incident above the line, ordinary requests below."""
    body = []
    for number, row in enumerate(rows):
        top = number * (_ROW + 44)
        body += _distribution(row, top)
    return drawing(len(rows) * (_ROW + 44), body, "Scores of ordinary requests and of the incident's, by detector")


def _distribution(row: Classes, top: float) -> list[str]:
    values = np.concatenate([row.positive_P, row.negative_N, [row.limit]])
    low, high = float(values.min()), float(values.max())
    x = scale([low, high], LEFT, WIDTH - 16)
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low - 1, low + 1])
    middle, half = top + 22 + _ROW / 2, _ROW / 2 - 4
    body = [
        text_at("label", LEFT, top + 14, row.label),
        text_at("small muted", WIDTH - 16, top + 14, row.detail, "end"),
        element("line", "axis", x1=LEFT, x2=WIDTH - 16, y1=middle, y2=middle),
    ]
    for style, name, scores, direction in (
        ("feared", "of the incident", row.positive_P, -1),
        ("ordinary", "ordinary", row.negative_N, 1),
    ):
        counts = np.histogram(scores, edges)[0]
        # Each class has a height of its own: there are many more ordinary requests.
        heights = half * counts / max(1, counts.max(initial=0))
        body += [
            element(
                "rect",
                f"bar {style}",
                f"{count} {name}, {left:.2f} to {right:.2f}",
                x=x(left),
                width=max(0.5, x(right) - x(left) - 0.8),
                y=middle - height if direction < 0 else middle,
                height=height,
            )
            for count, height, left, right in zip(
                counts.tolist(), heights.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True
            )
            if count
        ]
    at = x(row.limit)
    body.append(element("line", "limit", x1=at, x2=at, y1=top + 22, y2=top + 22 + _ROW))
    anchor = "end" if at > WIDTH * 0.7 else "start"
    body.append(
        text_at("small limit-text", at + (-6 if anchor == "end" else 6), top + 34, f"limit {row.limit:.3g}", anchor)
    )
    for value in _ticks(low, high):
        body.append(tick_at(x(value), middle + half + 4, middle + half + 8))
        body.append(text_at("small muted", x(value), middle + half + 22, f"{value:g}", "middle"))
    return body


def roc(curves: Sequence[Curve]) -> str:
    """A panel for each detector: true positives over the logarithm of false ones, beside the text baseline."""
    body = []
    for number, curve in enumerate(curves):
        left = LEFT + number * (_SQUARE + 62)
        body += _frame(left, curve.label, y_ticks=True)
        body.append(_path("curve text", [_rates(left, *point) for point in _steps(curve.text)]))
        body.append(_path("curve ours", [_rates(left, *point) for point in _steps(curve.ours)]))
        at, y = _rates(left, *curve.limit_rates)
        false, true = curve.limit_rates
        body.append(
            element("circle", "moment", f"the limit: {true:.0%} caught at {false:.1%} false", cx=at, cy=y, r=5.0)
        )
    return drawing(_SQUARE + 72, body, "Share of the incident that is caught at each false-positive rate")


def promises(rows: Sequence[Sequence[Promise]]) -> str:
    """A panel for each detector: what share of ordinary requests went over a threshold, over what it promised."""
    body = []
    for number, row in enumerate(rows):
        left = LEFT + number * (_SQUARE + 62)
        body += _frame(left, row[0].label, y_ticks=False)
        ends = [_log_log(left, LEAST_RATE, LEAST_RATE), _log_log(left, 1.0, 1.0)]
        body.append(_path("curve promise", ends))
        for promise in row:
            low, high = figures.wilson(promise.above, promise.requests)
            seen = promise.above / promise.requests if promise.requests else 0.0
            x, y = _log_log(left, promise.rate, seen)
            bar = [_log_log(left, promise.rate, share)[1] for share in (low, high)]
            said = (
                f"promised {promise.rate:.1%}, seen {promise.above} of {promise.requests}, 95 % {low:.1%} to {high:.1%}"
            )
            body.append(element("line", "interval", x1=x, x2=x, y1=bar[0], y2=bar[1]))
            body.append(element("circle", "dot ordinary over", said, cx=x, cy=y, r=4.0))
    return drawing(_SQUARE + 72, body, "False-positive rates that thresholds promised, and those that were seen")


def heat_map(heat: HeatMap) -> str:
    """The tokens of a request, each shaded by how far its logit reaches towards the largest."""
    known = [token.logit for token in heat.tokens if token.logit is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    spans = []
    for token in heat.tokens:
        if token.logit is None:
            spans.append(f'<span class="muted">{escape(token.text)}</span>')
            continue
        strength = (token.logit - low) / (high - low) if high > low else 0.0
        spans.append(
            f'<span style="background:color-mix(in srgb, var(--heat) {DEEPEST * strength:.0f}%, transparent)" '
            f'title="{token.logit:.2f}">{escape(token.text)}</span>'
        )
    return f'<p class="tokens">{"".join(spans)}</p>'


def _frame(left: float, label: str, *, y_ticks: bool) -> list[str]:
    top, bottom = 26.0, 26.0 + _SQUARE
    body = [
        element("rect", "panel", x=left, y=top, width=_SQUARE, height=_SQUARE),
        text_at("label", left, 16, label),
    ]
    for rate in (LEAST_RATE, 0.01, 0.1, 1.0):
        x, y = _log_log(left, rate, rate)
        body += [tick_at(x, bottom, bottom + 5), text_at("small muted", x, bottom + 19, f"{100 * rate:g} %", "middle")]
        if not y_ticks:
            body.append(text_at("small muted", left - 6, y + 5, f"{100 * rate:g} %", "end"))
    if y_ticks:
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            body.append(text_at("small muted", left - 6, bottom - share * _SQUARE + 5, f"{share:.0%}", "end"))
    body.append(
        text_at("small muted", left + _SQUARE / 2, bottom + 38, "false positives" if y_ticks else "promised", "middle")
    )
    return body


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A curve that rises only where it has a point."""
    drawn = []
    for before, after in itertools.pairwise(points):
        drawn += [before, (after[0], before[1])]
    return [*drawn, *points[-1:]]


def _x(left: float, rate: float) -> float:
    return left + _SQUARE * (1 - math.log10(max(rate, LEAST_RATE)) / math.log10(LEAST_RATE))


def _rates(left: float, false: float, true: float) -> tuple[float, float]:
    return _x(left, false), 26.0 + _SQUARE * (1 - true)


def _log_log(left: float, promised: float, seen: float) -> tuple[float, float]:
    return _x(left, promised), 26.0 + _SQUARE - (_x(0.0, seen))


def _path(style: str, points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return ""
    return f'<polyline class="{style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others."""
    step = [*round_numbers(high - low), 1.0][1] if high > low else 1.0
    first = math.ceil(low / step)
    return [round(number * step, 9) for number in range(first, math.floor(high / step) + 1)]
