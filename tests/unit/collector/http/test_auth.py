"""Who may read a collector over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from latentwatch import secrets
from latentwatch.cli import main
from latentwatch.collector.http import auth, connection
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.transport.credentials import Tokens
from latentwatch.watchlist import file as watchlist_file
from starlette.authentication import AuthenticationError
from starlette.requests import HTTPConnection

from tests.support.raw_http import answer, connect, hung_up
from tests.support.streams import sparse, watchlist
from tests.support.wire import eventually, in_loop

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    watchlist_file.write(watchlist([sparse("f")]), tmp_path / "w.safetensors")
    secrets.write(tmp_path / "token", TOKEN.encode())
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
    return service.core.lookup.snapshot(time.time()).collector.streams_refused.get(reason, 0)


@pytest.mark.parametrize("path", ["/", "/metrics", "/openapi.json", "/v1/overview", "/v1/requests", "/nothing"])
def test_without_the_token_nothing_is_told_and_it_is_counted(service, path):
    code, headers = status(service, path)
    assert code == 401 and headers["www-authenticate"].startswith("Basic")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert status(service, path, "Bearer wrong-horse-battery-staple")[0] == 401
    assert refused(service, "http_unauthenticated") == 2


def test_with_the_token_everything_is_told_and_health_needs_none(service):
    assert status(service, "/metrics", f"Bearer {TOKEN}")[0] == 200
    assert status(service, "/", basic(TOKEN))[0] == 200
    assert status(service, "/healthz")[0] == 200
    assert refused(service, "http_unauthenticated") == 0


def basic(password: str) -> str:
    return "Basic " + b64encode(f"anyone:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("header", "reads"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer  {TOKEN} ", True),
        (basic(TOKEN), True),
        (basic("wrong"), False),
        ("Basic not-base64", False),
        (TOKEN, False),
        ("Bearer", False),
        (f"Digest {TOKEN}", False),
        ("Bearer \xfc\xfc", False),
    ],
)
def test_a_token_is_shown_as_bearer_or_as_the_password_of_basic(service, header, reads):
    assert status(service, "/metrics", header)[0] == (200 if reads else 401)


READERS, ERASERS = "readers-0123456789", "erasers-0123456789"


@pytest.mark.parametrize("guarded", [True, False], ids=["readers need a token", "all may read"])
@pytest.mark.parametrize(
    ("header", "reads", "erases"),
    [
        (f"Bearer {ERASERS}", True, True),
        (basic(ERASERS), True, False),  # a browser would send it by itself, for any page that asks
        (f"Bearer {READERS}", True, False),
        ("Bearer neither-0123456789", False, False),
        ("", False, False),
    ],
)
def test_the_token_of_readers_erases_nothing_and_that_of_evidence_reads_too(tmp_path, guarded, header, reads, erases):
    secrets.write(tmp_path / "r", READERS.encode())
    secrets.write(tmp_path / "e", ERASERS.encode())
    refused: list[str] = []
    access = auth.Access(Tokens([tmp_path / "r"]) if guarded else None, Tokens([tmp_path / "e"]), refused.append)
    headers = [(b"authorization", header.encode())] if header else []
    scope = {"type": "http", "path": "/v1/overview", "headers": headers}
    try:
        scopes = asyncio.run(access.authenticate(HTTPConnection(scope)))[0].scopes
    except AuthenticationError:
        scopes = []
    assert scopes == [auth.READ, auth.EVIDENCE] * (reads or not guarded) + [auth.ERASE] * erases
    assert refused == ["http_unauthenticated"] * (not scopes)


def test_a_token_counts_as_the_file_is_now_and_a_file_that_others_may_read_lets_nobody_in(tmp_path, caplog):
    secrets.write(tmp_path / "r", READERS.encode())
    readers = Tokens([tmp_path / "r"])
    (tmp_path / "r").write_text("rotated-0123456789")
    assert "rotated-0123456789" in readers and READERS not in readers
    (tmp_path / "r").chmod(0o644)
    assert "rotated-0123456789" not in readers and "rotated-0123456789" not in readers
    assert caplog.text.count("nobody is let in") == 1 and "chmod 600" in caplog.text


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["first", "second"])
def test_a_request_that_dribbles_is_cut_off_and_counted(service, monkeypatch, first):
    # For the first request there is time, however busy the machine is: the deadline that counts is the next one.
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 2.0 if first else 0.3)
    with connect(service.http_url) as peer:
        if first:
            peer.sendall(first)
            assert answer(peer).status == 200
        with contextlib.suppress(OSError):
            peer.sendall(b"GET / HT")
        assert hung_up(peer)
    eventually(lambda: refused(service, "http_slow") == 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--tls-client-ca", "c"], "--tls-cert is None, --tls-key is None. Give both."),
        (["--tls-key", "c"], "--tls-cert is None, --tls-key is c. Give both."),
        (["--http-tls-cert", "c"], "--http-tls-cert is c, --http-tls-key is None. Give both."),
        (["--forward-key", "c"], "--forward-cert is None, --forward-key is c, --forward-ca is None. Give all of them."),
        (["--forward-cert", "c", "--forward-key", "c"], "--forward-ca is None. Give all of them."),
    ],
)
def test_half_of_what_tls_needs_is_refused_in_one_line(tmp_path, capsys, given, says):
    watchlist_file.write(watchlist([sparse("f")]), tmp_path / "w.safetensors")
    more = ["--forward-to", "gateway:1"] if given[0].startswith("--forward") else []
    assert main(["collector", "--watchlist", str(tmp_path / "w.safetensors"), *more, *given]) == 2
    assert says in capsys.readouterr().err
