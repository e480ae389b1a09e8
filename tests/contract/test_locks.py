"""The lock files go into one environment without dependencies resolved again, so they must agree with each other."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest

from tests.support.engines import ROOT

LOCKS = sorted((ROOT / ".requirements").glob("*.txt"))
LOCKED = [path for path in LOCKS if path.with_suffix(".in").exists()]


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE))


def name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0].lower())


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(LOCKED, 2)), ids=lambda path: path.stem)
def test_what_two_locks_share_has_one_version(one: Path, other: Path) -> None:
    first, second = pins(one), pins(other)
    assert first and second, "the files were read"
    assert {key: (first[key], second[key]) for key in first.keys() & second.keys() if first[key] != second[key]} == {}


@pytest.mark.parametrize("path", LOCKED, ids=lambda path: path.stem)
def test_a_lock_names_versions_and_no_address(path: Path) -> None:
    whole = path.read_text().replace(" \\\n", "")
    lines = [line for line in whole.splitlines() if line and not line.startswith("#")]
    wanted = r"[\w.-]+==[\w.+!-]+( ; .+)?( +--hash=sha256:[0-9a-f]{64})*"
    assert [line for line in lines if not re.fullmatch(wanted, line)] == []


def test_what_the_documents_need_is_the_extra() -> None:
    wanted = (ROOT / ".requirements/docs.in").read_text().splitlines()
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    assert {name(line) for line in wanted if not line.startswith(("#", "-"))} == {name(one) for one in extra}
