"""The house keeps its measures: sizes, imports, `Any` and names, and the published figures are those of today."""

from __future__ import annotations

import ast
import json

import pytest

from tests.bench import house as bench
from tests.support import house

DRIFT = 0.05
"""A published figure may be this share of its goal off, so that not every commit writes the file again. Where the goal
is small or nothing that is nothing: chains and cycles are exact."""


@pytest.fixture(scope="module")
def rows():
    return {row.measure: row for row in bench.measured(bench.PACKAGE)}


@pytest.fixture(scope="module")
def published():
    return {row["measure"]: row for row in json.loads(bench.RESULT.read_text())["rows"]}


@pytest.mark.parametrize("measure", house.GOALS)
def test_the_goal_is_met(measure, rows):
    row = rows[measure]
    assert row.meets_goal, f"{measure}: {row.value}, at most {row.goal} wanted; see {row.where}"


def test_the_published_table_has_every_row_and_the_goals_as_they_are(rows, published):
    assert {measure: row["goal"] for measure, row in published.items()} == {m: row.goal for m, row in rows.items()}


@pytest.mark.parametrize("measure", house.GOALS)
def test_the_published_figure_is_todays_and_meets_its_goal(measure, rows, published):
    """Red: run make bench-house."""
    value, goal = published[measure]["value"], house.GOALS[measure]
    assert value <= goal
    assert abs(value - rows[measure].value) <= DRIFT * goal


# The measuring itself, on packages of a few lines.


def package(**sources):
    """Modules of a package p; a name with __ stands for one with a dot."""
    names = {name.replace("__", "."): source for name, source in sources.items()}
    packages = {name.rpartition(".")[0] for name in names}
    return [
        house.Module(f"p.{name}" if name else "p", source, ast.parse(source), name in packages)
        for name, source in names.items()
    ]


@pytest.mark.parametrize(
    ("source_of_b", "at_run_time", "for_types"),
    [
        ("import p.a", ["p.a", "p.b"], ["p.a", "p.b"]),
        ("from p.a import x", ["p.a", "p.b"], ["p.a", "p.b"]),
        ("from . import a", ["p.a", "p.b"], ["p.a", "p.b"]),
        ("try:\n    import p.a\nexcept ImportError:\n    pass", ["p.a", "p.b"], ["p.a", "p.b"]),
        ("if TYPE_CHECKING:\n    from p.a import x", [], ["p.a", "p.b"]),
        ("def f():\n    import p.a", [], ["p.a", "p.b"]),
        ("import numpy", [], []),
    ],
)
def test_a_circle_is_found_however_it_is_imported(source_of_b, at_run_time, for_types):
    modules = package(a="from p.b import y", b=source_of_b)
    assert house.largest_cycle(house.imports(modules)) == at_run_time
    assert house.largest_cycle(house.imports(modules, every=True)) == for_types


def test_a_chain_counts_modules_and_a_circle_in_it_once():
    modules = package(a="import p.b", b="import p.c", c="import p.b, p.d", d="import p.e", e="")
    assert len(house.longest_chain(house.imports(modules))) == 4


def test_importing_a_module_runs_the_packages_above_it():
    modules = package(a="import p.sub.b", sub="import p.c", sub__b="", c="")
    assert house.imports(modules)["p.a"] == {"p.sub", "p.sub.b"}
    assert house.longest_chain(house.imports(modules)) == ["p.a", "p.sub", "p.c"]


def test_any_counts_where_it_is_used():
    tree = ast.parse("from typing import Any\ndef f(x: Any, y: dict[str, Any]) -> None:\n    '''Any text.'''\n")
    assert house.count_any(tree) == 2


def test_an_error_carries_a_value_where_its_text_is_not_always_the_same():
    tree = ast.parse("raise E('no')\nraise E(f'no')\nraise E(f'no {x}')\nraise E('no', found=x)\nraise\nraise error\n")
    assert list(house.errors(tree)) == [False, False, True, True]


def test_lines_of_a_function_run_from_def_to_its_end_without_blank_ones():
    (module,) = package(a="@cached\ndef f():\n    x = 1\n\n    return x\n")
    assert list(house.sizes(module, house.Function)) == [("p.a:2 f", 3)]
