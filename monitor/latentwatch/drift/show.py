"""A baseline for people: a table for the terminal, and a page with plots that needs nothing but itself."""

from __future__ import annotations

import datetime
import html
from collections.abc import Iterator, Sequence
from importlib import resources
from string import Template
from typing import Final

import numpy as np

from latentwatch.aggregate.counts import cell_values
from latentwatch.drift.baseline import Baseline
from latentwatch.drift.limits import calibrated_limit
from latentwatch.drift.reference import Reference, Season, Status

_SEASONS: Final = {
    Season.STATIC: "one rate, wide tolerance",
    Season.HOUR_OF_DAY: "by hour of day",
    Season.HOUR_OF_WEEK: "by hour of week",
}
_COLUMNS: Final = ("feature", "status", "active requests", "rate", "no drift between", "season", "dispersion", "limit")


def table(baseline: Baseline) -> str:
    """Plain text: what the baseline is of, and a line for each feature."""
    lines = [f"{name:<14}{value}" for name, value in _facts(baseline)]
    rows = [_COLUMNS, *_rows(baseline, baseline.reference())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines.append("")
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def facts(baseline: Baseline) -> dict[str, object]:
    """The same as values: what the baseline is of, and a row for each feature by the names of the table's columns."""
    rows = [dict(zip(_COLUMNS, row, strict=True)) for row in _rows(baseline, baseline.reference())]
    return {"baseline": dict(_facts(baseline)), "features": rows}


def page(baseline: Baseline) -> str:
    """HTML that stands alone, with each feature's rate over the week and the shape of its values."""
    reference = baseline.reference()
    columns = (*_COLUMNS, "rate over the week", "values")
    body = "".join(
        f"<tr>{_cells(row)}"
        f'<td data-name="{columns[-2]}">{_line(reference.rate_HF[:, i], reference.high_HF[:, i])}</td>'
        f'<td data-name="{columns[-1]}">{_bars(baseline.observed.cells_FC[i])}</td></tr>'
        for i, row in enumerate(_rows(baseline, reference))
    )
    template = Template(resources.files("latentwatch.drift").joinpath("baseline.html").read_text(encoding="utf-8"))
    return template.substitute(
        model=html.escape(baseline.fingerprint.model_name or "any model"),
        facts="".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in _facts(baseline)),
        head="".join(f'<th scope="col">{name}</th>' for name in columns),
        body=body,
    )


def _cells(row: Sequence[str]) -> str:
    named = zip(_COLUMNS, row, strict=True)
    return "".join(f'<td data-name="{name}">{html.escape(cell)}</td>' for name, cell in named)


def _facts(baseline: Baseline) -> Iterator[tuple[str, str]]:
    observed, fingerprint = baseline.observed, baseline.fingerprint
    yield "model", fingerprint.model_name or "any"
    yield "watchlist", fingerprint.watchlist_sha256[:12]
    for name in ("revision", "quantisation", "adapter", "tokenizer", "chat_template", "engine_version"):
        if value := getattr(fingerprint, name):
            yield name.replace("_", " "), value
    first, last = (
        datetime.datetime.fromtimestamp(s, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC") for s in observed.totals[2:]
    )
    yield "traffic", f"{observed.requests} requests in {int(observed.totals[1])} windows, {first} to {last}"
    yield "adapters", ", ".join(name or "(none)" for name in observed.strata)
    yield "canary", f"{int((observed.canary_N > 0).sum())} prompts, {int(observed.canary_N.sum())} runs"
    yield "file", baseline.sha256[:12]
    if baseline.notes:
        yield "notes", baseline.notes


def _rows(baseline: Baseline, reference: Reference) -> Iterator[tuple[str, ...]]:
    for i, feature in enumerate(baseline.features):
        limit = calibrated_limit(baseline.observed, i, baseline.limit_fpr) if baseline.limit_fpr is not None else None
        yield (
            feature,
            Status(reference.status_F[i]).name.lower().replace("_", " "),
            str(int(reference.active_F[i])),
            f"{reference.rate_F[i]:.3g}",
            f"{reference.low_HF[:, i].min():.3g} and {reference.high_HF[:, i].max():.3g}",
            _SEASONS[Season(reference.season_F[i])],
            f"{reference.phi_F[i]:.2f}",
            f"{limit.value:.4g} ({limit.low:.4g} to {limit.high:.4g})" if limit else "-",
        )


def _line(rate_H: np.ndarray, high_H: np.ndarray) -> str:
    top = max(float(high_H.max()), 1e-12)
    return _svg(
        "".join(
            f'<polyline class="{kind}" points="'
            + " ".join(f"{x},{38 - 36 * y / top:.1f}" for x, y in enumerate(values.tolist()))
            + '"/>'
            for values, kind in ((high_H, "high"), (rate_H, "rate"))
        ),
        len(rate_H),
    )


def _bars(cells_C: np.ndarray) -> str:
    held: Sequence[int] = np.flatnonzero(cells_C).tolist()
    if not held:
        return ""
    shown = cells_C[held[0] : held[-1] + 1]
    top, values_C = int(shown.max()), cell_values()
    return _svg(
        f"<title>{values_C[held[0]]:.3g} to {values_C[held[-1]]:.3g}</title>"
        + "".join(
            f'<rect x="{3 * x}" y="{38 - 36 * n / top:.1f}" width="2" height="{36 * n / top:.1f}"/>'
            for x, n in enumerate(shown.tolist())
        ),
        3 * len(shown),
    )


def _svg(content: str, width: int) -> str:
    return f'<svg width="{width}" height="40" aria-hidden="true">{content}</svg>'
