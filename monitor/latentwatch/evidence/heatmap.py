"""A request's tokens coloured by a feature's scores, for a terminal or as a page that stands alone.

Tokens are what somebody wrote to a model: control characters are shown and never sent, and markup is escaped.
"""

from __future__ import annotations

import datetime
import unicodedata
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Final

from latentwatch.evidence.archive import StoredActivations, StoredRequest
from latentwatch.facts import ShownExceedance
from latentwatch.watchlist.file import Feature, Watchlist
from latentwatch.watchlist.show import statistic_text

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
    statistic: float | None
    """What the limit is compared with here: the value, or the mean of the window that ends here. None for none."""
    counted: bool
    """Whether the limit counts this token."""
    over: bool
    heat: float
    """0..1 between the ends of the scale, which are set by the limit and every counted token but the first: models park
    there what they do not need (an attention sink), far above all other tokens."""


def cells(
    activations: StoredActivations, tokens: Sequence[str], prompt_tokens: int = 0, feature: Feature | None = None
) -> list[Cell]:
    """Every token, with its score; where the tokens are not known, only the positions that have one.

    Args: feature: as its watchlist describes it, which tells what the limit is on; without it, on any token's value.
    """
    values = dict(zip(activations.positions, activations.values, strict=True))
    total = max([len(tokens), *(position + 1 for position in values)])
    statistics = dict(_statistics(activations, values, total, prompt_tokens, feature))
    bottom, top = _scale(activations, values, statistics)
    made = []
    for position in sorted({*range(len(tokens)), *values}):
        value, statistic = values.get(position), statistics.get(position)
        text = printable(tokens[position]) if position < len(tokens) else f"[{position}]"
        heat = 0.0 if value is None else min(1.0, max(0.0, (value - bottom) / (top - bottom)))
        over = activations.limit is not None and statistic is not None and statistic > activations.limit
        made.append(Cell(position, text, value, statistic, position in statistics, over, heat))
    return made


def _statistics(
    activations: StoredActivations,
    values: Mapping[int, float],
    total: int,
    prompt_tokens: int,
    feature: Feature | None,
) -> Iterator[tuple[int, float | None]]:
    """Of each position that the limit counts: what it compares there. A gap ends a window."""
    limit = feature.limit if feature else None
    phase, window = (limit.phase, limit.window_tokens) if limit else ("any", 1)
    quiet = None if activations.dense else 0.0
    run: deque[float] = deque(maxlen=window)
    for position in range(feature.skip_first_positions if feature else 0, total):
        if phase != "any" and (phase == "prompt") != (position < prompt_tokens):
            run.clear()
            continue
        score = values.get(position, quiet)
        if score is None:
            run.clear()
        else:
            run.append(score)
        yield position, sum(run) / window if len(run) == window else None


def _scale(activations: StoredActivations, values: Mapping[int, float], counted: Container[int]) -> tuple[float, float]:
    """Its ends. The first token sets none, nor does one that the limit does not count."""
    limit = activations.limit or 0.0
    plain = [value for position, value in values.items() if position > 0 and position in counted]
    top = max([0.0, limit, *plain])
    bottom = min([0.0, limit, *plain]) if activations.dense else 0.0
    return bottom, top if top > bottom else bottom + 1.0


def printable(token: str) -> str:
    """A token with every character visible: no control, escape or direction character reaches a terminal or a page."""
    shown = (_SPACES.get(c, c if _is_plain(c) else f"\\u{{{ord(c):x}}}") for c in token)
    return "".join(shown)


def as_text(
    request: StoredRequest,
    tokens: Sequence[str],
    *,
    colour: bool,
    feature: str | None = None,
    watchlist: Watchlist | None = None,
) -> str:
    """For a terminal. Args: tokens: from position 0; empty where they are not known."""
    return "\n".join([*_header(request), *_body(request, tokens, colour, feature, _by_id(watchlist))]) + "\n"


def as_html(
    request: StoredRequest, tokens: Sequence[str], *, feature: str | None = None, watchlist: Watchlist | None = None
) -> str:
    """A page that stands alone: no network, no script, no other file.

    Args: watchlist: that the request was scored with; it alone says which tokens a limit counts, and over what window.
    """
    template = Template(resources.files("latentwatch.evidence").joinpath("heatmap.html").read_text(encoding="utf-8"))
    known = _by_id(watchlist)
    sections = [_section(request, a, tokens, known.get(a.feature)) for a in _chosen(request, feature)]
    return template.substitute(
        title=escape(request.response_id or request.request_id),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _facts(request)),
        exceedances="".join(f"<li>{escape(_exceedance(e))}</li>" for e in request.exceedances)
        or "<li>No limit was exceeded.</li>",
        legend=f"{_LEGEND}<p>{_SINK} {_KNOWN if watchlist else _UNKNOWN}</p>" if sections else "",
        sections="\n".join(sections) or f"<p>{_NOTHING}</p>",
    )


_LEGEND: Final = (
    "<p class='legend'><span><i style='--heat:0.15'></i><i style='--heat:0.5'></i><i style='--heat:1'></i> "
    "weak to strong</span><span><i class='over' style='--heat:1'></i> above the limit</span>"
    "<span><i class='apart' style='--heat:0.5'></i> not counted by the limit</span></p>"
)
_SINK: Final = (
    "The pointer on a token says its value. The first token sets no scale: models park there what they do not need, "
    "far above all other tokens."
)
_KNOWN: Final = "What a limit is on is told by the watchlist."
_UNKNOWN: Final = (
    "Evidence does not tell which tokens a limit counts, nor its window: every token's own value is compared here. "
    "With --watchlist FILE it is what the limit is on."
)


def _by_id(watchlist: Watchlist | None) -> dict[str, Feature]:
    return {} if watchlist is None else {feature.id: feature for feature in watchlist.features}


_NOTHING: Final = "No activations are kept of this request."


def _body(
    request: StoredRequest, tokens: Sequence[str], colour: bool, feature: str | None, known: Mapping[str, Feature]
) -> Iterator[str]:
    chosen = _chosen(request, feature)
    if not chosen:
        yield f"\n{_NOTHING}"
    for activations in chosen:
        described = known.get(activations.feature)
        made = cells(activations, tokens, request.prompt_tokens or 0, described)
        yield f"\n{_title(activations, described)}"
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


def _title(activations: StoredActivations, feature: Feature | None) -> str:
    on = f" on the {statistic_text(feature.limit)}" if feature and feature.limit else ""
    limit = "" if activations.limit is None else f", limit {activations.limit:g}{on}"
    return f"{activations.label} ({activations.feature}, {activations.severity}{limit}, in {activations.units})"


def _coloured(cell: Cell) -> str:
    if cell.heat <= 0:
        return cell.text
    colour = _RAMP[min(len(_RAMP) - 1, int(cell.heat * len(_RAMP)))]
    return f"\x1b[30;48;5;{colour}m{cell.text}\x1b[0m"


def _section(
    request: StoredRequest, activations: StoredActivations, tokens: Sequence[str], feature: Feature | None
) -> str:
    spans = []
    prompt = request.prompt_tokens or 0
    is_mean = feature is not None and feature.limit is not None and feature.limit.window_tokens > 1
    for cell in cells(activations, tokens, prompt, feature):
        if cell.position == prompt and tokens:
            spans.append("<b class='edge'>output</b>")
        kind = " class=over" if cell.over else "" if cell.counted else " class=apart"
        words = _words(cell, prompt, is_mean, activations.dense)
        spans.append(f"<span{kind} style='--heat:{cell.heat:.3f}' title='{words}'>{escape(cell.text)}</span>")
    title = escape(_title(activations, feature))
    return f"<section><h2>{title}</h2><p class='tokens'>{''.join(spans)}</p></section>"


def _words(cell: Cell, prompt: int, is_mean: bool, dense: bool) -> str:
    """What the live page says of a token under the pointer."""
    quiet = "not seen" if dense else "no activation"
    own = quiet if cell.value is None else f"{cell.value:.4g}"
    mean = f", mean {cell.statistic:.4g}" if is_mean and cell.statistic is not None else ""
    over = ", above the limit" if cell.over else ""
    apart = "" if cell.counted else ", not counted by the limit"
    return f"token {cell.position} ({'prompt' if cell.position < prompt else 'output'}): {own}{mean}{over}{apart}"


def _is_plain(character: str) -> bool:
    return character == " " or unicodedata.category(character)[0] not in "CZ"
