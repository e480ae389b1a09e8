"""What the host refuses, one thing at a time; all of it together: tests/e2e/test_hostile_environment.py."""

from __future__ import annotations

import errno
import logging
import os
import pwd
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from latentwatch import host
from latentwatch.cli.http_client import Web
from latentwatch.collector.telemetry import Telemetry, TelemetrySettings
from latentwatch.engines.vllm.settings import PluginSettings
from latentwatch.errors import ConfigRefused
from latentwatch.evidence.segment import Watched
from latentwatch.export.otel_events import channel_options
from latentwatch.handover.memory_file import memory_file
from latentwatch.transport.places import Places
from latentwatch.transport.tcp_listener import Listener


@pytest.fixture(autouse=True)
def same_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_what_is_optional_is_a_line_in_the_log(number: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with host.optional("a luxury"):
        raise OSError(number, os.strerror(number))
    with host.optional("a luxury"):
        raise OverflowError("what os.sched_getaffinity makes of EINVAL")
    assert caplog.text.count("goes on without a luxury") == 2


def test_a_user_without_a_line_has_a_name_and_the_environment_does_not_give_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert host.user_name() == pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(os, "geteuid", lambda: 10001)
    assert host.user_name() == "uid:10001"


@pytest.mark.parametrize(("before", "after"), [(0o000, 0o002), (0o777, 0o077), (0o022, 0o022), (0o027, 0o027)])
def test_files_are_the_users_own_whatever_the_parent_asked(before: int, after: int) -> None:
    os.umask(before)
    host.prepare_process()
    assert os.umask(0o022) == after


def test_more_files_may_be_open_than_a_service_manager_allows_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 524_288))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: told.append(limits))
    host.prepare_process()
    assert told == [(65_536, 524_288)]


def test_no_file_of_ours_has_the_number_of_a_standard_stream() -> None:
    code = (
        "import os, sys\n"
        "for number in (0, 1, 2): os.close(number)\n"
        "from latentwatch.handover.memory_file import memory_file\n"
        "from latentwatch import host\n"
        "ring = memory_file('ring')\n"
        "host.prepare_process()\n"
        "opened = os.open('/dev/null', os.O_RDONLY)\n"
        "os._exit(100 if ring > 2 and opened > 2 and os.fstat(1) and os.fstat(2) else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 100


@pytest.mark.parametrize("shared", [True, False])
def test_a_ring_needs_no_memfd(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(os, "access", lambda *_: shared)
    made = memory_file("ring")
    os.ftruncate(made, 4096)
    assert os.fstat(made).st_size == 4096 and os.fstat(made).st_nlink == 0
    os.close(made)


def test_a_host_without_a_name_costs_no_monitoring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(socket, "gethostname", refuse)
    assert host.host_name() == ""
    assert PluginSettings.from_env({}).replica == "unnamed"


@pytest.mark.parametrize(
    ("name", "is_this_one"),
    [
        ("localhost", True),
        ("LocalHost.", True),
        ("metrics.localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", True),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_which_names_are_this_host(name: str, is_this_one: bool) -> None:
    assert host.is_loopback(name) is is_this_one
    in_url = f"[{name}]" if ":" in name and "[" not in name else name
    assert bool(channel_options(f"http://{in_url}:4317")) is is_this_one


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://x:y", "http://[", "http://127.0.0.1:9"])
def test_this_host_is_asked_without_the_proxy_and_one_that_nobody_understands_is_named(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    with socket.create_server(("127.0.0.2", 0)) as server:
        url = f"http://127.0.0.2:{server.getsockname()[1]}"
        with pytest.raises(ConfigRefused, match="timed out"):
            Web(url, timeout_seconds=0.2).get("/")
        connection, _ = server.accept()
        connection.close()
    with pytest.raises(ConfigRefused):
        Web("http://192.0.2.1", timeout_seconds=0.2).get("/")


def test_a_folder_for_sockets_is_found_where_tmpdir_is_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("t" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with host.socket_folder() as folder:
        assert len(folder) < 64 and Path(folder).stat().st_mode & 0o777 == 0o700
    assert not list(long.iterdir())


def test_a_host_without_any_folder_for_sockets_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(ConfigRefused, match=r"Read-only file system.*TMPDIR"):
        Listener(None, lambda _: None, Places(1, 1))


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_COMPRESSION"])
def test_a_variable_of_opentelemetry_that_means_nothing_is_refused_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "nonsense")
    with pytest.raises(ConfigRefused, match="OTEL_EXPORTER_OTLP"):
        Telemetry(TelemetrySettings("http://127.0.0.1:4317"), Watched("w", "", ()), lambda: 0.0)
