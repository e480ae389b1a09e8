"""helm/README.md is a contract too: its links exist, its figures are those of the tests, its commands give a chart."""

from __future__ import annotations

import itertools
import re
import shlex

import pytest

from tests.support import chart

TEXT = (chart.HELM / "README.md").read_text()
COMMANDS = [
    shlex.split(command)
    for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
    if command
]


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)", TEXT))
def test_every_link_exists(target):
    assert (chart.HELM / target).exists()


def test_its_figures_are_those_of_the_tests():
    assert f"over {len(dict(chart.matrix()))} combinations of values" in TEXT
    assert f"strict schemas of Kubernetes {chart.OLDEST} and {chart.NEWEST}" in TEXT


def test_the_install_command_renders():
    (install,) = (command for command in COMMANDS if command[:2] == ["helm", "install"])
    values: chart.Object = {}
    for option, argument in itertools.pairwise(install):
        if option == "--set":
            for assignment in argument.split(","):
                path, _, value = assignment.partition("=")
                for key in reversed(path.split(".")):
                    value = {key: value}
                values = chart.merged(values, value)
    assert {one["kind"] for one in chart.objects(values)} >= {"Deployment", "Service", "ConfigMap", "NetworkPolicy"}
