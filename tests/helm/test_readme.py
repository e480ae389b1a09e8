"""helm/README.md and docs/kubernetes.md are contracts too: links, figures, commands and values are real."""

from __future__ import annotations

import itertools
import re
import shlex

import pytest
import yaml
from latentwatch.cli import build_parser
from latentwatch.export.metrics import sample_names

from tests.support import chart
from tests.support.engines import ROOT

README = chart.HELM / "README.md"
GUIDE = ROOT / "docs" / "kubernetes.md"
PAGES = pytest.mark.parametrize("page", [README, GUIDE], ids=lambda page: page.name)


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page, *start: str) -> list[list[str]]:
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines() if line]
    return [words for line in lines if (words := shlex.split(line, comments=True))[: len(start)] == list(start)]


@PAGES
def test_every_link_exists(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_its_figures_are_those_of_the_tests():
    text = README.read_text()
    assert f"over {len(dict(chart.matrix()))} combinations of values" in text
    assert f"strict schemas of Kubernetes {chart.OLDEST} and {chart.NEWEST}" in text


@PAGES
def test_every_command_of_ours_parses(page):
    for command in commands(page, "latentwatch"):
        build_parser().parse_args(command[1:])


@PAGES
def test_every_value_and_metric_that_is_named_exists(page):
    schema = chart.chart().schema
    assert schema is not None
    for path in re.findall(r"`([a-z]\w+(?:\.\w+)+)(?:=\w+)?`", page.read_text()):
        node = schema
        for key in path.split("."):
            node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
            assert key in node["properties"], path
            node = node["properties"][key]
    named = set(re.findall(r"`(latentwatch_\w+)`", page.read_text()))
    assert named <= sample_names()


@PAGES
def test_the_install_command_renders_with_the_values_beside_it(page):
    (install,) = commands(page, "helm", "install")
    values: chart.Object = {}
    # Each block of values adds to the one before, as the page says.
    for block in blocks(page, "yaml"):
        values = chart.merged(values, yaml.safe_load(block))
    for option, argument in itertools.pairwise(install):
        if option == "--set":
            for assignment in argument.split(","):
                path, _, value = assignment.partition("=")
                for key in reversed(path.split(".")):
                    value = {key: value}
                values = chart.merged(values, value)
    found = chart.objects(values, release=install[2])
    assert {one["kind"] for one in found} >= {"Deployment", "Service", "ConfigMap", "NetworkPolicy"}
    made = {(one["kind"].lower(), one["metadata"]["name"]) for one in found}
    for command in commands(page, "kubectl"):
        for kind, name in itertools.pairwise(command):
            if kind == "configmap" and command[3] == "get":
                assert (kind, name) in made
        for word in command:
            if match := re.fullmatch(r"(deployment|svc)/(latentwatch-\S+)", word):
                assert (match[1].replace("svc", "service"), match[2]) in made
