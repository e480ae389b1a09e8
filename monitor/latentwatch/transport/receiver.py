"""The receiver: a grpc.aio server that hands the batches of many streams to one Sink.

The guarantee. A batch is acknowledged only after `Sink.observe` returned for it and `Sink.commit` after that, so that
what is acknowledged is in the collector's state. Batches of one stream are observed in the order in which they were
sent. Once a newer stream of the same (replica, boot_id) is welcomed, the older one is not read any further: a number
the new stream was told to resume after cannot move behind its back.

Everything runs in the event loop that called `start`; the Sink is called in it too, and is expected to be quick.
grpc.aio and not a thread pool: a pool serves as many streams as it has threads and starves the rest, health checks
included, without an error (measured).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
import stat
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from latentwatch.errors import ConfigRefused, RefusalReason, StreamRefused
from latentwatch.log_limit import LogLimit
from latentwatch.transport import codec
from latentwatch.transport.address import Address, cannot_listen
from latentwatch.transport.credentials import ServerTls, Tokens, may_speak_for
from latentwatch.transport.fair_queue import FairQueue, FairQueueFacts, Flow
from latentwatch.transport.hello import Hello
from latentwatch.transport.listener import Listener
from latentwatch.transport.sink import ReceivedReport, Sink

log = logging.getLogger(__name__)

SERVER_OPTIONS: Final = (
    # A message between the two bounds is refused here with a reason and counted; gRPC cuts off what is longer still.
    ("grpc.max_receive_message_length", 4 * codec.MAX_MESSAGE_BYTES),
    # Only what is not compressed: 4 MiB of zeros compress to 4 KiB, a cheap way to make a collector work.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Two collectors on one port would each get half of the streams; the second has to fail instead.
    ("grpc.so_reuseport", 0),
    # An engine whose pod vanished sends no FIN.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    # Exporters ping every 10 s, idle or not; by default a server takes that for abuse and hangs up.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_ACK_SECONDS: Final = 0.05
"""Longest time that a batch in the state waits for its ack; short against a sender's buffer, long against a step."""
_ACK_BATCHES: Final = 16
"""Batches after which an ack is sent at once; at this rate acks cost nothing measurable."""
_HELLO_SECONDS: Final = 10.0
"""A peer that opens a stream and says nothing is let go after this."""
_IDLE_SECONDS: Final = 60.0
"""An idle engine sends a heartbeat every 5 s; a welcomed stream without a whole message for so long is no engine's."""
_PROBE_SECONDS: Final = 0.2
_SETTLE_SECONDS: Final = 1.0
"""For streams that were cut to unwind, so that the event loop may be closed after `stop`."""
_LOG_AGAIN_SECONDS: Final = 10.0
"""Between two lines on streams refused for one reason: every engine of a fleet tries again each few seconds."""

_FULL: Final = frozenset(
    {RefusalReason.TOO_MANY_REPLICAS, RefusalReason.TOO_MANY_MODELS, RefusalReason.TOO_MANY_STREAMS}
)

T = TypeVar("T")


@dataclass(frozen=True)
class ReceiverFacts:
    """How full a receiver is."""

    streams: int = 0
    max_streams: int = 0
    turns: FairQueueFacts = field(default_factory=FairQueueFacts)
    """Messages that wait to be merged, at most one a stream."""


class _Stream:
    """One accepted stream."""

    def __init__(self, hello: Hello, held: int) -> None:
        self.hello = hello
        self.held = held
        """Highest sequence in the state."""
        self.account = Flow()
        self.reading = True
        self.unacked = 0
        """Batches observed since the last ack."""
        self.heard_seconds = time.monotonic()
        """When its last whole message came, on the monotonic clock."""
        self.ack_due = asyncio.Event()
        self.ended: asyncio.Future[StreamRefused | None] = asyncio.get_running_loop().create_future()
        """Set from outside to end the stream, with what to tell the sender."""

    def end(self, refusal: StreamRefused | None) -> None:
        if not self.ended.done():
            self.ended.set_result(refusal)


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
        tls: ServerTls | None = None,
        tokens: Tokens | None = None,
        ack_batches: int = _ACK_BATCHES,
        ack_seconds: float = _ACK_SECONDS,
    ) -> None:
        """
        Args:   listen: addresses, each `unix:///path` or `host:port`; port 0 takes a free one.
                clock: the `now` that the Sink is given, seconds.
                on_refused: told the reason of every refusal that is sent, the Sink's own included.
                collector_id: 32 hex digits; drawn anew when absent.
                tls: for the TCP addresses; a Unix socket is protected by its mode.
                tokens: asked for on every address; None lets anyone in who can connect.
        Raises: ConfigRefused, "target_invalid".
        """
        self._sink = sink
        self._targets = [Address.parse(text, listening=True) for text in listen]
        self._clock = clock
        self._on_refused = on_refused or _unheard
        self._tls = tls
        self._tokens = tokens
        self._listener: Listener | None = None
        """For the TCP addresses."""
        self.collector_id = collector_id or uuid.uuid4().hex
        self._max_streams = max_streams
        self._ack_batches = ack_batches
        self._ack_seconds = ack_seconds
        self._turns = FairQueue()
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._bound_port: int | None = None
        self._sockets: list[tuple[Path, int]] = []
        self._server: Any = None
        self._health: Any = None
        self._may_log = LogLimit(_LOG_AGAIN_SECONDS, time.monotonic)

    @property
    def bound_port(self) -> int | None:
        """Port of the first TCP address, None while there is none."""
        return self._bound_port

    @property
    def facts(self) -> ReceiverFacts:
        """How full it is."""
        return ReceiverFacts(len(self._streams), self._max_streams, self._turns.facts)

    @property
    def live_streams(self) -> int:
        """Streams that were welcomed and did not end."""
        return len(self._streams)

    async def start(self) -> None:
        """Bind every address and serve.

        Raises: ConfigRefused, "port_in_use", "socket_in_use" or "address_unusable". Nothing is left bound then.
        """
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(codec.SERVICE, {codec.METHOD.rpartition("/")[2]: handler}),)
        )
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            for target in self._targets:
                if target.socket_path:
                    self._bind_socket(target)
            if not all(target.socket_path for target in self._targets):
                self._listener = Listener(self._tls, self._on_refused, max_connections=self._max_streams)
                self._server.add_insecure_port(f"unix://{self._listener.inner}")
            await self._server.start()
            for target in self._targets:
                if not target.socket_path:
                    await self._open(target)
        except BaseException:
            await self._close_listener()
            await self._server.stop(None)
            self._remove_sockets()
            raise
        for service in ("", codec.SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float = 1.0) -> None:
        """Report NOT_SERVING, acknowledge what the state holds, end every stream, and close within `grace` seconds."""
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()
        for stream in list(self._streams.values()):
            stream.end(None)
        # Streams that end by themselves tell their sender so; the server's own stop cuts those that did not.
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=grace)
        await self._close_listener()
        await self._server.stop(0)
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=_SETTLE_SECONDS)
        self._remove_sockets()

    async def _open(self, target: Address) -> None:
        assert self._listener is not None
        try:
            port = await self._listener.open(target.host.strip("[]"), target.port)
        except OSError as error:
            raise _unusable(target, error) from error
        if self._bound_port is None:
            self._bound_port = port

    async def _close_listener(self) -> None:
        if self._listener is not None:
            await self._listener.close()

    def _bind_socket(self, target: Address) -> None:
        path = Path(target.socket_path)
        _make_room(target, path)
        # Nobody but this user may connect, from the first moment at which the file exists.
        umask = os.umask(0o177)
        try:
            bound = self._server.add_insecure_port(str(target))
        except RuntimeError:
            bound = 0
        finally:
            os.umask(umask)
        if not bound:
            raise _why_not(target)
        self._sockets.append((path, path.stat().st_ino))

    def _remove_sockets(self) -> None:
        for path, inode in self._sockets:
            # gRPC may have removed it already, and another collector may have put its own in that place.
            if path.exists() and path.stat().st_ino == inode:
                path.unlink()
        self._sockets.clear()

    async def _serve(self, _: Any, context: Any) -> None:
        """One stream, from its hello to its end."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)
        if self._tokens is not None and not self._tokens.accept(_authorization(context)):
            self._on_refused(RefusalReason.UNAUTHENTICATED)
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "stream: it shows no token that this collector knows. Set LATENTWATCH_COLLECTOR_TOKEN_FILE.",
            )
        try:
            stream = await self._welcome(context)
        except StreamRefused as refused:
            await self._refuse(context, refused)
            return
        if stream is None:
            return
        key = (stream.hello.replica, stream.hello.boot_id)
        reader = asyncio.create_task(self._read(stream, context))
        acker = asyncio.create_task(self._acknowledge(stream, context))
        watchdog = asyncio.create_task(_end_when_idle(stream))
        try:
            await asyncio.wait((reader, stream.ended), return_when=asyncio.FIRST_COMPLETED)
            refusal = await _finish(reader)
            if stream.ended.done():
                refusal = stream.ended.result()
            # Not cancelled: gRPC goes on with a write whose caller was, and refuses another one beside it.
            stream.reading = False
            stream.ack_due.set()
            await acker
            if refusal is not None:
                await self._refuse(context, refusal)
        finally:
            reader.cancel()
            acker.cancel()
            watchdog.cancel()
            if self._streams.get(key) is stream:
                del self._streams[key]
                self._goodbye(stream)

    async def _welcome(self, context: Any) -> _Stream | None:
        """Read the hello and welcome the stream; None when the peer left. Raises StreamRefused."""
        try:
            data = await asyncio.wait_for(context.read(), _HELLO_SECONDS)
        except TimeoutError:
            raise _hello_missing(f"the stream said nothing for {_HELLO_SECONDS:g} s") from None
        if data is grpc.aio.EOF:
            return None
        hello = codec.decode_request(data)
        if not isinstance(hello, Hello):
            raise _hello_missing(f"its first message is batch {hello.sequence}")
        self._check_identity(hello.replica, context.peer())
        key = (hello.replica, hello.boot_id)
        if len(self._streams) >= self._max_streams and key not in self._streams:
            raise StreamRefused(
                f"stream of replica {hello.replica!r}",
                found=f"{len(self._streams)} streams are open, which is this collector's bound",
                instead="Run another collector, or raise the bound on streams.",
                reason=RefusalReason.TOO_MANY_STREAMS,
            )
        if (older := self._streams.pop(key, None)) is not None:
            older.end(_superseded(hello))
            self._goodbye(older)
        try:
            held = self._sink.hello(hello, self._clock())
            self._sink.commit()
        except StreamRefused:
            raise
        except Exception as error:
            # A bug here is the collector's: the engine is told so and comes back.
            log.exception("the collector failed on the hello of replica %r", hello.replica)
            raise _collector_error(hello, error) from error
        stream = self._streams[key] = _Stream(hello, held)
        log.info("replica %r connected, resuming after %d", hello.replica, held)
        if self._listener is not None:
            self._listener.welcome(context.peer())
        try:
            await context.write(codec.encode_reply(codec.Welcome(held, self.collector_id)))
        except BaseException:
            if self._streams.get(key) is stream:
                del self._streams[key]
                self._goodbye(stream)
            raise
        return stream

    async def _read(self, stream: _Stream, context: Any) -> StreamRefused | None:
        """Hand every batch to the Sink until the peer has no more, or one is refused; returns that refusal."""
        loop = asyncio.get_running_loop()
        while (data := await context.read()) is not grpc.aio.EOF and not stream.ended.done():
            stream.heard_seconds = time.monotonic()
            try:
                take = functools.partial(self._take, stream, context.peer(), data)
                await self._turns.take(stream.account, len(data), take, alone=len(self._streams) == 1)
            except StreamRefused as refusal:
                return refusal
            except Exception as error:
                # As for the hello; the batch is not acknowledged.
                log.exception("the collector failed on a batch of replica %r", stream.hello.replica)
                return _collector_error(stream.hello, error)
            if not stream.unacked:
                loop.call_later(self._ack_seconds, stream.ack_due.set)
            stream.unacked += 1
            if stream.unacked >= self._ack_batches:
                stream.ack_due.set()
        return None

    def _take(self, stream: _Stream, peer: str, data: bytes) -> None:
        """Hand one message to the Sink. Raises StreamRefused, and whatever the Sink fails with."""
        if stream.ended.done():
            return
        if len(data) > codec.MAX_MESSAGE_BYTES:
            raise _too_large(stream.hello, len(data))
        received = codec.decode_request(data)
        if isinstance(received, Hello):
            raise _hello_repeated(stream.hello)
        if isinstance(received, ReceivedReport) != stream.hello.forwards:
            raise _not_announced(stream.hello)
        if received.sequence <= stream.held:
            raise _replayed(stream.hello, received.sequence, stream.held)
        if isinstance(received, ReceivedReport):
            for name in received.report.replica_names:
                self._check_identity(name, peer)
            self._sink.merge(stream.hello, received, self._clock())
        else:
            self._sink.observe(stream.hello, received, self._clock())
        stream.held = received.sequence

    async def _acknowledge(self, stream: _Stream, context: Any) -> None:
        """Acknowledge whenever that is due, the last time when the stream is read no more."""
        reading = True
        while reading:
            await stream.ack_due.wait()
            stream.ack_due.clear()
            reading = stream.reading
            await self._write_ack(stream, context)

    async def _write_ack(self, stream: _Stream, context: Any) -> None:
        if stream.unacked:
            stream.unacked = 0
            self._sink.commit()
            await context.write(codec.encode_reply(codec.Ack(stream.held)))

    async def _refuse(self, context: Any, refusal: StreamRefused) -> None:
        self._on_refused(refusal.reason)
        if self._may_log(refusal.reason):
            # The text may hold what the peer sent, so it is logged as a value and bounded.
            log.warning("stream of %s refused, %s: %.500r", context.peer(), refusal.reason, str(refusal))
        await context.write(codec.encode_reply(refusal))
        if refusal.reason in _FULL:
            # Said as gRPC says it too, for whoever looks at statuses.
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(refusal))

    def _goodbye(self, stream: _Stream) -> None:
        log.info("replica %r disconnected after %d", stream.hello.replica, stream.held)
        self._sink.goodbye(stream.hello, self._clock())

    def _check_identity(self, replica: str, peer: str) -> None:
        """Raises StreamRefused, "replica_identity": a certificate was asked for, and it is another replica's."""
        names = self._listener.names_of_peer(peer) if self._listener is not None else None
        if names is not None and not may_speak_for(names, replica):
            raise StreamRefused(
                f"stream of replica {replica!r}",
                found=f"its certificate stands for {', '.join(sorted(names)) or 'no name'}",
                instead="Give the engine a certificate whose DNS or URI name is LATENTWATCH_REPLICA.",
                reason=RefusalReason.REPLICA_IDENTITY,
            )


def _authorization(context: Any) -> str:
    return next((value for key, value in context.invocation_metadata() or () if key == "authorization"), "")


def _unheard(_reason: str) -> None:
    """For a receiver whose refusals nobody counts."""


async def _end_when_idle(stream: _Stream) -> None:
    while (left := stream.heard_seconds + _IDLE_SECONDS - time.monotonic()) > 0:
        await asyncio.sleep(left)
    stream.end(
        StreamRefused(
            f"stream of replica {stream.hello.replica!r}",
            found=f"it sent no whole message for {_IDLE_SECONDS:g} s",
            instead="An engine sends a heartbeat every few seconds; look at its exporter's log.",
            reason=RefusalReason.STREAM_IDLE,
        )
    )


async def _finish(task: asyncio.Task[T]) -> T | None:
    """Stop a task and wait until it has; returns what it returned, None if it did not get that far."""
    task.cancel()
    await asyncio.wait((task,))
    if task.cancelled():
        return None
    if (error := task.exception()) is not None:
        raise error
    return task.result()


def _make_room(target: Address, path: Path) -> None:
    """Remove the socket that a killed collector left, and nothing else. Raises ConfigRefused, "socket_in_use"."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        found = "a file that is no socket is there"
    else:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PROBE_SECONDS)
            try:
                probe.connect(target.socket_path)
                found = "another process listens there"
            except ConnectionRefusedError:
                path.unlink()
                return
            except OSError as error:
                found = f"it cannot be told whether another process listens there: {error.strerror or error}"
    raise ConfigRefused(
        f"listening on {target}",
        found=found,
        instead="Stop the other collector, or give this one another path.",
        reason=RefusalReason.SOCKET_IN_USE,
    )


def _why_not(target: Address) -> ConfigRefused:
    """Why gRPC could not bind a socket's path, by asking the system: gRPC itself does not say."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(target.socket_path)
        Path(target.socket_path).unlink()
    except OSError as error:
        return _unusable(target, error)
    return _unusable(target, OSError("gRPC cannot bind it"))


def _unusable(target: Address, error: OSError) -> ConfigRefused:
    return cannot_listen(f"listening on {target}", error, instead="Stop what uses it, or listen on another address.")


def _too_large(hello: Hello, length: int) -> StreamRefused:
    return StreamRefused(
        f"stream of replica {hello.replica!r}",
        found=f"it sent a message of {length} bytes, this collector takes {codec.MAX_MESSAGE_BYTES}",
        instead="Run the same latentwatch version in the engine and in the collector.",
        reason=RefusalReason.MESSAGE_TOO_LARGE,
    )


def _replayed(hello: Hello, sequence: int, held: int) -> StreamRefused:
    return StreamRefused(
        f"stream of replica {hello.replica!r}",
        found=f"it sent batch {sequence}, and was told that everything up to {held} is held",
        instead="An engine sends nothing twice after it was told; if this is one, report it as a bug.",
        reason=RefusalReason.REPLAYED,
    )


def _hello_missing(found: str) -> StreamRefused:
    return StreamRefused(
        "stream",
        found=found,
        instead="Say who you are first: the first message of a stream is a Hello.",
        reason=RefusalReason.HELLO_MISSING,
    )


def _hello_repeated(hello: Hello) -> StreamRefused:
    return StreamRefused(
        f"stream of replica {hello.replica!r}",
        found="it said hello twice",
        instead="Open one stream for each engine boot.",
        reason=RefusalReason.HELLO_REPEATED,
    )


def _not_announced(hello: Hello) -> StreamRefused:
    sends, said = ("batches", "forwards") if hello.forwards else ("reports", "does not forward")
    return StreamRefused(
        f"stream of replica {hello.replica!r}",
        found=f"its hello says that it {said}, and it sends {sends}",
        instead="An engine sends batches, a collector with --forward-to sends reports; open a stream for each.",
        reason=RefusalReason.MALFORMED_BATCH,
    )


def _superseded(hello: Hello) -> StreamRefused:
    return StreamRefused(
        f"stream of replica {hello.replica!r}",
        found="a newer stream of the same engine boot took its place",
        instead="If two engines run, give each a replica name of its own.",
        reason=RefusalReason.SUPERSEDED,
    )


def _collector_error(hello: Hello, error: Exception) -> StreamRefused:
    return StreamRefused(
        f"stream of replica {hello.replica!r}",
        found=f"the collector failed on it with {type(error).__name__}",
        instead="Read the collector's log and report the error there as a bug.",
        reason=RefusalReason.COLLECTOR_ERROR,
    )
