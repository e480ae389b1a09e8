"""TCP connections are accepted here, one by one, and passed on to gRPC's private socket.

gRPC would end TLS itself, read certificates again, cut slow handshakes off and bound connections. It is not asked to,
because it tells nobody whom it turned away: who shows no certificate or an expired one, who is too slow, who comes when
all places are taken. Here each of them is counted with the reason, which SECURITY.md promises and an alert reads.

Behind this listener a connection can still be told from others: its end of the private socket has an address of its
own, which gRPC reports as the peer, and by which `names_of_peer` finds the certificate's names again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from latentwatch import host as this_host
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.transport.credentials import ServerTls, names_of
from latentwatch.transport.places import Full, Places, peer_of

HANDSHAKE_SECONDS: Final = 5.0
"""A TLS handshake across regions takes below one."""
WELCOME_SECONDS: Final = 20.0
"""From the connection to a welcomed stream: above the receiver's own deadline for the hello."""
_CHUNK_BYTES: Final = 1 << 18


@dataclass
class _Connection:
    """One that is passed on."""

    task: asyncio.Task[None]
    address: str
    """Who is behind it; see places.peer_of."""
    names: frozenset[str]
    is_welcome: bool = False


class Listener:
    """Listens on TCP addresses and passes connections on to the Unix socket `inner`, on which gRPC serves."""

    def __init__(
        self, tls: ServerTls | None, on_refused: Callable[[str], None], places: Places[asyncio.Task[None]]
    ) -> None:
        """
        Args:   places: of the connections; one without a welcomed stream only waits in its own.
        Raises: ConfigRefused, "tls_unusable" or "address_unusable".
        """
        self._tls = tls
        self._on_refused = on_refused
        self._places = places
        self._connections: dict[str, _Connection] = {}
        """By gRPC's name of the peer."""
        self._tasks: set[asyncio.Task[None]] = set()
        """One for each TCP connection."""
        self._servers: list[asyncio.Server] = []
        if tls is not None:
            tls.context()
        # A folder that only this user can enter: whoever connects in there has passed TLS.
        try:
            self._folder = this_host.socket_folder()
        except OSError as error:
            raise ConfigRefused(
                "a folder for the socket behind the TCP address",
                found=error.strerror or str(error),
                instead="Set TMPDIR to a folder with a short path that this user can write, or listen on unix:///path.",
                reason=RefusalReason.ADDRESS_UNUSABLE,
            ) from error
        self.inner = Path(self._folder.name) / "inner.sock"

    async def open(self, host: str, port: int) -> int:
        """Listen; the port that was bound. Raises OSError."""
        server = await asyncio.start_server(self._serve, host, port, limit=_CHUNK_BYTES)
        self._servers.append(server)
        bound: int = server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Listen no more and end every connection."""
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._folder.cleanup()

    def names_of_peer(self, peer: str) -> frozenset[str] | None:
        """The names on the certificate behind a gRPC peer; None where it was not asked for one."""
        connection = self._connections.get(peer)
        asked = self._tls is not None and self._tls.client_authority is not None
        return connection.names if connection is not None and asked else None

    def address_of_peer(self, peer: str) -> str:
        """Who is behind a gRPC peer; the peer's own name where it did not come over TCP."""
        connection = self._connections.get(peer)
        return connection.address if connection is not None else peer

    def welcome(self, peer: str) -> None:
        """The receiver welcomed a stream of this peer: it may stay."""
        if connection := self._connections.get(peer):
            connection.is_welcome = True
            self._places.work(connection.task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._tasks.add(task)
        address = peer_of((writer.get_extra_info("peername") or ("",))[0])
        try:
            if self._has_place(task, address) and await self._shake_hands(writer):
                await self._pass_on(reader, writer, address)
        except (OSError, asyncio.CancelledError):
            # The peer went, or the collector stops; either is said elsewhere.
            pass
        finally:
            self._tasks.discard(task)
            self._places.leave(task)
            writer.transport.abort()

    def _has_place(self, task: asyncio.Task[None], address: str) -> bool:
        try:
            lost = self._places.reserve(task, address)
        except Full:
            self._on_refused(RefusalReason.TOO_MANY_CONNECTIONS)
            return False
        if lost is not None:
            self._on_refused(RefusalReason.TOO_MANY_CONNECTIONS)
            lost.cancel()
        return True

    async def _shake_hands(self, writer: asyncio.StreamWriter) -> bool:
        if self._tls is None:
            return True
        try:
            await writer.start_tls(self._tls.context(), ssl_handshake_timeout=HANDSHAKE_SECONDS)
        except (ssl.SSLCertVerificationError, ConfigRefused):
            self._on_refused(RefusalReason.CERTIFICATE)
        except ssl.SSLError as error:
            missing = error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
            self._on_refused(RefusalReason.CERTIFICATE if missing else RefusalReason.TLS_HANDSHAKE)
        except ConnectionAbortedError:
            self._on_refused(RefusalReason.SLOW_HANDSHAKE)
        except ConnectionError:
            self._on_refused(RefusalReason.TLS_HANDSHAKE)
        else:
            return True
        return False

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        inner = socket.socket(socket.AF_UNIX)
        inner.setblocking(False)
        # To no name, for which Linux gives it an abstract one that nobody else has.
        inner.bind("")
        peer = f"unix-abstract:{inner.getsockname()[1:].decode()}"
        task = cast("asyncio.Task[None]", asyncio.current_task())
        connection = _Connection(task, address, names_of(writer.get_extra_info("peercert")))
        self._connections[peer] = connection
        pumps: list[asyncio.Task[None]] = []
        try:
            await asyncio.get_running_loop().sock_connect(inner, str(self.inner))
            back, forth = await asyncio.open_unix_connection(sock=inner, limit=_CHUNK_BYTES)
            pumps = [asyncio.create_task(_pump(reader, forth)), asyncio.create_task(_pump(back, writer))]
            await asyncio.wait(pumps, timeout=WELCOME_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not any(pump.done() for pump in pumps) and not connection.is_welcome:
                self._on_refused(RefusalReason.SLOW_CONNECTION)
                return
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            # What the side that ended had said last still goes through.
            await asyncio.wait(pumps, timeout=1.0)
        finally:
            del self._connections[peer]
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
