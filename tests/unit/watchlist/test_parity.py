"""Our scores are the library's scores: golden fixtures of every format, made by the upstream libraries' own classes."""

from __future__ import annotations

import importlib.util
import json

import pytest
from latentwatch.watchlist.sources import FORMATS

from tests.support import parity

NEEDS = {"sklearn_probe": "skops"}


@pytest.mark.parametrize("case", parity.cases())
def test_scores_are_what_the_upstream_class_encodes(case: str) -> None:
    row_format = json.loads((parity.GOLDEN / case / "case.json").read_text())["format"]
    if row_format in NEEDS and importlib.util.find_spec(NEEDS[row_format]) is None:
        pytest.skip(f"needs the optional package {NEEDS[row_format]}")
    row = parity.measure(case)
    assert row["fires"] > 90, "a case in which nothing fires would prove nothing"
    assert row["max_abs_error"] <= parity.MAX_ABS_ERROR
    assert row["gate_flips"] == 0


def test_every_format_has_a_golden_case() -> None:
    """linear_probe is our own format; test_build.py holds it to its definition."""
    covered = {json.loads((parity.GOLDEN / case / "case.json").read_text())["format"] for case in parity.cases()}
    assert covered == set(FORMATS) - {"linear_probe"}
