"""A request's tokens coloured by a feature's scores, for a terminal or as a page that stands alone.

Tokens are what somebody wrote to a model: control characters are shown and never sent, and markup is escaped.
"""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Final

from latentwatch.evidence.archive import StoredActivations, StoredRequest
from latentwatch.facts import ShownExceedance

FEATURES_SHOWN: Final = 8
_STRONGEST_SHOWN: Final = 12
_BAR_CELLS: Final = 20
_RAMP: Final = (230, 223, 216, 209, 202, 196)
"""Colours of a 256-colour terminal, from pale yellow to red: read as darker even where the hues look alike."""
_SPACES: Final = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Cell:
    """One token."""

    position: int
    text: str
    """Printable, on one line; the position in brackets where the token is not known."""
    value: float | None
    """None where the feature had no activation."""
    heat: float
    """0..1: 1 at the largest score of the request, or at the limit where that is larger."""


def cells(activations: StoredActivations, tokens: Sequence[str]) -> list[Cell]:
    """Every token, with its score; where the tokens are not known, only the positions that have one."""
    values = dict(zip(activations.positions, activations.values, strict=True))
    top = max([activations.limit or 0.0, *values.values()])
    made = []
    for position in sorted({*range(len(tokens)), *values}):
        value = values.get(position)
        text = printable(tokens[position]) if position < len(tokens) else f"[{position}]"
        heat = value / top if value is not None and top > 0 else 0.0
        made.append(Cell(position, text, value, min(1.0, max(0.0, heat))))
    return made


def printable(token: str) -> str:
    """A token with every character visible: no control, escape or direction character reaches a terminal or a page."""
    shown = (_SPACES.get(c, c if _is_plain(c) else f"\\u{{{ord(c):x}}}") for c in token)
    return "".join(shown)


def as_text(request: StoredRequest, tokens: Sequence[str], *, colour: bool, feature: str | None = None) -> str:
    """For a terminal. Args: tokens: from position 0; empty where they are not known."""
    return "\n".join([*_header(request), *_body(request, tokens, colour, feature)]) + "\n"


def as_html(request: StoredRequest, tokens: Sequence[str], *, feature: str | None = None) -> str:
    """A page that stands alone: no network, no script, no other file."""
    template = Template(resources.files("latentwatch.evidence").joinpath("heatmap.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(request.response_id or request.request_id),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _facts(request)),
        exceedances="".join(f"<li>{escape(_exceedance(e))}</li>" for e in request.exceedances),
        sections="\n".join(_section(request, a, tokens) for a in _chosen(request, feature)) or f"<p>{_NOTHING}</p>",
    )


_NOTHING: Final = "No activations are kept of this request."


def _body(request: StoredRequest, tokens: Sequence[str], colour: bool, feature: str | None) -> Iterator[str]:
    chosen = _chosen(request, feature)
    if not chosen:
        yield f"\n{_NOTHING}"
    for activations in chosen:
        made = cells(activations, tokens)
        yield f"\n{_title(activations)}"
        if tokens and colour:
            yield "".join(map(_coloured, made))
        scored = [cell for cell in made if cell.value is not None]
        for cell in sorted(scored, key=lambda cell: -(cell.value or 0.0))[:_STRONGEST_SHOWN]:
            bar = "█" * round(cell.heat * _BAR_CELLS)
            text = cell.text if cell.position < len(tokens) else ""
            yield f"  {cell.position:>7}  {cell.value:>9.3f}  {bar:<{_BAR_CELLS}}  {text}".rstrip()
        if len(scored) > _STRONGEST_SHOWN:
            yield f"  and {len(scored) - _STRONGEST_SHOWN} positions with less"


def _header(request: StoredRequest) -> Iterator[str]:
    for name, text in _facts(request):
        yield f"{name:<11} {text}"
    for exceedance in request.exceedances:
        yield f"exceeded    {_exceedance(exceedance)}"


def _facts(request: StoredRequest) -> Iterator[tuple[str, str]]:
    yield "request", printable(request.request_id)
    yield "response", printable(request.response_id)
    if request.trace_id:
        yield "trace", request.trace_id
    adapter = f", adapter {request.adapter}" if request.adapter else ""
    yield "model", printable(f"{request.model_name}{adapter} on {request.replica}")
    opened = datetime.datetime.fromtimestamp(request.opened_seconds, datetime.UTC)
    yield "opened", opened.isoformat(timespec="milliseconds")
    took = f" after {request.closed_seconds - request.opened_seconds:.3f} s" if request.closed_seconds else ""
    yield "outcome", f"{request.outcome}{took}"
    if request.tokens:
        states = ", ".join(f"{count} {state}" for state, count in request.tokens.items() if count)
        yield "tokens", f"{request.prompt_tokens} prompt, {request.output_tokens} output: {states}"
    if request.activations_lost:
        yield "not kept", f"{request.activations_lost} activations before the first exceedance"


def _exceedance(exceedance: ShownExceedance) -> str:
    return (
        f"{exceedance.feature} ({exceedance.label}), {exceedance.severity}: {exceedance.value:.4g} over "
        f"{exceedance.limit:g} at position {exceedance.position}, {exceedance.phase}"
    )


def _chosen(request: StoredRequest, feature: str | None) -> Sequence[StoredActivations]:
    """The feature that was asked for; else those that exceeded their limit; else the first ones."""
    if feature is not None:
        return [a for a in request.activations if a.feature == feature]
    exceeded = {exceedance.feature for exceedance in request.exceedances}
    return ([a for a in request.activations if a.feature in exceeded] or request.activations)[:FEATURES_SHOWN]


def _title(activations: StoredActivations) -> str:
    limit = "" if activations.limit is None else f", limit {activations.limit:g}"
    return f"{activations.label} ({activations.feature}, {activations.severity}{limit}, in {activations.units})"


def _coloured(cell: Cell) -> str:
    if cell.heat <= 0:
        return cell.text
    colour = _RAMP[min(len(_RAMP) - 1, int(cell.heat * len(_RAMP)))]
    return f"\x1b[30;48;5;{colour}m{cell.text}\x1b[0m"


def _section(request: StoredRequest, activations: StoredActivations, tokens: Sequence[str]) -> str:
    spans = []
    for cell in cells(activations, tokens):
        if cell.position == request.prompt_tokens and tokens:
            spans.append("<b class='edge'>output</b>")
        over = activations.limit is not None and cell.value is not None and cell.value > activations.limit
        value = "no activation" if cell.value is None else f"{cell.value:.4g}"
        spans.append(
            f"<span{' class=over' if over else ''} style='--heat:{cell.heat:.3f}' "
            f"title='position {cell.position}: {value}'>{escape(cell.text)}</span>"
        )
    return f"<section><h2>{escape(_title(activations))}</h2><p class='tokens'>{''.join(spans)}</p></section>"


def _is_plain(character: str) -> bool:
    return character == " " or unicodedata.category(character)[0] not in "CZ"
