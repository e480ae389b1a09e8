"""The demo's report, for the terminal and as one HTML file that needs nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib import resources
from itertools import groupby
from string import Template
from typing import Final

import numpy as np

from latentwatch.demo.run import detection_report, plots
from latentwatch.demo.run.outcome import Run
from latentwatch.demo.run.terminal import Terminal
from latentwatch.facts import ExceedanceView
from latentwatch.names import Severity, TokenState
from latentwatch.watchlist.file import Feature

MAX_BINS: Final = 40
MAX_LANES: Final = 28
MAX_STRIPS: Final = 8
MAX_ROWS: Final = 25
"""Bounds of the page, so that a larger watchlist or a longer demo stays readable."""
PAGES_SHOWN: Final = 12
MIN_BIN_TOKENS: Final = 10
"""A firing rate over fewer tokens says nothing; its bin stays empty."""
STATES: Final = tuple(state.name.lower() for state in TokenState)


def to_terminal(run: Run, terminal: Terminal) -> None:
    """The report in a dozen lines: tokens, exceedances, seconds, and each invariant that did not hold."""
    states, engine = run.settled.states, run.engine
    fed = f"prompt {engine.prompt:,} + output {engine.output:,} - {engine.finished:,} last tokens"
    sums = " + ".join(f"{state} {states.get(state, 0):,}" for state in STATES)
    outside = f"{len(run.outside)} outside, {_critical(run.outside)} of them critical"
    rows = [
        ("tokens", f"vLLM counted  {engine.fed:>8,} = {fed}"),
        ("", f"latentwatch   {run.settled.tokens:>8,} = {sums}"),
        ("exceedances", f"{len(run.inside)} inside the incident, {outside}"),
        ("", f"{run.caught} of {run.feared} feared requests went over a critical limit"),
        ("first token", f"to /metrics {_seconds(run.seconds_to_metrics)}"),
        ("", f"to the page {run.paging or _seconds(run.seconds_to_page)}"),
    ]
    terminal.line()
    if run.detection is not None:
        rows += detection_report.lines(run.detection)
    for name, text in rows:
        terminal.line(f"  {terminal.style(f'{name:<12}', 'bold')} {text}")
    terminal.line()
    for check in run.checks():
        mark = terminal.style("✓", "green") if check.passed else terminal.style("✗", "red")
        terminal.line(f"  {mark} {check.name}" + ("" if check.passed else f": {check.text}"))
    terminal.line()


def to_html(run: Run) -> str:
    """The whole report as one self-contained page."""
    template = Template(resources.files("latentwatch.demo.run").joinpath("report.html").read_text(encoding="utf-8"))
    span = _span(run)
    return template.substitute(
        verdict="every check held" if run.passed else "a check failed",
        verdict_class="held" if run.passed else "broken",
        lede=_lede(run),
        tiles=_tiles(run),
        checks="".join(_check(check.passed, check.name, check.text) for check in run.checks()),
        strips=plots.strips(_strips(run), span)
        if _strips(run)
        else _none("The watchlist has no critical feature with a limit."),
        lanes=plots.lanes(_lanes(run, span), span) if _lanes(run, span) else _none("No sparse feature fired."),
        timeline=plots.timeline(_events(run)) or _none("No critical exceedance whose time is known."),
        timeline_note=_timeline_note(run),
        bars=plots.bars(_bars(run)),
        bar_legend=_bar_legend(run),
        accounting_note=_accounting_note(run),
        exceedances=_exceedance_table(run),
        pages=_page_table(run),
        detection="" if run.detection is None else detection_report.to_html(run.detection),
        note=escape(run.remark),
        versions=_table((), [(escape(name), f"<code>{escape(value)}</code>") for name, value in run.versions.items()]),
    )


def _lede(run: Run) -> str:
    began = datetime.fromtimestamp(run.started_at).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return escape(
        f"{began}. A real vLLM server answered {len(run.answers):,} chat requests, {run.feared} of them the incident. "
        f"latentwatch scored {len(run.features)} features on each token, inside the compiled model."
    )


def _tiles(run: Run) -> str:
    states = run.settled.states
    seen = states.get("scored", 0) + states.get("inherited", 0)
    tiles = [
        (
            f"{run.settled.tokens:,} / {run.engine.fed:,}",
            f"tokens accounted for; {seen:,} of them scored or inherited",
        ),
        (
            f"{len(run.inside)} in, {len(run.outside)} out",
            f"exceedances inside and outside the incident; {_critical(run.outside)} critical outside",
        ),
        (_seconds(run.seconds_to_metrics), "from the first anomalous token to /metrics"),
        (_seconds(run.seconds_to_page), run.paging or "from the first anomalous token to the page"),
    ]
    return "".join(
        f'<div class="tile"><b>{escape(figure)}</b><span>{escape(text)}</span></div>' for figure, text in tiles
    )


def _check(passed: bool, name: str, text: str) -> str:
    mark = '<span class="mark held">✓</span>' if passed else '<span class="mark broken">✗</span>'
    return f'<li>{mark}<span>{escape(name)} <span class="muted">({escape(text)})</span></span></li>'


def _span(run: Run) -> plots.Span:
    begin, end = run.incident
    return plots.Span(max(1.0, run.settled.at - run.traffic_at), begin - run.traffic_at, end - run.traffic_at)


def _strips(run: Run) -> list[plots.Strip]:
    """Critical features with a limit, the most often exceeded first."""
    hits = {feature.id: sum(e.feature == feature.id for e in run.exceedances) for feature in run.features}
    watched = [f for f in run.features if f.severity is Severity.CRITICAL and f.limit is not None]
    watched.sort(key=lambda feature: -hits[feature.id])
    return [
        _strip(run, feature) for feature in watched[:MAX_STRIPS] if any(feature.id in s for s in run.scores.values())
    ]


def _strip(run: Run, feature: Feature) -> plots.Strip:
    assert feature.limit is not None
    over = {exceedance.response_id for exceedance in run.exceedances if exceedance.feature == feature.id}
    dots = [
        plots.Dot(
            at=answer.finished_at - run.traffic_at,
            value=run.scores[answer.response_id][feature.id],
            feared=answer.prompt.feared,
            over=answer.response_id in over,
            title=f"{answer.response_id} · {answer.prompt.topic} · {run.scores[answer.response_id][feature.id]:.2f}",
        )
        for answer in run.answers
        if feature.id in run.scores.get(answer.response_id, {})
    ]
    return plots.Strip(feature.label, feature.id, feature.limit.value, dots)


def _lanes(run: Run, span: plots.Span) -> list[plots.Lane]:
    """Firing rates of sparse features in bins of a second or more, those that rose most in the incident first."""
    bins = min(MAX_BINS, max(10, int(span.seconds)))
    edges = run.traffic_at + np.linspace(0.0, span.seconds, bins + 1)
    at = np.searchsorted([sample.at for sample in run.samples], edges).clip(0, len(run.samples) - 1)
    seen = np.array([sample.states.get("scored", 0) + sample.states.get("inherited", 0) for sample in run.samples])
    tokens = np.diff(seen[at])
    begin, end = run.incident
    inside = (edges[1:] > begin) & (edges[:-1] < end)
    lanes = []
    for feature in run.features:
        fired = np.diff(np.array([sample.fired.get(feature.id, 0) for sample in run.samples])[at])
        if not feature.dense and fired.any():
            # One added token keeps a feature that never fired outside comparable with the others.
            outside = (fired[~inside].sum() + 1) / (tokens[~inside].sum() + 1)
            rise = fired[inside].sum() / (tokens[inside].sum() + 1) / outside
            rates = np.divide(fired, tokens, out=np.zeros(bins), where=tokens >= MIN_BIN_TOKENS)
            lanes.append((float(rise), feature, rates))
    lanes.sort(key=lambda lane: -lane[0])
    return [plots.Lane(f"{f.id} {f.label}", f.severity, rates.tolist()) for _, f, rates in lanes[:MAX_LANES]]


def _events(run: Run) -> list[plots.Event]:
    moments = run.moments
    if moments is None:
        return []
    steps = [
        ("request sent", moments.sent_at),
        ("anomalous token at the client", moments.token_at),
        ("on /metrics", moments.metrics_at),
        ("alert rule fires", moments.rule_at),
        ("page arrives", moments.page_at),
    ]
    reached = [(name, at) for name, at in steps if at is not None]
    return [
        plots.Event(max(0.0, at - moments.sent_at), name, f"{at - moments.token_at:+.2f} s") for name, at in reached
    ]


def _timeline_note(run: Run) -> str:
    text = (
        "Times are relative to the moment when the client held the first token that went over a critical limit "
        "(for a token of the prompt: when it was sent). "
    )
    rest = run.paging or "The demo's Prometheus scrapes and evaluates every second; a production one every 15 to 30 s."
    return escape(text + rest)


def _bars(run: Run) -> list[tuple[str, list[plots.Part]]]:
    engine, states = run.engine, run.settled.states
    return [
        (
            "vLLM counted",
            [
                plots.Part("engine", "fed", engine.fed),
                plots.Part("last", "last ones, never fed", engine.finished),
            ],
        ),
        (
            "latentwatch",
            [plots.Part(state, state, states.get(state, 0)) for state in STATES],
        ),
    ]


def _bar_legend(run: Run) -> str:
    parts = [part for _, bar in _bars(run) for part in bar]
    return "".join(
        f'<span><i class="square" style="background:var(--{part.style})"></i>{escape(part.name)} {part.tokens:,}</span>'
        for part in parts
    )


def _accounting_note(run: Run) -> str:
    engine = run.engine
    return escape(
        f"vLLM's own counters: {engine.prompt:,} prompt + {engine.output:,} output tokens, less the last one of each "
        f"of {engine.finished:,} finished requests, which is sampled but never fed back. Inherited tokens came from "
        "the prefix cache, with the scores of the request that filled it." + _not_scored(run)
    )


def _not_scored(run: Run) -> str:
    reasons = [f"{count:,} {state} ({reason})" for (state, reason), count in run.settled.reasons.items() if count]
    return f" Not scored: {', '.join(reasons)}." if reasons else ""


def _exceedance_table(run: Run) -> str:
    """One row per request, those that were not part of the incident first: they are the ones to look at."""
    ordered = sorted(run.exceedances, key=lambda e: (e.response_id, e.severity != Severity.CRITICAL, e.seconds))
    by_request = [list(group) for _, group in groupby(ordered, key=lambda e: e.response_id)]
    by_request.sort(key=lambda group: (run.is_inside(group[0]), min(e.seconds for e in group)))
    rows = [_exceedance_row(run, group) for group in by_request[:MAX_ROWS]]
    if not rows:
        return _none("None.")
    left_out = len(by_request) - len(rows)
    more = f'<p class="note">{left_out} more requests are not shown.</p>' if left_out else ""
    return _table(("at", "request", "what was said", "what went over its limit"), rows) + more


def _exceedance_row(run: Run, group: Sequence[ExceedanceView]) -> tuple[str, ...]:
    answer = run.by_id.get(group[0].response_id)
    said = '<span class="muted">not one of the demo\'s requests</span>'
    about = "unknown request"
    if answer is not None:
        said = f'<p>{escape(answer.prompt.last_words)}</p><p class="answer">→ {escape(answer.text.strip())}</p>'
        about = f"{'feared' if answer.prompt.feared else 'ordinary'}: {answer.prompt.topic}"
    return (
        f"{min(e.seconds for e in group) - run.traffic_at:.1f} s",
        f'<code class="id">{escape(group[0].response_id)}</code><br><span class="muted">{escape(about)}</span>',
        f'<div class="said">{said}</div>',
        "".join(_exceeded(e) for e in group),
    )


def _exceeded(e: ExceedanceView) -> str:
    reached = f"{e.value:.2f} over {e.limit:.2f} at token {e.position} ({e.phase})"
    return f'<p>{_severity(e.severity, e.severity)} {escape(e.label)} <span class="muted">{escape(reached)}</span></p>'


def _page_table(run: Run) -> str:
    if run.paging:
        return _none(run.paging)
    # Alertmanager repeats what still fires; the first arrival of each alert is the one that counts.
    first = {(p.receiver, p.alert, p.labels.get("feature", "")): p for p in reversed(run.pages)}
    shown = sorted(first.values(), key=lambda page: page.at)[:PAGES_SHOWN]
    rows = [
        (
            f"{page.at - run.traffic_at:+.1f} s",
            escape(page.receiver),
            _severity(page.labels.get("severity", ""), page.alert),
            "<br>".join(escape(page.annotations.get(part, "")) for part in ("summary", "description")),
        )
        for page in shown
    ]
    return _table(("after", "receiver", "alert", "text"), rows) if rows else _none("None.")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr><td class="number">{first}</td>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _severity(severity: str, text: str) -> str:
    return f'<span class="severity {escape(severity)}">{escape(text)}</span>'


def _none(text: str) -> str:
    return f'<p class="muted">{escape(text)}</p>'


def _critical(exceedances: Sequence[ExceedanceView]) -> int:
    return sum(exceedance.severity == "critical" for exceedance in exceedances)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"
