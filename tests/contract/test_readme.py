"""README is a contract: its figures come from files, its links and pictures exist, its commands are real."""

from __future__ import annotations

import re
import shlex

import pytest

from monitor.cli import build_parser
from tests.bench import readme
from tests.support.engines import ROOT

TEXT = readme.README.read_text()
FENCED = re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_tables_are_those_of_the_result_files():
    assert readme.rendered(TEXT) == TEXT, "run: python -m tests.bench.readme"


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)", TEXT))
def test_every_link_and_picture_exists(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(tests/[\w/.]+)`", TEXT))))
def test_every_test_that_is_named_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("line", re.findall(r"^latentwatch [^\n]+", "\n".join(FENCED), re.MULTILINE))
def test_every_command_parses(line):
    build_parser().parse_args(shlex.split(line.rstrip("& "), comments=True)[1:])


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", TEXT))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
