"""Every reason of a refusal is a member of RefusalReason: metrics, alerts and docs have one list of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import latentwatch
from latentwatch.collector.core import Core
from latentwatch.collector.metrics_families import Families
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.export.prometheus import render

from tests.support.streams import sparse, watchlist

PACKAGE = Path(latentwatch.__file__).parent
WORDS_OF_THEIR_OWN = {"limit_fpr"}
"""Reasons that are also names of something else: a field of a baseline's card."""
SOURCES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py")) if "_pb" not in path.parts}


def literals(source: str) -> Iterator[tuple[int, str]]:
    """Text where a reason is given: as the argument or the default of `reason`, or in a call that refuses."""
    for node in ast.walk(ast.parse(source)):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Call):
            found += [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            if "refuse" in ast.unparse(node.func).lower():
                found += [arg for arg in node.args if isinstance(arg, ast.Constant) and arg.value in set(RefusalReason)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args][-len(arguments.defaults) :] if arguments.defaults else []
            pairs = [*zip(named, arguments.defaults, strict=True)]
            pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            found += [default for arg, default in pairs if arg.arg == "reason"]
        for value in found:
            for part in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value:
                    yield part.lineno, part.value


def test_the_rule_sees_a_literal_wherever_a_reason_is_given():
    for source in (
        'Refused("a", reason="b")',
        'Refused("a", reason="b" if c else RefusalReason.D)',
        'def _refuse(found, reason="b"): ...',
        'def _refuse(found, *, reason: str = "b"): ...',
        'self._on_refused("http_slow")',
    ):
        assert list(literals(source)), source
    assert not list(literals('Refused("a", reason=RefusalReason.B); Window(reason="")'))


def test_no_reason_is_a_literal():
    assert [f"{path.name}:{line} {text}" for path, source in SOURCES.items() for line, text in literals(source)] == []


def test_every_reason_is_given_somewhere_and_says_when():
    named = {
        node.attr
        for source in SOURCES.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "RefusalReason"
    }
    assert named == {reason.name for reason in RefusalReason}
    assert all(reason.when and reason == reason.name.lower() for reason in RefusalReason)


def test_no_text_of_the_package_is_a_reason_spelled_again():
    """A field or a constant that holds one is as good a place to misspell it as an argument."""
    slugs = {reason.value for reason in RefusalReason if "_" in reason.value} - WORDS_OF_THEIR_OWN
    spelled = [
        f"{path.name}:{node.lineno} {node.value}"
        for path, source in SOURCES.items()
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and node.value in slugs
    ]
    assert spelled == []


def test_what_is_counted_has_a_series_from_the_start():
    core = Core(watchlist((sparse("a"),)))
    page = render(Families(core.watchlist).of(core.lookup.snapshot(0.0), ProcessFacts(0.0, 0, 0.0)), open_metrics=False)
    shown = set(re.findall(r'latentwatch_streams_refused_total{[^}]*reason="(\w+)"', page.decode()))
    assert shown == {reason.value for reason in RefusalReason if reason.counted}


def test_a_refusal_carries_its_slug_as_text():
    refusal = ConfigRefused("a", found="b", instead="c", reason=RefusalReason.CONFIG_VALUE)
    assert type(refusal.reason) is str and refusal.reason == "config_value"
