"""The door: TCP connections are let in here, one by one, and passed on to gRPC's private socket.

gRPC itself would terminate TLS, but it says nothing of the connections that it turns away, waits two minutes for a
handshake, and reads certificates once. Here each connection has a deadline for its handshake and another for a stream
that the receiver welcomes, there is a bound on connections, and whoever is turned away is counted with the reason.

Behind the door a connection keeps its name: the door's end of the private socket is bound to an abstract address that
gRPC reports as the peer, by which `names_of_peer` finds the certificate's names again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from latentwatch.errors import ConfigRefused
from latentwatch.transport.credentials import ServerTls, names_of

HANDSHAKE_SECONDS: Final = 5.0
"""A TLS handshake across regions takes below one."""
WELCOME_SECONDS: Final = 20.0
"""From the connection to a welcomed stream: above the receiver's own deadline for the hello."""
_CHUNK_BYTES: Final = 1 << 18

REFUSALS: Final = ("too_many_connections", "slow_handshake", "certificate", "tls_handshake", "slow_connection")
"""Every reason for which a connection is turned away here."""


@dataclass
class _Guest:
    """One connection."""

    names: frozenset[str]
    welcomed: bool = False


class Door:
    """Listens on one TCP address and lets connections through to a Unix socket."""

    def __init__(
        self, inner: Path, tls: ServerTls | None, on_refused: Callable[[str], None], *, max_connections: int
    ) -> None:
        """Raises: ConfigRefused, "tls_unusable"."""
        self._inner = str(inner)
        self._tls = tls
        self._on_refused = on_refused
        self._max_connections = max_connections
        self._numbers = itertools.count(1)
        self._guests: dict[str, _Guest] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = 0
        self._server: asyncio.Server | None = None
        if tls is not None:
            tls.context()

    async def open(self, host: str, port: int) -> int:
        """Listen; the port that was bound. Raises OSError."""
        self._server = await asyncio.start_server(self._let_in, host, port, limit=_CHUNK_BYTES)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Listen no more and end every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def names_of_peer(self, peer: str) -> frozenset[str] | None:
        """The names on the certificate behind a gRPC peer; None where it did not come through this door with one."""
        guest = self._guests.get(peer)
        return guest.names if guest is not None and self._tls is not None and self._tls.client_authority else None

    def welcome(self, peer: str) -> None:
        """The receiver welcomed a stream of this peer: it may stay."""
        if guest := self._guests.get(peer):
            guest.welcomed = True

    async def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: Any = asyncio.current_task()
        self._tasks.add(task)
        self._connections += 1
        try:
            if self._connections > self._max_connections:
                self._on_refused("too_many_connections")
                return
            if await self._shake_hands(writer):
                await self._pass_on(reader, writer)
        except (OSError, asyncio.CancelledError):
            # The peer went, or the collector stops; either is said elsewhere.
            pass
        finally:
            self._connections -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _shake_hands(self, writer: asyncio.StreamWriter) -> bool:
        if self._tls is None:
            return True
        try:
            await writer.start_tls(self._tls.context(), ssl_handshake_timeout=HANDSHAKE_SECONDS)
        except (ssl.SSLCertVerificationError, ConfigRefused):
            self._on_refused("certificate")
        except ssl.SSLError as error:
            missing = error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
            self._on_refused("certificate" if missing else "tls_handshake")
        except ConnectionAbortedError:
            self._on_refused("slow_handshake")
        except ConnectionError:
            self._on_refused("tls_handshake")
        else:
            return True
        return False

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = f"latentwatch-{os.getpid()}-{id(self)}-{next(self._numbers)}"
        inner = socket.socket(socket.AF_UNIX)
        inner.setblocking(False)
        inner.bind(f"\0{address}")
        peer = f"unix-abstract:{address}"
        self._guests[peer] = _Guest(names_of(writer.get_extra_info("peercert")))
        pumps: list[asyncio.Task[None]] = []
        try:
            await asyncio.get_running_loop().sock_connect(inner, self._inner)
            back, forth = await asyncio.open_unix_connection(sock=inner, limit=_CHUNK_BYTES)
            pumps = [asyncio.create_task(_pump(reader, forth)), asyncio.create_task(_pump(back, writer))]
            await asyncio.wait(pumps, timeout=WELCOME_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not any(pump.done() for pump in pumps) and not self._guests[peer].welcomed:
                self._on_refused("slow_connection")
                return
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            # What the side that ended had said last still goes through.
            await asyncio.wait(pumps, timeout=1.0)
        finally:
            del self._guests[peer]
            for pump in pumps:
                pump.cancel()
            with contextlib.suppress(OSError):
                inner.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        writer.close()
