"""README and the pages of figures are contracts: what they show comes from files.

Their commands: test_commands.py. Their links: test_documents.py.
"""

from __future__ import annotations

import re

import pytest

from tests.bench import render_results
from tests.support.engines import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = render_results.RESULTS_PAGE.read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", render_results.PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_what_they_show(page):
    assert render_results.rendered(page) == page.read_text(), "run: python -m tests.bench.render_results"


def test_a_table_that_differs_in_one_figure_is_noticed(monkeypatch):
    """That the comparison above can fail at all."""
    monkeypatch.setitem(render_results.BLOCKS, "probes", lambda: render_results.probes().replace("0.", "1.", 1))
    assert render_results.rendered(render_results.RESULTS_PAGE) != RESULTS


def test_the_readme_is_one_page_and_says_its_limits_beside_its_promises():
    lines = README.splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 120
    promises = README.partition("## What it promises")[2].partition("\n## ")[0]
    assert "(docs/limits.md)" in promises and "missed" in promises


def test_a_promise_of_the_readme_stands_in_full_among_the_results():
    numbers = re.findall(r"^\| (I\d) \|", README, re.MULTILINE)
    assert numbers == [f"I{i}" for i in range(1, 8)]
    assert set(numbers) <= set(re.findall(r"^\| (I\d) \|", RESULTS, re.MULTILINE))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(tests/[\w/.]+)`", README + RESULTS))))
def test_every_test_that_is_named_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", README + RESULTS))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
