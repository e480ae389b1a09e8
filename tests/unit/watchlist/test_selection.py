"""watchlist.yaml: what a person gets wrong is named with its place, what was found and what to write instead."""

from __future__ import annotations

import copy
import string
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.errors import ConfigRefused, WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import selection
from latentwatch.watchlist.document import schema
from latentwatch.watchlist.figures import Figures
from latentwatch.watchlist.places import hook_point

from tests.support.sources import document, hook, source

BASE = Path("/nonexistent")


def parse(content: Any) -> selection.Selection:
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    return selection.parse(text.encode(), "watchlist.yaml", BASE)


def valid() -> dict[str, Any]:
    return document(hook(2, source("saelens", "sae")), hook(4, source("linear_probe", "p.safetensors", prefix="p")))


def test_every_field_of_the_schema_is_described_and_closed() -> None:
    """The schema is the reference that editors show; an open object would swallow a misspelt key."""
    jsonschema.Draft202012Validator.check_schema(schema())

    def walk(node: Any, path: str) -> None:
        if not isinstance(node, dict) or "$ref" in node:
            return
        if "type" in node:
            assert node.get("description"), path
        if node.get("type") == "object":
            assert "additionalProperties" in node, path
            assert node["additionalProperties"] is False or "propertyNames" in node, path
        for name, child in node.get("properties", {}).items():
            walk(child, f"{path}.{name}")
        walk(node.get("items"), f"{path}[]")
        for name, child in node.get("$defs", {}).items():
            walk(child, name)

    walk(schema(), "watchlist")


def test_the_schema_names_every_format_that_has_a_reader() -> None:
    from latentwatch.watchlist.sources import FORMATS

    assert schema()["$defs"]["source"]["properties"]["format"]["enum"] == list(FORMATS)


def test_the_figures_that_the_schema_knows_are_those_that_a_feature_carries() -> None:
    assert list(schema()["$defs"]["evidence"]["properties"]) == list(Figures.__annotations__)


def change(path: str, value: Any = None, *, remove: bool = False) -> dict[str, Any]:
    """A valid document with one value replaced, added or removed; the path is dotted."""
    content = valid()
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node: Any = content
    for part in parents:
        node = node[part]
    if remove:
        del node[last]
    else:
        node[last] = value
    return content


FEATURE = "hook_points.0.sources.0.features.1"


@pytest.mark.parametrize(
    ("content", "where", "found", "instead"),
    [
        (change(f"{FEATURE}.severty", "info"), "features[1]", "unknown key 'severty'", "Did you mean 'severity'?"),
        (change(f"{FEATURE}.id", 12), "features[1].id", "12 is a number, not text", "Quote it"),
        (change(f"{FEATURE}.id", "a b"), "features[1].id", "does not match", "metric label"),
        (change(f"{FEATURE}.id", remove=True), "features[1]", "'id' is missing", "Stable"),
        (change(f"{FEATURE}.severity", "high"), "features[1].severity", "'high' is not one of", "critical"),
        (change(f"{FEATURE}.name", "x"), "features[1]", "both index and name", "exactly one"),
        (change(f"{FEATURE}.index", remove=True), "features[1]", "neither index nor name", "exactly one"),
        (change(f"{FEATURE}.index", -1), "features[1].index", "less than the minimum", "Row"),
        (change(f"{FEATURE}.label", "two\nlines"), "features[1].label", "does not match", "one line"),
        (change(f"{FEATURE}.evidence", {"auroc": 1.5}), "evidence.auroc", "greater than the maximum", "ROC"),
        (change(f"{FEATURE}.limit", {"statistic": "max"}), "limit", "'value' is missing", "units"),
        (
            change(f"{FEATURE}.limit", {"statistic": "max", "value": 1, "window_tokens": 4}),
            "features[1].limit",
            "window_tokens 4 with statistic 'max'",
            "Use 1 with max",
        ),
        (
            change(f"{FEATURE}.limit", {"statistic": "max", "value": float("nan")}),
            "limit.value",
            "not a finite number",
            "finite",
        ),
        (change("hook_points.0.hook_point", "resid_post.6"), "hook_point", "model of 6 layers", "resid_post.5"),
        (change("hook_points.0.hook_point", "mlp_out.1"), "hook_point", "not one of resid_post", "resid_post"),
        (change("hook_points.1.hook_point", "resid_post.2"), "hook_points[1]", "stands twice", "one entry"),
        (change("hook_points.0.sources.0.format", "pickle"), "sources[0].format", "'pickle' is not one of", "format"),
        (change("hook_points.0.sources.0.defaults", remove=True), "features[0]", "'severity' is missing", "defaults"),
        (change("model.layers", remove=True), "model", "layers missing", "config"),
        (change("model.config", "config.json"), "model", "config and also architecture", "config alone"),
        (change("model.dtypes", ["int8"]), "dtypes[0]", "'int8' is not one of", "dtype"),
        (change("hook_points", []), "hook_points", "non-empty", "places"),
        (change("name", None), "name", "empty, not text", "Name"),
        ([1, 2], "the file", "a list, not a mapping", "What to watch"),
        ("", "the file", "empty, not a mapping", "What to watch"),
        ("name: a\nname: b\n", "name, line 2", "stands twice", "Keep one"),
        ("a: &x [1]\nb: *x\n", "b, line", "alias", "Write the value out"),
        (
            "a: !!python/object/apply:os.system ['true']\n",
            "watchlist.yaml",
            "could not determine a constructor",
            "line",
        ),
        ("a: [1, 2\n", "watchlist.yaml", "not YAML", "Correct"),
        ("1: a\n", "the file", "is not text", "Quote"),
        ('name: "\\ud800"\n', "name", "surrogate", "character"),
        ("a: 2024-01-01\n", "the file", "unknown key 'a'", "Known here"),
        ("[" * 5000, "watchlist.yaml", "cannot be read", "Correct"),
    ],
)
def test_a_mistake_is_named_with_its_place(content: Any, where: str, found: str, instead: str) -> None:
    with pytest.raises(WatchlistRefused) as refusal:
        parse(content)
    assert where in refusal.value.what
    assert found in refusal.value.found
    assert instead in refusal.value.instead


def test_the_line_of_a_mistake_is_its_line_in_the_file() -> None:
    text = yaml.safe_dump(change(f"{FEATURE}.severity", "high"), sort_keys=False)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "severity: high" in row)
    with pytest.raises(WatchlistRefused, match=f"line {line}:"):
        parse(text)


def test_defaults_fill_what_a_feature_leaves_out_and_nothing_else() -> None:
    content = valid()
    content["hook_points"][0]["sources"][0]["defaults"] = {"severity": "warning", "skip_first_positions": 4}
    content["hook_points"][0]["sources"][0]["features"][0]["severity"] = "critical"
    first, second, _ = parse(content).hooks[0].sources[0].features
    assert (first.severity, first.skip_first_positions) == ("critical", 4)
    assert second.severity == "warning"


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] + [place for key, child in children for place in places(child, (*path, key))]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_to_a_valid_file_is_read_or_refused_with_three_sentences(data: st.DataObject) -> None:
    content: Any = copy.deepcopy(valid())
    path = data.draw(st.sampled_from([place for place in places(content) if place]))
    node = content
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = data.draw(values)
    try:
        parse(yaml.safe_dump(content, allow_unicode=True))
    except WatchlistRefused as refusal:
        assert refusal.what
        assert refusal.found
        assert refusal.instead


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=string.printable + "é\u2028\U0001f600", max_size=200) | st.binary(max_size=200))
def test_any_text_or_bytes_are_refused_and_never_crash(text: str | bytes) -> None:
    with pytest.raises(WatchlistRefused):
        selection.parse(text.encode() if isinstance(text, str) else text, "w.yaml", BASE)


@pytest.mark.parametrize(
    "text", ["resid_post.2", "blocks.2.hook_resid_post", "blocks.3.hook_resid_pre", "model.layers.2"]
)
def test_a_place_may_be_written_as_other_projects_do(text: str) -> None:
    assert hook_point(text) == HookPoint(2)


@pytest.mark.parametrize("text", ["resid_post.02", "blocks.0.hook_resid_pre", "blocks.2.mlp.hook_post", "mlp_out.1"])
def test_a_place_that_cannot_be_watched_is_refused(text: str) -> None:
    with pytest.raises(ConfigRefused, match="is not one of resid_post"):
        hook_point(text)
