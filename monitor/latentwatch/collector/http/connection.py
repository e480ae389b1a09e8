"""One HTTP connection: its place, its TLS, and its deadlines from the first byte to the last of an answer.

uvicorn's option `http` takes a class for connections; the one given here owns uvicorn's `H11Protocol`, which it hands
what arrives once TLS is done. So certificates are read again for every connection, and the clock runs during the
handshake too. Of uvicorn's inside this uses the place and the keywords of `H11Protocol`; pyproject.toml bounds the
version, and a test says what is missing.

A connection has a place among `Doors`. Until a request's headers are whole, and between two requests, it only waits:
when all places are taken, or all of its peer, the one that waits for longest is closed for a newcomer. Where all are
at work, a few places are left in which only /healthz and /metrics are answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentwatch.collector.http.guard import RESERVED_PATHS
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.transport.credentials import ServerTls
from latentwatch.transport.places import Full, Places, peer_of

REQUEST_SECONDS: Final = 10.0
"""From a connection, or from the answer before, to the end of a request's headers; a scraper takes milliseconds. Above
uvicorn's 5 s for a connection without a next request, which is closed and not counted."""
ANSWER_SECONDS: Final = 120.0
"""From a request's headers to the last byte of its answer, which the peer has to read."""
_RESERVED: Final = 16
"""Places for /healthz and /metrics: a kubelet, a Prometheus pair, a doctor, twice over and more."""
_CONNECTION: Final = "latentwatch.connection"


@dataclass(frozen=True)
class HttpLimits:
    """How many connections there may be."""

    connections: int = 128
    """Far above a Prometheus pair and some open pages."""
    of_peer: int = 64
    """Of them, from one address; of IPv6 from one /64."""


class Doors:
    """The places of a server's connections, and who is told of those that were turned away."""

    def __init__(self, limits: HttpLimits, on_refused: Callable[[str], None]) -> None:
        self.on_refused = on_refused
        self._places: Places[Connection] = Places(limits.connections, limits.of_peer)
        self._reserved: Places[Connection] = Places(_RESERVED, _RESERVED)

    def enter(self, connection: Connection, peer: str) -> bool:
        """Whether there is a place for it, in which it may ask at least for what is reserved."""
        for places in (self._places, self._reserved):
            try:
                lost = places.reserve(connection, peer)
            except Full:
                connection.is_restricted = True
                continue
            if lost is not None:
                self.on_refused(RefusalReason.HTTP_BUSY)
                lost.close_now()
            return True
        self.on_refused(RefusalReason.HTTP_BUSY)
        return False

    def work(self, connection: Connection) -> None:
        """It asks for something: it is not closed for a newcomer."""
        self._places.work(connection)
        self._reserved.work(connection)

    def wait(self, connection: Connection) -> None:
        """It was answered."""
        self._places.wait(connection)
        self._reserved.wait(connection)

    def leave(self, connection: Connection) -> None:
        """It is closed."""
        self._places.leave(connection)
        self._reserved.leave(connection)


class Connection(asyncio.Protocol):
    """One connection, from the moment at which it is accepted."""

    def __init__(
        self,
        *,
        tls: ServerTls | None,
        doors: Doors,
        app_state: dict[str, object],
        **of_uvicorn: Any,
    ) -> None:
        self._tls = tls
        self._doors = doors
        self.is_restricted = False
        """Whether it may ask only for what is reserved."""
        # The state is in the scope of every request, and so leads `bounded` back here.
        self._http = H11Protocol(app_state={**app_state, _CONNECTION: self}, **of_uvicorn)
        self._is_open = False
        self._early: list[bytes] = []
        """What came between the end of the handshake and the event loop's next turn."""
        self._handshake: asyncio.Task[None] | None = None
        self._requests = 0
        """Requests that are being answered; two for a moment, where the next one had come already."""
        self._answered_seconds = 0.0
        self._is_lost = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        host, *_ = transport.get_extra_info("peername") or ("",)
        if not self._doors.enter(self, peer_of(host)):
            self._transport.abort()
            return
        self._set_deadline(REQUEST_SECONDS)
        if self._tls is None:
            self._open(self._transport)
        else:
            self._transport.pause_reading()
            self._handshake = asyncio.create_task(self._shake_hands(self._tls))

    def data_received(self, data: bytes) -> None:
        if self._is_open:
            self._http.data_received(data)
        else:
            self._early.append(data)

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._is_lost = True
        self._let_go()
        if self._is_open:
            self._http.connection_lost(error)

    def request_came(self) -> None:
        """With all of its headers."""
        self._requests += 1
        self._doors.work(self)
        self._set_deadline(ANSWER_SECONDS)

    def request_answered(self) -> None:
        """The peer has to read what it does not have yet, and the next request has to come, unless uvicorn hangs up."""
        self._requests -= 1
        if not self._requests and not self._is_lost:
            self._doors.wait(self)
            self._answered_seconds = time.monotonic()
            self._set_deadline(REQUEST_SECONDS)

    def turned_away(self) -> None:
        """It asked for more than its place is for."""
        self._doors.on_refused(RefusalReason.HTTP_BUSY)

    def close_now(self) -> None:
        """Its place is another's."""
        self._transport.abort()

    async def _shake_hands(self, tls: ServerTls) -> None:
        loop = asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(self._transport, self, tls.context(), server_side=True)
        except (OSError, ConfigRefused):
            # A peer was told by an alert of TLS, unless there is no certificate to speak it with: it is only cut off.
            # Readers that trust another certificate are no attack to count.
            secure = None
        if secure is not None and not secure.is_closing():
            self._open(secure)
        else:
            self._let_go()
            self._transport.abort()

    def _open(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._http.connection_made(transport)
        self._is_open = True
        for data in self._early:
            self._http.data_received(data)
        self._early.clear()

    def _set_deadline(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._cut_off)

    def _let_go(self) -> None:
        self._doors.leave(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut_off(self) -> None:
        still_reads = not self._requests and self._transport.get_write_buffer_size() > 0
        if still_reads and time.monotonic() < self._answered_seconds + ANSWER_SECONDS:
            self._set_deadline(REQUEST_SECONDS)
            return
        # uvicorn hung up meanwhile, where a peer leaves TLS's farewell unanswered.
        if not self._transport.is_closing():
            self._doors.on_refused(RefusalReason.HTTP_SLOW)
        self._transport.abort()


def bounded(app: ASGIApp) -> ASGIApp:
    """`app`, whose connections are told when a request's headers came and when it is answered."""

    async def bounded_app(scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection = scope["state"].pop(_CONNECTION)
        connection.request_came()
        try:
            if connection.is_restricted and scope["path"] not in RESERVED_PATHS:
                connection.turned_away()
                headers = {"connection": "close", "retry-after": "1"}
                await PlainTextResponse("All places are taken.\n", 503, headers)(scope, receive, send)
            else:
                await app(scope, receive, send)
        finally:
            connection.request_answered()

    return bounded_app
