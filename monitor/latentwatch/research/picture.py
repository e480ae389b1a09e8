"""What features say along a text, drawn as SVG: nothing to install, nothing to load.

Legend: T tokens of one text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

import numpy as np

from latentwatch.arrays import F32
from latentwatch.evidence.heatmap import FEATURES_SHOWN, printable
from latentwatch.research.scoring import Scored, compared
from latentwatch.watchlist.file import Feature

_PANEL_PX: Final = 90
_TITLE_PX: Final = 22
_LEFT_PX: Final = 52
_TOKENS_PX: Final = 96
_WIDTH_PX: Final = 960
_WIDEST_BAR_PX: Final = 18
_NARROWEST_LABELLED_PX: Final = 9
_TOKEN_CHARACTERS: Final = 14
_INK, _PAPER, _BAR, _OVER = "#1c1c1c", "#ffffff", "#7d9bc1", "#b3261e"


@dataclass(frozen=True)
class Picture:
    """A notebook shows it; elsewhere `Path("x.svg").write_text(picture.svg)`."""

    svg: str
    """A document that stands alone, without a script."""

    def _repr_svg_(self) -> str:
        return self.svg


def plot(scored: Scored, features: Sequence[str] = ()) -> Picture:
    """A panel for each feature: a bar for each token, the limit dashed, red where the text is above it.

    A limit on a rolling mean is compared with the curve, not the bars. The upright line is where the answer begins.

    Args:    features: ids, from top to bottom; none for those above their limit, else the strongest, eight at most.
    Raises:  KeyError: no such feature.
    """
    known = {feature.id: feature for feature in scored.watchlist.features}
    strongest = [one.feature for one in scored.as_request().activations]
    chosen = list(features) or (scored.exceeded() or strongest)[:FEATURES_SHOWN]
    rows = [(scored.activation(one), known[one]) for one in chosen]
    step_px = min(_WIDEST_BAR_PX, (_WIDTH_PX - _LEFT_PX) / max(1, len(scored.tokens)))
    labelled = step_px >= _NARROWEST_LABELLED_PX
    height_px = len(rows) * (_PANEL_PX + _TITLE_PX) + (_TOKENS_PX if labelled else 8)
    panels = [_panel(scored, feature, act_T, n, step_px) for n, (act_T, feature) in enumerate(rows)]
    tokens = _tokens(scored, height_px - _TOKENS_PX + 10, step_px) if labelled else ()
    said = escape(f"{', '.join(chosen)} along {len(scored.tokens)} tokens of {scored.model_name}")
    return Picture(
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{_WIDTH_PX}" height="{height_px}" '
        f'viewBox="0 0 {_WIDTH_PX} {height_px}" font-family="sans-serif" font-size="12" fill="{_INK}">'
        f'<title>{said}</title><rect width="100%" height="100%" fill="{_PAPER}"/>{"".join([*panels, *tokens])}</svg>'
    )


def _panel(scored: Scored, feature: Feature, act_T: F32, number: int, step_px: float) -> str:
    """One feature's title, bars, limit and edge."""
    limit = feature.limit
    compared_T = compared(limit, act_T, scored.prompt_tokens)
    shown = [0.0, *act_T[np.isfinite(act_T)].tolist(), *([limit.value] if limit else [])]
    low, high = min(shown), max(shown)
    bottom_px = (number + 1) * (_PANEL_PX + _TITLE_PX)

    def y_px(value: float) -> float:
        return float(bottom_px - _PANEL_PX * (value - low) / ((high - low) or 1.0))

    right_px = _LEFT_PX + len(act_T) * step_px
    parts = [
        f'<text x="4" y="{bottom_px - _PANEL_PX - 7}" font-weight="bold">{escape(printable(_title(feature)))}</text>',
        *(f'<text x="{_LEFT_PX - 6}" y="{y_px(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>' for v in {low, high}),
        _line(_LEFT_PX, y_px(0.0), right_px, y_px(0.0)),
    ]
    for t in _finite(act_T):
        over = limit is not None and bool(compared_T[t] > limit.value)
        top_px, foot_px = sorted((y_px(float(act_T[t])), y_px(0.0)))
        parts.append(
            f'<rect x="{_LEFT_PX + t * step_px:.2f}" y="{top_px:.1f}" width="{0.9 * step_px:.3f}" '
            f'height="{foot_px - top_px:.1f}" fill="{_OVER if over else _BAR}">'
            f"<title>{escape(printable(scored.tokens[t]))}: {act_T[t]:.4g}, position {t}</title></rect>"
        )
    if limit is not None:
        parts.append(_line(_LEFT_PX, y_px(limit.value), right_px, y_px(limit.value), dashes="5 4"))
        if limit.window_tokens > 1:
            at = ((_LEFT_PX + (t + 0.5) * step_px, y_px(float(compared_T[t]))) for t in _finite(compared_T))
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{_INK}" stroke-width="1.5"/>')
    if 0 < scored.prompt_tokens < len(act_T):
        edge_px = _LEFT_PX + scored.prompt_tokens * step_px - 0.5
        parts.append(_line(edge_px, bottom_px - _PANEL_PX, edge_px, bottom_px))
    return "".join(parts)


def _title(feature: Feature) -> str:
    of = ""
    if feature.limit is not None:
        mean = f", mean of {feature.limit.window_tokens} tokens" if feature.limit.window_tokens > 1 else ""
        where = "" if feature.limit.phase == "any" else f" in {feature.limit.phase}"
        of = f", limit {feature.limit.value:.4g}{mean}{where}"
    return f"{feature.label} ({feature.id}, in {feature.units}{of})"


def _tokens(scored: Scored, top_px: float, step_px: float) -> Iterator[str]:
    """The tokens themselves under the last panel, upright."""
    for t, token in enumerate(scored.tokens):
        x_px = _LEFT_PX + t * step_px + step_px / 2 - 4
        text = escape(printable(token)[:_TOKEN_CHARACTERS])
        yield f'<text transform="translate({x_px:.1f} {top_px:.1f}) rotate(90)">{text}</text>'


def _finite(value_T: F32) -> list[int]:
    return [int(t) for t in np.flatnonzero(np.isfinite(value_T))]


def _line(x1_px: float, y1_px: float, x2_px: float, y2_px: float, dashes: str = "") -> str:
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="M{x1_px:.1f} {y1_px:.1f}L{x2_px:.1f} {y2_px:.1f}" stroke="{_INK}" fill="none"{dash}/>'
