"""The report's part on detection: pages, what limits promised, and what reading the text would have said."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from latentwatch.demo.run import detection_plots as plots
from latentwatch.demo.run.detection import Counts, Detection
from latentwatch.demo.smollm2 import figures
from latentwatch.demo.smollm2.card import FeatureCard

_NOTE: Final = (
    "An ordinary request that goes over a critical limit is a false page; each limit promises at most {rate:.1%} of "
    "them. “Reading the text” is a classifier of character n-grams, fitted on the texts that the detector was "
    "trained on, its limit set by the same requests. It cannot know whether a statement is true, since true and false "
    "ones are made of the same words. Intervals are of 95 %, for the number of requests."
)
_OTHERWISE: Final = "Left out, or otherwise than on the card: {}."


def to_html(detection: Detection) -> str:
    """Sections of HTML."""
    features = list(detection.card.features.values())
    parts = [
        "<h2>What was paged about, and what was not</h2>",
        _note(_NOTE.format(rate=max(feature.limit_rate for feature in features))),
        f'<div class="card scroll">{_table(detection, features)}</div>',
        "<h2>Scores of the incident and of ordinary requests</h2>",
        _note(
            "The incident's requests of the detector's concern stand above each line, ordinary ones below. Each of the "
            "two is drawn to its own highest bar."
        ),
        f'<div class="card scroll">{plots.distributions([_classes(detection, one) for one in features])}</div>',
        "<h2>Caught at each false-positive rate</h2>",
        _note(
            "The logarithm of the rate, since limits live at its left end. The point is the limit, as the run had it."
        ),
        f'<div class="card">{_LEGEND}<div class="scroll">',
        plots.roc([_curve(detection, one) for one in features]),
        "</div></div>",
        "<h2>What limits promised, and what was seen</h2>",
        _note(
            "Thresholds that were set before the run, by ordinary requests of the same kinds, to be exceeded by some "
            "share of them. On the line, a promise is held; above it there are more false pages than promised. Rates "
            "below 0.1 %, none included, stand at the bottom."
        ),
        f'<div class="card scroll">{plots.promises([_promises(detection, one) for one in features])}</div>',
        _heat_maps(detection),
    ]
    if detection.left_out:
        parts.append(_note(_OTHERWISE.format("; ".join(detection.left_out))))
    return "\n".join(part for part in parts if part)


def lines(detection: Detection) -> list[tuple[str, str]]:
    """The same for a terminal, in a few lines."""
    rows = [("pages", _said(detection.all_pages()))]
    if (text := detection.all_text_pages()) is not None:
        rows.append(("", f"by reading the text: {_said(text)}"))
    for feature in detection.card.features.values():
        counts, by_text = detection.pages(feature), detection.text_pages(feature)
        beside = f" (text {by_text.true})" if by_text else ""
        said = f"{counts.true} of {counts.feared}{beside}, false {counts.false} of {counts.ordinary}"
        rows.append(("", f"{feature.concern.replace('_', ' ')}: {said}"))
    return rows


def _said(counts: Counts) -> str:
    return (
        f"{counts.true} of {counts.feared} requests of the incident, {counts.false} of {counts.ordinary} ordinary; "
        f"precision {_share(counts.precision)}, recall {_share(counts.recall)}"
    )


def _table(detection: Detection, features: Sequence[FeatureCard]) -> str:
    rows = [
        _row("All together", "", detection.all_pages(), None),
        _row("", "reading the text", detection.all_text_pages(), None),
    ]
    for feature in features:
        areas = (
            figures.auroc(detection.positive(feature), detection.negative(feature)),
            figures.auroc(detection.text_positive(feature), detection.text_negative(feature)),
        )
        name = f'{escape(feature.label)} <code class="id">{escape(feature.id)}</code>'
        rows.append(_row(name, "", detection.pages(feature), areas[0]))
        rows.append(_row("", "reading the text", detection.text_pages(feature), areas[1]))
    head = ("", "", "incident caught", "recall", "ordinary paged about", "false pages", "precision", "AUROC")
    top = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(name: str, kind: str, counts: Counts | None, area: float | None) -> str:
    if counts is None:
        missing = '<td colspan="6" class="muted">no scikit-learn here</td>'
        return f'<tr><td>{name}</td><td class="muted">{kind}</td>{missing}</tr>'
    cells = [
        name,
        f'<span class="muted">{kind}</span>' if kind else "latentwatch",
        f"{counts.true} of {counts.feared}",
        _with_interval(counts.true, counts.feared),
        f"{counts.false} of {counts.ordinary}",
        _with_interval(counts.false, counts.ordinary),
        _share(counts.precision),
        "–" if area is None or area != area else f"{area:.3f}",
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _with_interval(count: int, total: int) -> str:
    if not total:
        return "–"
    low, high = figures.wilson(count, total)
    return f'<span class="share">{count / total:.1%} <span class="muted">{low:.1%} to {high:.1%}</span></span>'


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _classes(detection: Detection, feature: FeatureCard) -> plots.Classes:
    positive, negative = detection.positive(feature), detection.negative(feature)
    detail = f"{len(positive)} of the incident, {len(negative)} ordinary"
    return plots.Classes(feature.label, detail, feature.limit, positive, negative)


def _curve(detection: Detection, feature: FeatureCard) -> plots.Curve:
    counts = detection.pages(feature)
    text = (detection.text_positive(feature), detection.text_negative(feature))
    return plots.Curve(
        feature.concern.replace("_", " "),
        figures.roc(detection.positive(feature), detection.negative(feature)),
        figures.roc(*text) if len(text[0]) else [],
        (counts.false / max(1, counts.ordinary), counts.recall or 0.0),
    )


def _promises(detection: Detection, feature: FeatureCard) -> list[plots.Promise]:
    negative = detection.negative(feature)
    label = feature.concern.replace("_", " ")
    return [
        plots.Promise(label, float(rate), int((negative > value).sum()), len(negative))
        for rate, value in feature.thresholds.items()
    ]


def _heat_maps(detection: Detection) -> str:
    parts = []
    for heat in detection.heat_maps:
        what = "A true page" if heat.true else "A false page"
        label = detection.card.features[heat.concern].label
        drawn = plots.heat_map(heat) or '<p class="muted">Nothing is kept of it.</p>'
        parts.append(
            f'<h3>{what}: {escape(label)}</h3><p class="note"><code class="id">{escape(heat.response_id)}</code>, '
            f"limit {heat.limit:.2f}</p>{drawn}"
        )
    if not any(not heat.true for heat in detection.heat_maps):
        parts.append(_note("No false page in this run."))
    head = "<h2>Where in a request it was</h2>" + _note(
        "The detector's logit at each token of the prompt, as the evidence holds it; the template's own beginning is "
        "not counted. The limit is on the largest mean over some tokens in a row."
    )
    return f'{head}<div class="card">{"".join(parts)}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


_LEGEND: Final = (
    '<div class="legend"><span><i class="square" style="background:var(--feared)"></i>latentwatch</span>'
    '<span><i class="square" style="background:var(--unseen)"></i>reading the text</span></div>'
)
