"""The receiver: a grpc.aio server that hands the batches of many streams to one Sink, and the health service.

Everything runs in the event loop that called `start`. grpc.aio and not a thread pool: a pool serves as many streams as
it has threads and starves the rest, health checks included, without an error (measured).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from latentwatch.transport import codec
from latentwatch.transport.address import Address
from latentwatch.transport.credentials import ServerTls, Tokens
from latentwatch.transport.places import Places
from latentwatch.transport.servicer import ACK_BATCHES, ACK_SECONDS, ReceiverFacts, Servicer
from latentwatch.transport.sink import Sink
from latentwatch.transport.tcp_listener import Listener
from latentwatch.transport.unix_sockets import UnixSockets, cannot_bind

SERVER_OPTIONS: Final = (
    # A message between the two bounds is refused here with a reason and counted; gRPC cuts off what is longer still.
    ("grpc.max_receive_message_length", 4 * codec.MAX_MESSAGE_BYTES),
    # Only what is not compressed: 4 MiB of zeros compress to 4 KiB, a cheap way to make a collector work.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Two collectors on one port would each get half of the streams; the second has to fail instead.
    ("grpc.so_reuseport", 0),
    # An exporter has a stream, one for its backlog, and health checks.
    ("grpc.max_concurrent_streams", 100),
    # A stream's headers are a token and what gRPC adds.
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    # An engine whose pod vanished sends no FIN.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    # Exporters ping every 10 s, idle or not; by default a server takes that for abuse and hangs up.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
PEER_STREAMS: Final = 256
"""Engines of one node and more; some networks show a whole node as one address."""
_SETTLE_SECONDS: Final = 1.0
"""For streams that were cut to unwind, so that the event loop may be closed after `stop`."""


class Receiver:
    """Serves the Monitor and the standard health service. Make it, `await start()`, later `await stop(grace)`."""

    def __init__(
        self,
        sink: Sink,
        listen: Sequence[str],
        *,
        clock: Callable[[], float],
        on_refused: Callable[[str], None] | None = None,
        collector_id: str | None = None,
        max_streams: int = 1024,
        peer_streams: int = PEER_STREAMS,
        tls: ServerTls | None = None,
        tokens: Tokens | None = None,
        ack_batches: int = ACK_BATCHES,
        ack_seconds: float = ACK_SECONDS,
    ) -> None:
        """
        Args:   listen: addresses, each `unix:///path` or `host:port`; port 0 takes a free one.
                clock: the `now` that the Sink is given, seconds.
                on_refused: told the reason of every refusal that is sent, the Sink's own included.
                collector_id: 32 hex digits; drawn anew when absent.
                peer_streams: connections and streams of one peer: an address, of IPv6 a /64, or the Unix sockets.
                tls: for the TCP addresses; a Unix socket is protected by its mode.
                tokens: asked for on every address; None lets anyone in who can connect.
        Raises: ConfigRefused, "target_invalid".
        """
        self._targets = [Address.parse(text, listening=True) for text in listen]
        self._on_refused = on_refused or _unheard
        self._tls = tls
        self._max_streams, self._peer_streams = max_streams, peer_streams
        self.servicer = Servicer(
            sink,
            clock=clock,
            on_refused=self._on_refused,
            collector_id=collector_id,
            max_streams=max_streams,
            peer_streams=peer_streams,
            tokens=tokens,
            ack_batches=ack_batches,
            ack_seconds=ack_seconds,
        )
        self._listener: Listener | None = None
        """For the TCP addresses."""
        self._sockets = UnixSockets()
        self._bound_port: int | None = None
        self._server: grpc.aio.Server | None = None
        self._health = health_aio.HealthServicer()

    @property
    def bound_port(self) -> int | None:
        """Port of the first TCP address, None while there is none."""
        return self._bound_port

    @property
    def collector_id(self) -> str:
        """What each stream is told."""
        return self.servicer.collector_id

    @property
    def facts(self) -> ReceiverFacts:
        """How full it is."""
        return self.servicer.facts

    @property
    def live_streams(self) -> int:
        """Streams that were welcomed and did not end."""
        return self.facts.streams

    async def start(self) -> None:
        """Bind every address and serve.

        Raises: ConfigRefused, "port_in_use", "socket_in_use" or "address_unusable". Nothing is left bound then.
        """
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self.servicer.serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(codec.SERVICE, {codec.METHOD.rpartition("/")[2]: handler}),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            for target in self._targets:
                if target.socket_path:
                    self._sockets.bind(target, self._server.add_insecure_port)
            if not all(target.socket_path for target in self._targets):
                # Twice as many for a peer: one stream too many is told why, and one that comes back finds a place.
                places: Places[asyncio.Task[None]] = Places(self._max_streams, 2 * self._peer_streams)
                self._listener = Listener(self._tls, self._on_refused, places)
                self.servicer.listener = self._listener
                self._server.add_insecure_port(f"unix://{self._listener.inner}")
            await self._server.start()
            for target in self._targets:
                if not target.socket_path:
                    await self._open(target)
        except BaseException:
            await self._close_listener()
            await self._server.stop(None)
            self._sockets.remove()
            raise
        for service in ("", codec.SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float = 1.0) -> None:
        """Report NOT_SERVING, acknowledge what the state holds, end every stream, and close within `grace` seconds."""
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()
        self.servicer.end_all()
        # Streams that end by themselves tell their sender so; the server's own stop cuts those that did not.
        await self.servicer.ended(grace)
        await self._close_listener()
        await self._server.stop(0)
        await self.servicer.ended(_SETTLE_SECONDS)
        self._sockets.remove()

    async def _open(self, target: Address) -> None:
        assert self._listener is not None
        try:
            port = await self._listener.open(target.host.strip("[]"), target.port)
        except OSError as error:
            raise cannot_bind(target, error) from error
        if self._bound_port is None:
            self._bound_port = port

    async def _close_listener(self) -> None:
        if self._listener is not None:
            await self._listener.close()


def _unheard(_reason: str) -> None:
    """For a receiver whose refusals nobody counts."""
