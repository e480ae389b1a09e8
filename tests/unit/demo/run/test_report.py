"""The report as a page without a network, safe against its own texts, and as lines in a terminal."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from latentwatch.demo.run import plots, report
from latentwatch.demo.run.outcome import Run
from latentwatch.demo.run.terminal import Terminal
from latentwatch.demo.run.watch import EngineTokens, Sample

from tests.support.demo_run import BEGAN, LABELS, a_run


def nothing_seen() -> Run:
    return replace(
        a_run(), answers=[], exceedances=[], scores={}, pages=[], samples=[Sample(BEGAN)], engine=EngineTokens(0, 0, 0)
    )


RUNS = {"whole": a_run(), "no paging": a_run(paging="--no-prometheus was given"), "nothing": nothing_seen()}


@pytest.fixture(params=list(RUNS), ids=lambda name: name.replace(" ", "-"))
def page(request: pytest.FixtureRequest) -> str:
    return report.to_html(RUNS[request.param])


def test_the_page_needs_nothing_from_the_network(page: str) -> None:
    without_namespaces = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|<script|https?://(?!127\.0\.0\.1)", without_namespaces)


def test_every_plot_is_well_formed_xml(page: str) -> None:
    plots_found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert plots_found
    for svg in plots_found:
        ElementTree.fromstring(svg)
        assert not re.findall(r'="-?(?:nan|inf)', svg)


def test_every_placeholder_was_filled(page: str) -> None:
    assert not re.findall(r"\$[a-z_]+", page)


def test_texts_of_prompts_answers_and_labels_cannot_become_markup() -> None:
    page = report.to_html(RUNS["whole"])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "Topic 0 <b>" not in page


def test_the_page_shows_a_dot_for_every_request_and_critical_feature() -> None:
    page = report.to_html(RUNS["whole"])
    assert page.count('<circle class="dot') == 200 * len(LABELS)
    assert page.count('<circle class="dot feared over"') == len(RUNS["whole"].exceedances)


def test_the_terminal_says_both_sums_and_every_check() -> None:
    out = io.StringIO()
    report.to_terminal(RUNS["whole"], Terminal(out))
    text = out.getvalue()
    assert "9,800 = prompt 6,000 + output 4,000 - 200 last tokens" in text
    assert "9,800 = scored 9,000 + inherited 800 + unseen 0 + dropped 0" in text
    for check in RUNS["whole"].checks():
        assert f"✓ {check.name}" in text


def test_the_terminal_says_what_was_found_where_a_check_failed() -> None:
    out = io.StringIO()
    report.to_terminal(nothing_seen(), Terminal(out))
    assert "✗ tokens were scored: 0 tokens scored" in out.getvalue()


@pytest.mark.parametrize("total", [0.3, 1.0, 2.2, 41.0, 3600.0])
def test_an_axis_has_a_handful_of_ticks_from_zero(total: float) -> None:
    span = plots.Span(total, 0.0, total)
    labels = re.findall(r"([\d.]+) s</text>", plots.lanes([], span))
    assert 3 <= len(labels) <= 9
    assert labels[0] == "0"
    assert float(labels[-1]) <= total
