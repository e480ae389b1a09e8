"""A watchlist file as a page: a card per feature with what is known about it, for the people it pages.

The page stands alone (no network, no other file) and everything that came from a file is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Final

from latentwatch.watchlist.figures import Histogram, Token
from latentwatch.watchlist.file import Feature, HookRows, Watchlist
from latentwatch.watchlist.show import identity_text, limit_text

SHOWN_CONFOUNDS: Final = 4
SHOWN_TOKENS: Final = 8
_WIDTH, _HEIGHT, _BASE = 400, 110, 92
_GATES: Final = {
    "exact": "exact: fires where the published SAE fires",
    "calibrated": "calibrated: a threshold stands for the SAE's choice of its k largest",
    "none": "none: a score on every token",
}
_FIGURES: Final = (
    ("auroc", "AUROC"),
    ("tpr_at_fpr_1pct", "TPR at 1 % FPR"),
    ("tpr_at_fpr_0_1pct", "TPR at 0.1 % FPR"),
    ("q_value", "q-value"),
    ("base_rate", "base rate"),
    ("aggregation", "aggregation"),
    ("split", "split"),
    ("measured_on", "measured on"),
    ("label_source", "label from"),
    ("remarks", "remarks"),
)


def as_html(watchlist: Watchlist) -> str:
    """The whole page."""
    model = watchlist.model
    template = Template(resources.files("latentwatch.watchlist").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        name=escape(watchlist.name),
        model=escape(
            f"{model.name}: {model.architecture}, d_model {model.d_model}, {model.layers} layers, "
            f"right for {', '.join(model.dtypes)}. Identity: {identity_text(watchlist)}"
        ),
        notes=escape(watchlist.notes),
        tiles="".join(
            f"<div class='tile'><b>{count}</b><span>{what}</span></div>" for count, what in _tiles(watchlist)
        ),
        sections="\n".join(_section(rows) for rows in watchlist.hooks),
        sha256=escape(watchlist.sha256),
    )


def _tiles(watchlist: Watchlist) -> Iterator[tuple[int, str]]:
    features = watchlist.features
    yield len(features), "features"
    yield len(watchlist.hooks), "hook points"
    yield sum(feature.dense for feature in features), "probes and directions"
    yield sum(feature.limit is not None for feature in features), "with a limit"
    yield sum(feature.severity == "critical" for feature in features), "of critical severity"


def _section(rows: HookRows) -> str:
    cards = "\n".join(_card(feature) for feature in rows.features)
    return f"<h2>{escape(str(rows.hook_point))}</h2>\n<div class='cards'>{cards}</div>"


def _card(feature: Feature) -> str:
    evidence = feature.evidence
    text = escape(f"{feature.id} {feature.label} {feature.severity} {feature.kind}".lower(), quote=True)
    return "".join(
        [
            f"<article class='card' data-text=\"{text}\"><h3>{escape(feature.label)}</h3>",
            f"<div class='line'><code>{escape(feature.id)}</code>"
            f"<b class='{feature.severity.value}'>{feature.severity.value}</b><span>{escape(feature.kind)}</span>"
            f"<span>{escape(_limit(feature))}</span></div>",
            _definitions(_known(feature)),
            _histogram(evidence.get("histogram"), feature.limit.value if feature.limit else None),
            _tokens(evidence.get("top_tokens", ())),
            f"<details><summary>source and details</summary>{_definitions(_source(feature))}</details></article>",
        ]
    )


def _limit(feature: Feature) -> str:
    return "no limit" if feature.limit is None else f"limit {limit_text(feature.limit)}"


def _known(feature: Feature) -> Iterator[tuple[str, str]]:
    evidence = feature.evidence
    for key, name in _FIGURES[:4]:
        if key in evidence:
            yield name, _number(evidence.get(key))
    if "n" in evidence:
        positive = f", {evidence['n_positive']} with the behaviour" if "n_positive" in evidence else ""
        yield "requests measured", f"{evidence['n']}{positive}"
    for key, name in _FIGURES[4:]:
        if key in evidence:
            yield name, _number(evidence.get(key))
    if quantiles := evidence.get("quantiles"):
        yield "quantiles", ", ".join(f"{name} {_number(value)}" for name, value in quantiles.items())
    if confounds := list(evidence.get("confounds", ())):
        more = f"; and {len(confounds) - SHOWN_CONFOUNDS} more, below" if len(confounds) > SHOWN_CONFOUNDS else ""
        yield "confounds", "; ".join(confounds[:SHOWN_CONFOUNDS]) + more
    if sae := evidence.get("sae"):
        yield (
            "the SAE as a whole",
            f"FVU {_number(sae['fvu'])}, L0 {_number(sae['l0'])}, dead {sae['dead_share']:.2%}, loss recovered "
            f"{sae['loss_recovered']:.1%}, on {sae['tokens']} tokens that it was not trained on",
        )
    yield "gate", _GATES[feature.gate]
    if isinstance(gate := feature.source.get("gate_calibration"), Mapping):
        yield (
            "gate on recorded tokens",
            ", ".join(f"{name} {_number(gate.get(name))}" for name in ("precision", "recall", "mass")),
        )
    yield "units", feature.units
    yield "first positions left out", str(feature.skip_first_positions)


def _source(feature: Feature) -> Iterator[tuple[str, str]]:
    confounds = list(feature.evidence.get("confounds", ()))
    if len(confounds) > SHOWN_CONFOUNDS:
        yield "all confounds", "; ".join(confounds)
    for key, value in feature.source.items():
        if isinstance(value, Mapping):
            for name, inner in value.items():
                yield f"{key} {name}", str(inner)
        else:
            yield key.replace("_", " "), str(value)


def _definitions(pairs: Iterator[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs) + "</dl>"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _histogram(histogram: Histogram | None, limit: float | None) -> str:
    """Bars of the activations on ordinary traffic, and the limit among them."""
    if not histogram:
        return ""
    edges, counts = histogram["edges"], histogram["counts"]
    span, most = edges[-1] - edges[0], max(counts)
    if len(edges) != len(counts) + 1 or span <= 0 or most <= 0:
        return ""

    def x(value: float) -> float:
        return (value - edges[0]) / span * _WIDTH

    bars = "".join(
        f"<rect x='{x(left):.1f}' y='{_BASE - count / most * 80:.1f}' "
        f"width='{max(x(right) - x(left) - 1, 0.5):.1f}' height='{count / most * 80:.1f}'/>"
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
    )
    mark = ""
    if limit is not None and edges[0] <= limit <= edges[-1]:
        mark = f"<line class='limit' x1='{x(limit):.1f}' x2='{x(limit):.1f}' y1='0' y2='{_BASE}'/>"
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='activations on ordinary traffic'>{bars}{mark}"
        f"<line x1='0' x2='{_WIDTH}' y1='{_BASE}' y2='{_BASE}'/>"
        f"<text x='0' y='106'>{edges[0]:.4g}</text><text x='{_WIDTH}' y='106' text-anchor='end'>{edges[-1]:.4g}</text>"
        "</svg>"
    )


def _tokens(tokens: Sequence[Token]) -> str:
    if not tokens:
        return ""
    items = "".join(
        f"<li><span>{escape(token.get('before', ''))}<mark>{escape(token['token'])}</mark>"
        f"{escape(token.get('after', ''))}</span><span>{_number(token['activation'])}</span></li>"
        for token in tokens[:SHOWN_TOKENS]
    )
    return f"<ol>{items}</ol>"
