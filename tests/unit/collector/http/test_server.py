"""Deadlines and bounds of the HTTP server, plain and over TLS, by real connections to an app that does as told."""

from __future__ import annotations

import asyncio
import inspect
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from latentwatch.collector.http import server
from latentwatch.collector.http.server import HttpServer
from latentwatch.transport.credentials import ServerTls
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.support.certificates import Authority
from tests.support.wire import eventually, in_loop

REQUEST = b"GET / HTTP/1.1\r\nHost: c\r\n\r\n"
SLOW = REQUEST.replace(b"/ ", b"/slow ")
CLOSING = REQUEST.replace(b"c\r\n", b"c\r\nConnection: close\r\n")


class Served:
    """A server in the tests' event loop, with who was turned away."""

    def __init__(self, folder: Path, *, encrypted: bool) -> None:
        self.refused: Counter[str] = Counter()
        self._authority = Authority(folder)
        certificate, key = self._authority.issue("http", "localhost")
        self.server = HttpServer(
            "127.0.0.1:0",
            _app,
            tls=ServerTls(certificate, key, protocol="http/1.1") if encrypted else None,
            on_refused=lambda reason: self.refused.update([reason]),
        )
        self.server.bind()
        self._task = in_loop(self._start())

    def plain(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.server.url.rpartition(":")[2])), timeout=10)

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self._authority.file)

    def connect(self) -> socket.socket:
        if not self.server.is_encrypted:
            return self.plain()
        return self.context().wrap_socket(self.plain(), server_hostname="localhost")

    async def _start(self) -> asyncio.Task[None]:
        task = asyncio.create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.01)
        return task

    async def stop(self) -> None:
        self.server.stop()
        await self._task


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http" and not scope["state"]
    if scope["path"] == "/slow":
        await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(params=[False, True], ids=["http", "https"])
def serve(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Served]]:
    made: list[Served] = []

    def serve() -> Served:
        made.append(Served(tmp_path, encrypted=request.param))
        return made[-1]

    yield serve
    for served in made:
        in_loop(served.stop())


def test_uvicorn_has_what_is_used_of_its_inside():
    """No documented interface: an update that takes one of them away is to fail here, by its name."""
    given = inspect.signature(H11Protocol).parameters
    assert {"config", "server_state", "app_state"} <= set(given), f"uvicorn's H11Protocol takes {list(given)}"
    source = inspect.getsource(uvicorn.Server)
    assert "capture_signals" in vars(uvicorn.Server), "uvicorn's Server.capture_signals is gone: it takes our signals"
    assert "with self.capture_signals():" in source, "uvicorn's Server.serve no longer asks capture_signals"
    methods = ("connection_made", "connection_lost", "data_received", "pause_writing", "resume_writing")
    missing = [name for name in methods if not hasattr(H11Protocol, name)]
    assert not missing, f"uvicorn's H11Protocol has no {missing}"


def rest(peer: socket.socket) -> bytes:
    """Everything until the server hangs up."""
    data = b""
    try:
        while more := peer.recv(1 << 16):
            data += more
    except (ConnectionError, ssl.SSLEOFError):
        pass
    return data


@pytest.mark.parametrize("first", [b"", REQUEST], ids=["first", "second"])
@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: "], ids=["silent", "half"])
def test_a_request_whose_headers_do_not_come_is_cut_off_and_counted(serve, monkeypatch, first, begun):
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    served = serve()
    with served.connect() as peer:
        peer.sendall(first + begun)
        assert rest(peer).count(b"200 OK") == bool(first)
    eventually(lambda: served.refused == {"http_slow": 1})


def test_an_answer_may_take_longer_than_its_request(serve, monkeypatch):
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    served = serve()
    with served.connect() as peer:
        peer.sendall(SLOW + CLOSING)
        assert rest(peer).count(b"200 OK") == 2
    assert not served.refused


def test_a_peer_that_is_hung_up_on_and_stays_is_not_counted(serve, monkeypatch):
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.2)
    served = serve()
    with served.connect() as peer:
        peer.sendall(CLOSING)
        in_loop(asyncio.sleep(0.5))
    assert not served.refused


def test_requests_beyond_the_bound_get_503(serve, monkeypatch):
    monkeypatch.setattr(server, "_MAX_CONNECTIONS", 2)
    served = serve()
    with served.connect() as first:
        first.sendall(SLOW)
        in_loop(asyncio.sleep(0.2))
        with served.connect() as second:
            second.sendall(REQUEST)
            assert b" 503 " in rest(second)
        assert b" 200 " in first.recv(1 << 16)


def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(tmp_path):
    """In one segment, so that it is there before anybody knows of the connection."""
    served = Served(tmp_path, encrypted=True)
    arrived, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = served.context().wrap_bio(arrived, leaving, server_hostname="localhost")

    def until_done(step: Callable[[], object]) -> object:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                peer.sendall(leaving.read())
                arrived.write(peer.recv(1 << 16))

    with served.plain() as peer:
        until_done(tls.do_handshake)
        tls.write(REQUEST)
        assert b"200 OK" in until_done(lambda: tls.read(1 << 16))
    in_loop(served.stop())
