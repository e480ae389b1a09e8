"""Bodies of requests, at a collector that runs: nothing is read of one before the token, and none beyond its bound."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from latentwatch import secrets
from latentwatch.collector.evidence import EvidenceSettings
from latentwatch.collector.http import bodies
from latentwatch.collector.service import Service
from latentwatch.evidence.encryption import write_key

from tests.support.collectors import collector, exceed
from tests.support.raw_http import Answer, answer, ask, connect
from tests.support.wire import eventually

TOKEN = "correct-horse-battery-staple"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PATH = "/v1/evidence/content/chatcmpl-1"
MIB = 1 << 20
LAST = b"\r\nConnection: close\r\n\r\n"
SAID = json.dumps({"tokens": ["a", "b"]}).encode()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    opened = []

    def start(**settings: object) -> Service:
        folder = tmp_path_factory.mktemp("bodies")
        secrets.write(folder / "token", TOKEN.encode())
        write_key(folder / "key")
        evidence = EvidenceSettings(folder / "evidence", token_file=folder / "token", key_file=folder / "key")
        made = collector(folder, evidence=evidence, **settings)
        opened.append(made)
        service = made.__enter__()
        exceed(service)
        return service

    yield start
    for made in opened:
        made.__exit__(None, None, None)


@pytest.fixture(scope="module")
def service(start: Callable[..., Service]) -> Service:
    return start(http_body_bytes=MIB)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def sent(peer: socket.socket, data: bytes, mib: int) -> None:
    """As much of it as the other side takes."""
    try:
        for _ in range(mib):
            peer.sendall(data)
    except OSError:
        pass


LENGTHS = {
    "with its length": (b"Content-Length: %d" % (1 << 30), b"x" * MIB),
    "in chunks": (b"Transfer-Encoding: chunked", b"%x\r\n" % MIB + b"x" * MIB + b"\r\n"),
    "in one chunk": (b"Transfer-Encoding: chunked", b"x" * MIB),
}
ROUTES = [
    ("PUT", PATH),
    ("PUT", "/v1/evidence/content/%63hatcmpl-1"),
    ("DELETE", "/v1/evidence/requests/chatcmpl-1"),
    ("GET", "/v1/overview"),
    ("POST", "/metrics"),
    ("POST", "/v1/requests"),
    ("PATCH", "/nothing"),
    ("OPTIONS", "/"),
    ("POST", "/healthz"),
]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("method", "path"), ROUTES, ids=lambda value: value)
def test_a_stranger_is_answered_before_a_body_comes_and_none_of_it_is_held(service, method, path, length):
    """90 to 1,575 MiB were, by one request without a token."""
    header, piece = LENGTHS[length]
    begun = b"%x\r\n" % (1 << 30) if length == "in one chunk" else b""
    with connect(service.http_url) as peer:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        peer.sendall(head.encode() + header + b"\r\n\r\n" + begun)
        # It says no before it has anything of the body.
        found = answer(peer)
        assert found.status in (200, 401, 404, 405), found
        assert (method, found.status) in (("GET", 200), ("PUT", 401), ("DELETE", 401)) or found.status in (404, 405)
        before = resident_mib()
        sent(peer, piece, 64)
        assert resident_mib() < before + 32


def put(service: Service, body: bytes, **headers: str) -> Answer:
    lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **BEARER, **headers}
    return ask(service.http_url, PATH, method="PUT", headers=lines, body=body)


def refused(service: Service, reason: str) -> int:
    return service.core.lookup.snapshot(0).collector.streams_refused.get(reason, 0)


def test_what_was_said_is_taken_with_the_token_and_given_back(service):
    assert put(service, SAID).status == 204
    assert json.loads(ask(service.http_url, PATH, headers=BEARER).body)["tokens"] == ["a", "b"]


def test_what_is_too_large_is_refused_by_its_length_and_by_what_comes(service):
    before = refused(service, "http_malformed")
    by_length = put(service, b"", **{"Content-Length": str(MIB + 1)})
    assert by_length.status == 413 and b"--http-body-mib" in by_length.body
    body = b'{"tokens": ["' + b"x" * (2 * MIB)
    with connect(service.http_url) as peer:
        head = f"PUT {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n"
        peer.sendall(head.encode() + body[: MIB + 4096])
        assert answer(peer).status == 413
    assert refused(service, "http_malformed") == before + 2
    assert put(service, SAID.ljust(MIB)).status == 204


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},  # what another site's form may send without asking
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": ""},
        {"Content-Encoding": "gzip"},
        {"Content-Encoding": "zstd, identity"},
    ],
)
def test_what_is_no_plain_json_is_refused_before_it_is_read(service, headers):
    assert put(service, SAID, **headers).status == 415


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"null",
        b'{"tokens": [1]}',
        b'{"other": []}',
        b'{"token_ids": ["a"]}',
        b"\xff",
        b"{}",
        b"[" * 9000,
    ],
    ids=repr,
)
def test_what_is_no_content_is_refused_as_the_document_says(service, body):
    found = put(service, body)
    assert found.status == 422
    assert json.loads(found.body)["detail"]


def test_a_body_that_does_not_come_is_given_up_and_counted(service, monkeypatch):
    before = refused(service, "http_slow")
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    with connect(service.http_url) as peer:
        head = f"PUT {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n"
        peer.sendall(f"{head}Authorization: Bearer {TOKEN}\r\n\r\n{{".encode())
        assert answer(peer).status == 408
    eventually(lambda: refused(service, "http_slow") >= before + 1)


def test_only_a_few_bodies_come_at_once(service):
    head = f"PUT {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n"
    peers = [connect(service.http_url) for _ in range(bodies._MOST_AT_ONCE)]
    try:
        for peer in peers:
            # It says "continue" once it reads.
            peer.sendall(f"{head}Expect: 100-continue\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
            assert peer.recv(1 << 16).startswith(b"HTTP/1.1 100")
        assert put(service, SAID).status == 503
        assert ask(service.http_url, "/healthz").status == 200
    finally:
        for peer in peers:
            peer.close()
    eventually(lambda: put(service, SAID).status == 204)


def test_a_stranger_is_never_told_to_go_on_with_a_body(service):
    with connect(service.http_url) as peer:
        head = f"PUT {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n"
        peer.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert peer.recv(1 << 16).startswith(b"HTTP/1.1 401")


STRANGE = {
    "a header of 100 KiB": b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 100_000 + b"\r\n\r\n",
    "10,000 headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: a\r\n" * 10_000 + b"\r\n",
    "a URL of 100 KiB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: attacker.example\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a length and chunks": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/overview HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a length below zero": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "another coding": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: attacker.example\r\n localhost\r\n\r\n",
    "a NUL": b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an absolute URL": b"GET http://attacker.example/v1/overview HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CONNECT": b"CONNECT attacker.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_no_client_sends_gets_no_more_than_an_error_and_harms_nobody(service, kind):
    before = resident_mib()
    with connect(service.http_url) as peer:
        peer.sendall(STRANGE[kind])
        peer.shutdown(socket.SHUT_WR)
        said = b""
        try:
            while data := peer.recv(1 << 16):
                said += data
        except ConnectionError:
            pass
    assert b"HTTP/1.1 200" not in said and b"HTTP/1.1 5" not in said
    assert resident_mib() < before + 16
    assert ask(service.http_url, "/healthz").status == 200


def test_a_websocket_is_not_opened(service):
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x" * 16}
    headers["Sec-WebSocket-Version"] = "13"
    with connect(service.http_url) as peer:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        peer.sendall(f"GET /v1/overview HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
        assert not peer.recv(1 << 16).startswith(b"HTTP/1.1 101")


def test_requests_in_a_row_are_answered_in_their_order_and_one_that_is_not_ours_among_them_is_refused(service):
    ours = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(service.http_url) as peer:
        peer.sendall(ours + ours.replace(b"localhost", b"attacker.example") + ours.replace(b"\r\n\r\n", LAST))
        said = b""
        while data := peer.recv(1 << 16):
            said += data
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200", b"421", b"200"]


@pytest.mark.parametrize("path", ["/v1/evidence/exceedances", "/v1/evidence/requests/chatcmpl-1", PATH])
@pytest.mark.parametrize(("headers", "status"), [({}, (401, 403)), (BEARER, (200, 404))], ids=["stranger", "trusted"])
def test_beyond_loopback_evidence_is_told_to_nobody_without_a_token(start, path, headers, status):
    service = start(http="0.0.0.0:0", insecure=True)
    url = service.http_url.replace("0.0.0.0", "127.0.0.1")
    assert ask(url, path, headers=headers).status in status
    assert ask(url, "/v1/overview").status == 200


@pytest.mark.parametrize("path", ["/", "/metrics", "/v1/overview", "/v1/evidence/exceedances", "/nothing", PATH])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS", "TRACE", "BREW"])
def test_every_answer_says_that_it_is_for_nobody_else(service, path, method):
    with connect(service.http_url) as peer:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nRange: bytes=0-3\r\nConnection: close\r\n\r\n"
        peer.sendall(head.encode())
        found = answer(peer, method)
    assert found.status in (200, 400, 401, 404, 405)
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert found.headers["cross-origin-resource-policy"] == "same-origin"
    assert not [name for name in found.headers if name.startswith("access-control")]
