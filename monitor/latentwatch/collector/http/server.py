"""The HTTP server: uvicorn, and the deadline that it has not, from a connection to the end of its request's headers.

Whoever is slower, in the TLS handshake or after it, is cut off and counted. uvicorn's option `http` takes a class for
connections; the one given here owns uvicorn's `H11Protocol`, which it hands what arrives once TLS is done. So
certificates are read again for every connection, and the clock runs during the handshake too.

Of uvicorn's inside this uses the place and the keywords of `H11Protocol`, and `Server.capture_signals`, which leaves
signals to the service. Both may change with any version: pyproject.toml bounds it, and a test says what is missing.
hypercorn would need neither, but loses the deadline over HTTP/2, the 503 beyond a bound, and the count of who is slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.transport.address import Address, cannot_listen
from latentwatch.transport.credentials import ServerTls

REQUEST_SECONDS: Final = 10.0
"""From a connection, or from the answer before, to the end of a request's headers; a scraper takes milliseconds. Above
uvicorn's 5 s for a connection without a next request, which is closed and not counted."""
STOP_SECONDS: Final = 2
"""For a scrape in progress to finish."""
_MAX_CONNECTIONS: Final = 128
"""Far above a Prometheus pair and some open pages; what is beyond gets 503 instead of memory."""
_CONNECTION: Final = "latentwatch.connection"


class HttpServer:
    """Serves an app on one address. Make it, `bind()`, run `serve()`, later `stop()` and await `serve()`'s end."""

    def __init__(self, listen: str, app: ASGIApp, *, tls: ServerTls | None, on_refused: Callable[[str], None]) -> None:
        """Raises: ConfigRefused, "target_invalid" or "tls_unusable"."""
        self._address = _tcp(listen)
        self._scheme = "https" if tls else "http"
        self._socket: socket.socket | None = None
        if tls is not None:
            tls.context()
        connection = functools.partial(_Connection, tls=tls, on_refused=on_refused)
        self._server = _Uvicorn(
            uvicorn.Config(
                _timed(app),
                # uvicorn calls it and asks nothing else of it.
                http=cast("type[asyncio.Protocol]", connection),
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                # What else uvicorn would take from the environment: WEB_CONCURRENCY and FORWARDED_ALLOW_IPS.
                workers=1,
                proxy_headers=False,
                forwarded_allow_ips=[],
                server_header=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )

    @property
    def url(self) -> str:
        """Where it is, with the port that was bound."""
        port = self._socket.getsockname()[1] if self._socket else self._address.port
        return f"{self._scheme}://{self._address.host}:{port}"

    @property
    def is_encrypted(self) -> bool:
        """Whether it speaks TLS."""
        return self._scheme == "https"

    @property
    def is_loopback(self) -> bool:
        """Whether only this host reaches it; call it once it is bound."""
        assert self._socket is not None
        return ipaddress.ip_address(self._socket.getsockname()[0]).is_loopback

    @property
    def started(self) -> bool:
        """Whether `serve` answers."""
        return self._server.started

    def bind(self) -> None:
        """Take the address. Raises ConfigRefused, "port_in_use" or "address_unusable"."""
        host, port = self._address.host.strip("[]"), self._address.port
        try:
            family, *_, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.create_server(found[:2], family=family, dualstack_ipv6=family == socket.AF_INET6)
        except OSError as error:
            raise cannot_listen(
                f"--http {self._address}",
                error,
                instead="Stop what uses it, or give another port or address of this host with --http.",
            ) from error

    def release(self) -> None:
        """Give the address back, of a server that never served."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def serve(self) -> None:
        """Answer until `stop`."""
        assert self._socket is not None
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Take no more connections, and let `serve` end once the requests in progress are answered."""
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the service's: the receiver has to stop first."""
        yield


class _Connection(asyncio.Protocol):
    """One connection, from the moment at which it is accepted."""

    def __init__(
        self,
        *,
        tls: ServerTls | None,
        on_refused: Callable[[str], None],
        app_state: dict[str, object],
        **of_uvicorn: Any,
    ) -> None:
        self._tls = tls
        self._on_refused = on_refused
        # The state is in the scope of every request, and so leads `_timed` back here.
        self._http = H11Protocol(app_state={**app_state, _CONNECTION: self}, **of_uvicorn)
        self._is_open = False
        self._early: list[bytes] = []
        """What came between the end of the handshake and the event loop's next turn."""
        self._handshake: asyncio.Task[None] | None = None
        self._requests = 0
        """Requests that are being answered; two for a moment, where the next one had come already."""
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._set_deadline()
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
        self._cancel_deadline()
        if self._is_open:
            self._http.connection_lost(error)

    def request_came(self) -> None:
        """With all of its headers: its answer takes as long as it takes."""
        self._requests += 1
        self._cancel_deadline()

    def request_answered(self) -> None:
        """The next one has to come, unless uvicorn hangs up."""
        self._requests -= 1
        if not self._requests and not self._transport.is_closing():
            self._set_deadline()

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
            self._cancel_deadline()
            self._transport.abort()

    def _open(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._http.connection_made(transport)
        self._is_open = True
        for data in self._early:
            self._http.data_received(data)
        self._early.clear()

    def _set_deadline(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(REQUEST_SECONDS, self._cut_off)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut_off(self) -> None:
        # uvicorn hung up meanwhile, where a peer leaves TLS's farewell unanswered.
        if not self._transport.is_closing():
            self._on_refused(RefusalReason.HTTP_SLOW)
        self._transport.abort()


def _timed(app: ASGIApp) -> ASGIApp:
    """`app`, whose connections are told when a request's headers came and when it is answered."""

    async def timed(scope: Scope, receive: Receive, send: Send) -> None:
        connection: _Connection = scope["state"].pop(_CONNECTION)
        connection.request_came()
        try:
            await app(scope, receive, send)
        finally:
            connection.request_answered()

    return timed


def _tcp(listen: str) -> Address:
    address = Address.parse(listen, listening=True)
    if address.socket_path:
        raise ConfigRefused(
            f"--http {listen}",
            found="it is a Unix socket, which neither Prometheus nor a browser can read",
            instead="Give host:port, such as 127.0.0.1:9464.",
            reason=RefusalReason.TARGET_INVALID,
        )
    return address
