"""Addresses that no other test uses."""

from __future__ import annotations

import logging
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A path short enough for a Unix socket; pytest's own folders often are not."""
    with tempfile.TemporaryDirectory(prefix="lw") as folder:
        yield Path(folder) / "c.sock"


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, socket_path: Path) -> str:
    if request.param == "unix":
        return f"unix://{socket_path}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_error_in_the_background(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """An exception in a thread or task of gRPC is only logged; here it fails the test."""
    yield
    for record in caplog.get_records("call"):
        # A server that stops says which streams it cut. On a busy machine one has not ended by itself until then.
        cut = record.getMessage().endswith("due to server stop.")
        ours = record.name.startswith("latentwatch.")
        assert ours or cut or record.levelno < logging.WARNING, (record.name, record.getMessage(), record.exc_text)
