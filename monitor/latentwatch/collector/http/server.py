"""The HTTP server: uvicorn on one address, with connections of our own kind; see `connection`.

Of uvicorn's inside this uses `Server.capture_signals`, which leaves signals to the service. It may change with any
version: pyproject.toml bounds it, and a test says when it is missing. hypercorn would not need it, but loses the
deadlines over HTTP/2, the bounds on connections, and the count of who is turned away.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
from collections.abc import Callable, Iterator
from typing import Final, cast

import uvicorn
from starlette.types import ASGIApp

from latentwatch.collector.http.connection import Connection, Doors, HttpLimits, bounded
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.transport.address import Address, cannot_listen
from latentwatch.transport.credentials import ServerTls

STOP_SECONDS: Final = 2
"""For a scrape in progress to finish."""


class HttpServer:
    """Serves an app on one address. Make it, `bind()`, run `serve()`, later `stop()` and await `serve()`'s end."""

    def __init__(
        self,
        listen: str,
        app: ASGIApp,
        *,
        tls: ServerTls | None,
        on_refused: Callable[[str], None],
        limits: HttpLimits | None = None,
    ) -> None:
        """Raises: ConfigRefused, "target_invalid" or "tls_unusable"."""
        self._address = _tcp(listen)
        self._scheme = "https" if tls else "http"
        self._socket: socket.socket | None = None
        if tls is not None:
            tls.context()
        connection = functools.partial(Connection, tls=tls, doors=Doors(limits or HttpLimits(), on_refused))
        self._server = _Uvicorn(
            uvicorn.Config(
                bounded(app),
                # uvicorn calls it and asks nothing else of it.
                http=cast("type[asyncio.Protocol]", connection),
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                # Whatever a stranger sends that is no HTTP would be a line otherwise.
                log_level="error",
                # What else uvicorn would take from the environment: WEB_CONCURRENCY and FORWARDED_ALLOW_IPS.
                workers=1,
                proxy_headers=False,
                forwarded_allow_ips=[],
                server_header=False,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )

    @property
    def url(self) -> str:
        """Where it is, with the port that was bound."""
        port = self._socket.getsockname()[1] if self._socket else self._address.port
        return f"{self._scheme}://{self._address.host}:{port}"

    @property
    def host(self) -> str:
        """As it was given."""
        return self._address.host

    @property
    def bound_address(self) -> str:
        """What it listens on; call it once it is bound."""
        assert self._socket is not None
        address: str = self._socket.getsockname()[0]
        return address

    @property
    def is_encrypted(self) -> bool:
        """Whether it speaks TLS."""
        return self._scheme == "https"

    @property
    def is_loopback(self) -> bool:
        """Whether only this host reaches it; call it once it is bound."""
        return ipaddress.ip_address(self.bound_address).is_loopback

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
