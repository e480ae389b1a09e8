"""Who may read a collector over HTTP."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from latentwatch.cli import main
from latentwatch.collector.http import server
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.watchlist import file as watchlist_file

from tests.support.streams import sparse, watchlist
from tests.support.wire import eventually, in_loop

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    watchlist_file.write(watchlist([sparse("f")]), tmp_path / "w.safetensors")
    (tmp_path / "token").write_text(TOKEN)
    made = Service(
        CollectorSettings(
            tmp_path / "w.safetensors",
            (f"unix://{tmp_path}/c.sock",),
            "127.0.0.1:0",
            http_token_files=(tmp_path / "token",),
        )
    )
    in_loop(made.start())
    yield made
    in_loop(made.stop())


def status(service: Service, path: str, authorization: str = "") -> tuple[int, dict[str, str]]:
    headers = {"Authorization": authorization} if authorization else {}
    request = urllib.request.Request(service.http_url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)


def refused(service: Service, reason: str) -> int:
    return service.pipeline.snapshot(time.time()).collector.streams_refused.get(reason, 0)


@pytest.mark.parametrize("path", ["/", "/metrics", "/openapi.json", "/v1/overview", "/v1/requests", "/nothing"])
def test_without_the_token_nothing_is_told_and_it_is_counted(service, path):
    code, headers = status(service, path)
    assert code == 401 and headers["www-authenticate"].startswith("Basic")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert status(service, path, "Bearer wrong-horse-battery-staple")[0] == 401
    assert refused(service, "http_unauthenticated") == 2


def test_with_the_token_everything_is_told_and_health_needs_none(service):
    basic = b64encode(f"anyone:{TOKEN}".encode()).decode()
    assert status(service, "/metrics", f"Bearer {TOKEN}")[0] == 200
    assert status(service, "/", f"Basic {basic}")[0] == 200
    assert status(service, "/healthz")[0] == 200
    assert refused(service, "http_unauthenticated") == 0


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nHost: c\r\n\r\n"], ids=["first", "second"])
def test_a_request_that_dribbles_is_cut_off_and_counted(service, monkeypatch, first):
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", urlsplit(service.http_url).port), timeout=10) as peer:
        if first:
            peer.sendall(first)
            assert peer.recv(1 << 16).startswith(b"HTTP/1.1 200")
        peer.sendall(b"GET / HT")
        try:
            while peer.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
    eventually(lambda: refused(service, "http_slow") == 1)


def test_half_of_what_tls_needs_is_refused_in_one_line(tmp_path, capsys):
    watchlist_file.write(watchlist([sparse("f")]), tmp_path / "w.safetensors")
    arguments = ["collector", "--watchlist", str(tmp_path / "w.safetensors"), "--tls-client-ca", "ca.pem"]
    assert main(arguments) == 2
    assert "Give both" in capsys.readouterr().err
