"""What holds for the whole suite: in CI a test that should run here must not be skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

ALLOWED_SKIPS = (
    "no GPU",
    "needs the upstream library",
    "the Gemma terms",  # a person accepts them, no machine does
)
"""How a skip reason may begin in CI: what neither this machine nor its package set can have."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith(ALLOWED_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped in CI, where it should run: {reason}"
    return report
