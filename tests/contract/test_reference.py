"""The pages that people look things up in: every key, every variable, every word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from latentwatch.watchlist.build import build
from latentwatch.watchlist.document import schema

from tests.bench import render_results
from tests.support import reference
from tests.support.engines import ROOT

PAGES = [render_results.WATCHLIST_PAGE, render_results.SETTINGS_PAGE]
VARIABLE = re.compile(r"\b(?:LATENTWATCH|OTEL)_[A-Z0-9_]*[A-Z0-9]\b")
GLOSSARY = ROOT / "docs/glossary.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_table_is_made_of_the_code_as_it_is(page: Path) -> None:
    assert render_results.rendered(page) == page.read_text(), "run: python -m tests.bench.render_results"


def test_every_variable_that_the_code_names_has_a_row_with_a_text() -> None:
    rows = reference.variables()
    assert len(reference.literals()) > 10, "the code was read"
    assert reference.literals() - rows.keys() == set()
    assert [name for name, (_, text) in rows.items() if len(text) < 5] == []


def test_every_variable_that_a_document_the_chart_or_a_help_names_is_one() -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "dashboards").glob("*.md")]
    texts += [path for path in (ROOT / "helm").rglob("*") if path.is_file()]
    texts += (ROOT / "monitor/latentwatch/cli").glob("*.py")
    known = reference.variables().keys()
    # A beginning, and the forms for one signal.
    known |= {"LATENTWATCH_SETTING", "OTEL_EXPORTER_OTLP"}
    for path in texts:
        named = {re.sub("OTLP_(LOGS|METRICS)_", "OTLP_", name) for name in VARIABLE.findall(path.read_text())}
        assert named - known == set(), path


def test_every_key_of_the_schema_stands_on_the_page_of_the_watchlist() -> None:
    shown = set(re.findall(r"^\| `(\w+)` \|", render_results.WATCHLIST_PAGE.read_text(), re.MULTILINE))
    whole = schema()
    objects = [whole, *whole["$defs"].values(), whole["$defs"]["source"]["properties"]["defaults"]]
    keys = {key for one in objects for key in one["properties"]}
    assert len(keys) > 40
    assert keys - shown == set()


def test_the_example_builds_as_it_is(tmp_path: Path) -> None:
    built = build(ROOT / "docs/examples/watchlist.yaml", tmp_path / "w.safetensors", lambda line: None)
    assert {feature.id for feature in built.features} == {"probe_deception", "l1_f242", "l1_f382"}


def test_the_least_example_is_what_the_schema_allows() -> None:
    (shown,) = re.findall(
        r"^```yaml\n# watchlist.yaml\n(.*?)^```", render_results.WATCHLIST_PAGE.read_text(), re.M | re.S
    )
    import jsonschema

    jsonschema.validate(yaml.safe_load(shown), schema())


def test_the_glossary_has_the_words_that_strangers_ask_about_and_is_in_order() -> None:
    rows = re.findall(r"^\| ([^|]+?) \| (.+) \|$", GLOSSARY.read_text(), re.MULTILINE)[1:]
    words = [word for entry, _ in rows for word in entry.split(", ")]
    asked = "SAE|hook point|armed|inherited|books|phase|gate|season|e-value|page|probe|unseen|dropped|replica|drift"
    assert set(asked.split("|")) - set(words) == set()
    assert len(words) == len(set(words)), "one entry for each word"
    first = [entry.casefold() for entry, _ in rows]
    assert first == sorted(first)


def test_the_glossary_explains_every_word_of_the_table_of_names() -> None:
    """CONTRIBUTING says which word to use; what it means to a reader stands in the glossary too."""
    named = (ROOT / "CONTRIBUTING.md").read_text().partition("## Names")[2].partition("\n## ")[0]
    wanted = {word for entry in re.findall(r"^\| ([^|]+?) \|", named, re.MULTILINE) for word in entry.split(", ")}
    words = {
        w for entry in re.findall(r"^\| ([^|]+?) \|", GLOSSARY.read_text(), re.MULTILINE) for w in entry.split(", ")
    }
    assert wanted - words - {"calibrate"} == set()


SAID = (
    *("page means", "a page about what it thinks", "page about the same model", "page is then not shown"),
    *("page to the request", "just a page"),
)
"""Of what wakes a person, beside the verb."""


def test_a_page_in_what_people_read_is_what_wakes_a_person() -> None:
    """What a browser shows is the live page; what is written to a file is HTML."""
    texts = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "helm/README.md", ROOT / "helm/values.yaml"]
    texts += [*(ROOT / "monitor/latentwatch/cli").glob("*.py"), ROOT / "monitor/latentwatch/collector/config.py"]
    # What a browser's process holds, what a table calls its rows, and the code.
    others = {"results.md", "metrics.md", "architecture.md"}
    bare = re.compile(r"\b(?:the|its|a|this|our|just a) page\b[^.;|]{0,25}")
    found = [
        (path.name, text)
        for path in texts
        if path.name not in others
        for text in bare.findall(path.read_text())
        if not any(one in text.casefold() for one in SAID)
    ]
    assert found == []
