"""The HTTP side over TLS: a certificate that is read again, deadlines, and the same headers as without."""

from __future__ import annotations

import contextlib
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from latentwatch import secrets
from latentwatch.cli import main
from latentwatch.collector.http import connection
from latentwatch.collector.http.app import HEADERS
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.transport.credentials import ServerTls
from latentwatch.watchlist import file as watchlist_file

from tests.support.certificates import Authority
from tests.support.streams import sparse, watchlist
from tests.support.wire import eventually, in_loop

TOKEN = "correct-horse-battery-staple"


@contextlib.contextmanager
def serving(folder: Path, authority: Authority) -> Iterator[Service]:
    watchlist_file.write(watchlist([sparse("f")]), folder / "w.safetensors")
    secrets.write(folder / "token", TOKEN.encode())
    made = Service(
        CollectorSettings(
            folder / "w.safetensors",
            (f"unix://{folder}/c.sock",),
            "127.0.0.1:0",
            http_token_files=(folder / "token",),
            http_tls=ServerTls(*authority.issue("http"), protocol="http/1.1"),
        )
    )
    in_loop(made.start())
    try:
        yield made
    finally:
        in_loop(made.stop())


def get(service: Service, authority: Authority, path: str = "/metrics") -> tuple[int, dict[str, str]]:
    request = urllib.request.Request(service.http_url + path, headers={"Authorization": f"Bearer {TOKEN}"})
    context = ssl.create_default_context(cafile=authority.file)
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}


def test_https_shows_the_token_to_nobody_else_and_has_every_security_header(tmp_path):
    authority = Authority(tmp_path)
    with serving(tmp_path, authority) as service:
        assert service.http_url.startswith("https://")
        code, headers = get(service, authority)
        assert code == 200
        for name, value in HEADERS:
            assert headers[name.decode()] == value.decode()
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            get(service, Authority(tmp_path, "another"))
        request = urllib.request.Request(service.http_url + "/metrics")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=10, context=ssl.create_default_context(cafile=authority.file))
        with pytest.raises(OSError, match=r"Remote end closed|reset|disconnected"):
            urllib.request.urlopen(service.http_url.replace("https", "http") + "/metrics", timeout=10)


def test_a_certificate_that_was_replaced_is_shown_to_the_next_reader(tmp_path):
    first, second = Authority(tmp_path), Authority(tmp_path, "second")
    with serving(tmp_path, first) as service:
        assert get(service, first)[0] == 200
        second.issue("http")
        assert get(service, second)[0] == 200


def test_a_certificate_or_key_that_cannot_be_used_gets_readers_an_end_without_a_word_of_tls(tmp_path):
    """There is nothing to speak TLS with, so no alert either: the connection is reset, and the next one looks again."""
    authority = Authority(tmp_path)
    with serving(tmp_path, authority) as service:
        for spoil in (lambda: (tmp_path / "http.pem").write_text("none"), lambda: (tmp_path / "http.key").chmod(0o644)):
            spoil()
            with pytest.raises(urllib.error.URLError) as refused:
                get(service, authority)
            assert isinstance(refused.value.reason, ConnectionResetError | ssl.SSLEOFError)
            authority.issue("http")
            assert get(service, authority)[0] == 200


def test_a_handshake_that_does_not_come_is_cut_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.2)
    with serving(tmp_path, Authority(tmp_path)) as service:
        parts = urlsplit(service.http_url)
        with socket.create_connection((parts.hostname, parts.port)) as slow:
            slow.settimeout(60)
            with contextlib.suppress(ConnectionResetError):
                assert slow.recv(1) == b""
        eventually(lambda: service.core.lookup.snapshot(0).collector.streams_refused.get("http_slow") == 1)


def test_half_of_it_is_refused(tmp_path, capsys):
    assert main(["collector", "--watchlist", "w", "--http-tls-cert", "c.pem"]) == 2
    assert "--http-tls-key is None" in capsys.readouterr().err
    assert main(["collector", "--watchlist", "w", "--forward-name", "pod-0"]) == 2
    assert "--forward-to is not" in capsys.readouterr().err
    assert main(["collector", "--watchlist", "w", "--forward-to", "g:1", "--forward-cert", "c.pem"]) == 2
    assert "--forward-key is None" in capsys.readouterr().err
