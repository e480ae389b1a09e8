"""Deadlines and bounds of the HTTP server, plain and over TLS, by real connections to an app that does as told."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from latentwatch.collector.http import connection
from latentwatch.collector.http.connection import HttpLimits
from latentwatch.collector.http.guard import RESERVED_PATHS
from latentwatch.collector.http.server import HttpServer
from latentwatch.transport.credentials import ServerTls
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.support.certificates import Authority
from tests.support.raw_http import answer, hung_up
from tests.support.wire import eventually, in_loop

REQUEST = b"GET / HTTP/1.1\r\nHost: c\r\n\r\n"
WAITING = REQUEST.replace(b"/ ", b"/waiting ")
LARGE = REQUEST.replace(b"/ ", b"/large ")
CLOSING = REQUEST.replace(b"c\r\n", b"c\r\nConnection: close\r\n")


class Served:
    """A server in the tests' event loop, with who was turned away."""

    def __init__(self, folder: Path, *, encrypted: bool, **limits: int) -> None:
        self.refused: Counter[str] = Counter()
        self.answered = self.waiting = 0
        self.when_asked: Callable[[], None] = lambda: None
        self.asked, self._may_go = asyncio.Event(), asyncio.Event()
        self._authority = Authority(folder)
        certificate, key = self._authority.issue("http", "localhost")
        self.server = HttpServer(
            "127.0.0.1:0",
            self._app,
            limits=HttpLimits(**limits),
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
        await self.go_on()
        self.server.stop()
        await self._task

    async def go_on(self) -> None:
        """Answer whoever waits."""
        self._may_go.set()

    @property
    def connections(self) -> set[object]:
        return self.server._server.server_state.connections

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http" and not scope["state"]
        self.when_asked()
        if scope["path"] == "/waiting":
            self.waiting += 1
            self.asked.set()
            await self._may_go.wait()
        body = bytes(16 << 20) if scope["path"] == "/large" else b"ok"
        length = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body})
        self.answered += 1


@pytest.fixture(params=[False, True], ids=["http", "https"])
def serve(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def serve(**limits: int) -> Served:
        made.append(Served(tmp_path, encrypted=request.param, **limits))
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


def soon(monkeypatch: pytest.MonkeyPatch, deadline: str) -> None:
    """Have a deadline that comes soon, and that nothing in a test has to be faster than."""
    monkeypatch.setattr(connection, deadline, 0.2)


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
    served = serve()
    if not first:
        soon(monkeypatch, "REQUEST_SECONDS")
    with served.connect() as peer:
        if first:
            # Once it is asked: a busy machine may take its time to get there.
            served.when_asked = lambda: soon(monkeypatch, "REQUEST_SECONDS")
            peer.sendall(first)
            assert answer(peer).status == 200
        with contextlib.suppress(OSError):
            peer.sendall(begun)
        assert hung_up(peer)
    eventually(lambda: served.refused == {"http_slow": 1})


def test_headers_that_come_byte_by_byte_are_cut_off_all_the_same(serve, monkeypatch):
    soon(monkeypatch, "REQUEST_SECONDS")
    served = serve()
    with served.connect() as peer:
        with contextlib.suppress(OSError):
            while True:
                peer.sendall(b"a")
        assert hung_up(peer)
    # Or refused, where the machine let it send more than headers may have.
    eventually(lambda: served.refused in ({"http_slow": 1}, {}))


def test_an_answer_may_take_longer_than_its_request(serve, monkeypatch):
    served = serve()
    served.when_asked = lambda: monkeypatch.setattr(connection, "REQUEST_SECONDS", 1.0)
    with served.connect() as peer:
        peer.sendall(WAITING + CLOSING)
        in_loop(served.asked.wait())
        in_loop(asyncio.sleep(2))
        in_loop(served.go_on())
        assert rest(peer).count(b"200 OK") == 2
    assert not served.refused


def test_a_peer_that_does_not_read_its_answer_is_cut_off_and_counted(serve, monkeypatch):
    served = serve()
    served.when_asked = lambda: (soon(monkeypatch, "ANSWER_SECONDS"), soon(monkeypatch, "REQUEST_SECONDS"))
    with served.connect() as peer:
        peer.sendall(LARGE)
        eventually(lambda: served.refused == {"http_slow": 1})


def test_a_peer_that_is_hung_up_on_and_stays_is_not_counted(serve, monkeypatch):
    served = serve()
    served.when_asked = lambda: soon(monkeypatch, "REQUEST_SECONDS")
    with served.connect() as peer:
        peer.sendall(CLOSING)
        eventually(lambda: served.answered == 1)
        eventually(lambda: not served.connections)
    assert not served.refused


# As an answer to a stranger costs nothing: none of these says a whole request, or reads a whole answer.
IDLERS = {
    "silent": b"",
    "half a line": b"GET /he",
    "half a header": b"GET / HTTP/1.1\r\nHost: c\r\nX-A: ",
    "a body that does not come": b"POST / HTTP/1.1\r\nHost: c\r\nContent-Length: 1000000\r\n\r\nx",
    "a chunk that does not come": b"PUT / HTTP/1.1\r\nHost: c\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\nx",
    "answered and stays": REQUEST,
    "an answer that is not read": LARGE,
    "an answer that does not come": WAITING,
}


@pytest.mark.parametrize("idler", IDLERS)
@pytest.mark.parametrize("path", sorted(RESERVED_PATHS))
def test_health_and_metrics_are_answered_whatever_others_do(serve, idler, path):
    """383 of 383 times they were not, while 127 connections said half of something."""
    served = serve(connections=24, of_peer=24)
    with contextlib.ExitStack() as peers:
        for _ in range(48):
            with contextlib.suppress(OSError):  # one that lost its place in the handshake
                peer = peers.enter_context(served.connect())
                peer.sendall(IDLERS[idler])
        for _ in range(5):
            with served.connect() as asks:
                asks.sendall(REQUEST.replace(b"/ ", path.encode() + b" "))
                assert answer(asks).status == 200
        assert len(served.connections) <= 24 + 16
    assert set(served.refused) <= {"http_busy"} and served.refused["http_busy"] >= 8
    in_loop(served.go_on())


def test_what_is_not_reserved_is_refused_where_all_places_work_and_served_again_later(serve):
    served = serve(connections=2, of_peer=2)
    with contextlib.ExitStack() as peers:
        for _ in range(2):
            peers.enter_context(served.connect()).sendall(WAITING)
        eventually(lambda: served.waiting == 2)
        with served.connect() as third:
            third.sendall(REQUEST)
            found = answer(third)
            assert found.status == 503 and found.headers["retry-after"] == "1"
        in_loop(served.go_on())
    eventually(lambda: not served.connections)
    with served.connect() as fourth:
        fourth.sendall(CLOSING)
        assert b" 200 " in rest(fourth)
    assert served.refused == {"http_busy": 1}


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
