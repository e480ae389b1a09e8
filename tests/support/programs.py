"""Real programs that some tests need: found, or the test is skipped here and fails in CI."""

from __future__ import annotations

import os
import shutil

import pytest

PACKAGES = {
    "promtool": "prometheus",
    "prometheus": "prometheus",
    "amtool": "prometheus-alertmanager",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "chromium": "chromium",
}
"""Program to Debian package."""


def real_required() -> bool:
    """Whether a missing program is a failure. In CI a skip would read as a pass."""
    return os.environ.get("LATENTWATCH_REQUIRE_REAL", "") == "1" or os.environ.get("CI", "").lower() in ("1", "true")


def program(name: str) -> str:
    """Path of a real program; skips the calling test where it is absent, fails it where CI requires it."""
    if path := shutil.which(name):
        return path
    message = f"{name} is not installed: apt-get install {PACKAGES[name]}"
    if real_required():
        pytest.fail(message)
    pytest.skip(message)
