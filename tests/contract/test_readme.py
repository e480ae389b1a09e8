"""README is a contract: its figures come from files, its links and pictures exist. Its commands: test_commands.py."""

from __future__ import annotations

import re

import pytest

from tests.bench import readme
from tests.support.engines import ROOT

TEXT = readme.README.read_text()


def test_tables_are_those_of_the_result_files():
    assert readme.rendered(TEXT) == TEXT, "run: python -m tests.bench.readme"


def test_the_list_of_metrics_is_that_of_the_table():
    text = readme.METRICS_PAGE.read_text()
    assert readme.rendered_metrics(text) == text, "run: python -m tests.bench.readme"


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)", TEXT))
def test_every_link_and_picture_exists(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(tests/[\w/.]+)`", TEXT))))
def test_every_test_that_is_named_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", TEXT))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
