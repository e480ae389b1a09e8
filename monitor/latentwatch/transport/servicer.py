"""Streams of engines and of collectors that forward: read, handed to a Sink, acknowledged.

The guarantee. A batch is acknowledged only after `Sink.observe` returned for it and `Sink.commit` after that, so that
what is acknowledged is in the collector's state. Batches of one stream are observed in the order in which they were
sent. Once a newer stream of the same (replica, boot_id) is welcomed, the older one is not read any further: a number
the new stream was told to resume after cannot move behind its back.

Everything runs in one event loop; the Sink is called in it too, and is expected to be quick.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar, cast

import grpc

from latentwatch.errors import RefusalReason, StreamRefused
from latentwatch.log_limit import LogLimit
from latentwatch.transport import codec
from latentwatch.transport.credentials import Tokens, may_speak_for
from latentwatch.transport.fair_queue import FairQueue, FairQueueFacts, Flow
from latentwatch.transport.hello import Hello
from latentwatch.transport.places import Places
from latentwatch.transport.sink import ReceivedReport, Sink
from latentwatch.transport.stream_state import (
    StreamState,
    collector_error,
    first_message,
    hello_missing,
    stream_idle,
    superseded,
    too_many_streams,
)
from latentwatch.transport.tcp_listener import Listener

log = logging.getLogger(__name__)

ACK_SECONDS: Final = 0.05
"""Longest time that a batch in the state waits for its ack; short against a sender's buffer, long against a step."""
ACK_BATCHES: Final = 16
"""Batches after which an ack is sent at once; at this rate acks cost nothing measurable."""
_HELLO_SECONDS: Final = 10.0
"""A peer that opens a stream and says nothing is let go after this."""
_LOG_AGAIN_SECONDS: Final = 10.0
"""Between two lines on streams refused for one reason: every engine of a fleet tries again each few seconds."""
_REFUSAL_CHARACTERS: Final = 500
"""Of a refusal that is shown or logged: part of it is what the peer sent."""
_FULL: Final = frozenset(
    {RefusalReason.TOO_MANY_REPLICAS, RefusalReason.TOO_MANY_MODELS, RefusalReason.TOO_MANY_STREAMS}
)

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
T = TypeVar("T")


@dataclass(frozen=True)
class LatestRefusal:
    """The latest stream that was refused for one reason."""

    reason: str
    seconds: float
    """By the receiver's clock."""
    text: str
    """What, found and instead: names and hashes of both sides, in one line; part of it is the peer's."""


@dataclass(frozen=True)
class ReceiverFacts:
    """How full a receiver is, and whom it turned away last."""

    streams: int = 0
    max_streams: int = 0
    queue: FairQueueFacts = field(default_factory=FairQueueFacts)
    """Messages that wait to be merged, at most one a stream."""
    refusals: tuple[LatestRefusal, ...] = ()
    """One for each reason that there was."""


class _Stream:
    """One accepted stream, and who waits for it."""

    def __init__(self, state: StreamState, address: str) -> None:
        self.state = state
        self.address = address
        """Who is behind it; see places.peer_of."""
        self.flow = Flow()
        self.reading = True
        self.ack_due = asyncio.Event()
        self.ended: asyncio.Future[StreamRefused | None] = asyncio.get_running_loop().create_future()
        """Set from outside to end the stream, with what to tell the sender."""

    @property
    def hello(self) -> Hello:
        return self.state.hello

    @property
    def key(self) -> tuple[str, str]:
        return self.state.hello.replica, self.state.hello.boot_id

    def end(self, refusal: StreamRefused | None) -> None:
        if not self.ended.done():
            self.ended.set_result(refusal)


class Servicer:
    """Serves the one method of the Monitor service."""

    def __init__(
        self,
        sink: Sink,
        *,
        clock: Callable[[], float],
        on_refused: Callable[[str], None],
        collector_id: str | None,
        max_streams: int,
        peer_streams: int,
        tokens: Tokens | None,
        ack_batches: int,
        ack_seconds: float,
    ) -> None:
        """Args: as of Receiver."""
        self.collector_id = collector_id or uuid.uuid4().hex
        self.listener: Listener | None = None
        """Knows the certificates of peers that came over TCP."""
        self._sink = sink
        self._clock = clock
        self._on_refused = on_refused
        self._tokens = tokens
        self._max_streams, self._peer_streams = max_streams, peer_streams
        self._unknown: Places[asyncio.Timeout] = Places(max_streams, max(1, peer_streams // 4))
        """Streams without a hello, by their deadlines. Fewer, since each may be sending a message of any size."""
        self._ack_batches = ack_batches
        self._ack_seconds = ack_seconds
        self._queue = FairQueue()
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._may_log = LogLimit(_LOG_AGAIN_SECONDS, time.monotonic)
        self._refusals: dict[str, LatestRefusal] = {}
        """By reason, which are slugs of our own code."""

    @property
    def facts(self) -> ReceiverFacts:
        """How full it is."""
        latest = tuple(self._refusals.values())
        return ReceiverFacts(len(self._streams), self._max_streams, self._queue.facts, latest)

    def end_all(self) -> None:
        """Acknowledge what the state has, and end every stream."""
        for stream in list(self._streams.values()):
            stream.end(None)

    async def ended(self, seconds: float) -> None:
        """Wait until no stream is left, at most so long."""
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=seconds)

    async def serve(self, _: object, context: Context) -> None:
        """One stream, from its hello to its end."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)
        if self._tokens is not None and not self._tokens.accept(_authorization(context)):
            found = "stream: it shows no token that this collector knows. Set LATENTWATCH_COLLECTOR_TOKEN_FILE."
            self._note_refused(context, RefusalReason.UNAUTHENTICATED, found)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, found)
        try:
            stream = await self._welcome(context)
        except StreamRefused as refused:
            await self._refuse(context, refused)
            return
        if stream is None:
            return
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
            self._let_go(stream)

    async def _welcome(self, context: Context) -> _Stream | None:
        """Read the hello and welcome the stream; None when the peer left. Raises StreamRefused."""
        address = self.listener.address_of_peer(context.peer()) if self.listener is not None else context.peer()
        data = await self._first_message(context, address)
        if data is None:
            return None
        hello = first_message(data)
        self._check_identity(hello.replica, context.peer())
        key = (hello.replica, hello.boot_id)
        if key not in self._streams:
            self._check_room(hello, address)
        if (older := self._streams.get(key)) is not None:
            older.end(superseded(hello))
            self._let_go(older)
        try:
            stored = self._sink.hello(hello, self._clock())
            self._sink.commit()
        except StreamRefused:
            raise
        except Exception as error:
            # A bug here is the collector's: the engine is told so and comes back.
            log.exception("the collector failed on the hello of replica %r", hello.replica)
            raise collector_error(hello, error) from error
        stream = self._streams[key] = _Stream(StreamState(hello, stored, time.monotonic()), address)
        log.info("replica %r connected, resuming after %d", hello.replica, stored)
        if self.listener is not None:
            self.listener.welcome(context.peer())
        try:
            await context.write(codec.encode_reply(codec.Welcome(stored, self.collector_id)))
        except BaseException:
            self._let_go(stream)
            raise
        return stream

    async def _first_message(self, context: Context, address: str) -> bytes | None:
        """None when the peer left. Raises StreamRefused, "hello_missing" or "too_many_streams"."""
        deadline = asyncio.timeout(_HELLO_SECONDS)
        try:
            async with deadline:
                lost = self._unknown.reserve(deadline, address)
                if lost is not None and not lost.expired():
                    lost.reschedule(0.0)
                return await _next_message(context)
        except TimeoutError:
            if deadline in self._unknown:
                raise hello_missing(f"the stream said nothing for {_HELLO_SECONDS:g} s") from None
            raise too_many_streams("stream", "it said nothing yet, and another one needs its place") from None
        finally:
            self._unknown.leave(deadline)

    def _check_room(self, hello: Hello, address: str) -> None:
        """Raises StreamRefused, "too_many_streams"."""
        what = f"stream of replica {hello.replica!r}"
        if len(self._streams) >= self._max_streams:
            raise too_many_streams(what, f"{len(self._streams)} streams are open, which is this collector's bound")
        of_peer = sum(stream.address == address for stream in self._streams.values())
        if of_peer >= self._peer_streams:
            raise too_many_streams(what, f"{of_peer} streams of {address} are open, which is the bound for one peer")

    async def _read(self, stream: _Stream, context: Context) -> StreamRefused | None:
        """Hand every batch to the Sink until the peer has no more, or one is refused; returns that refusal."""
        loop = asyncio.get_running_loop()
        while (data := await _next_message(context)) is not None and not stream.ended.done():
            stream.state.heard(time.monotonic())
            try:
                merge = functools.partial(self._merge, stream, context.peer(), data)
                await self._queue.run(stream.flow, len(data), merge, alone=len(self._streams) == 1)
            except StreamRefused as refusal:
                return refusal
            except Exception as error:
                # As for the hello; the batch is not acknowledged.
                log.exception("the collector failed on a batch of replica %r", stream.hello.replica)
                return collector_error(stream.hello, error)
            if stream.state.unacked == 1:
                loop.call_later(self._ack_seconds, stream.ack_due.set)
            if stream.state.unacked >= self._ack_batches:
                stream.ack_due.set()
        return None

    def _merge(self, stream: _Stream, peer: str, data: bytes) -> None:
        """Hand one message to the Sink. Raises StreamRefused, and whatever the Sink fails with."""
        if stream.ended.done():
            return
        received = stream.state.read(data)
        if isinstance(received, ReceivedReport):
            for name in received.report.replica_names:
                self._check_identity(name, peer)
            self._sink.merge(stream.hello, received, self._clock())
        else:
            self._sink.observe(stream.hello, received, self._clock())
        stream.state.store(received.sequence)

    async def _acknowledge(self, stream: _Stream, context: Context) -> None:
        """Acknowledge whenever that is due, the last time when the stream is read no more."""
        reading = True
        while reading:
            await stream.ack_due.wait()
            stream.ack_due.clear()
            reading = stream.reading
            await self._write_ack(stream, context)

    async def _write_ack(self, stream: _Stream, context: Context) -> None:
        if (stored := stream.state.acknowledge()) is not None:
            self._sink.commit()
            await context.write(codec.encode_reply(codec.Ack(stored)))

    def _note_refused(self, context: Context, reason: str, text: str) -> None:
        """Count it, and have it told: to the doctor and the page, and now and then to the log."""
        self._on_refused(reason)
        self._refusals[reason] = LatestRefusal(reason, self._clock(), text[:_REFUSAL_CHARACTERS])
        if self._may_log(reason):
            # The text may hold what the peer sent, so it is logged as a value and bounded.
            log.warning("stream of %s refused, %s: %.500r", context.peer(), reason, text)

    async def _refuse(self, context: Context, refusal: StreamRefused) -> None:
        self._note_refused(context, refusal.reason, str(refusal))
        await context.write(codec.encode_reply(refusal))
        if refusal.reason in _FULL:
            # Said as gRPC says it too, for whoever looks at statuses.
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(refusal))

    def _let_go(self, stream: _Stream) -> None:
        """Tell the Sink that a stream ended; not of one whose place a newer one took, which was told then."""
        if self._streams.get(stream.key) is stream:
            del self._streams[stream.key]
            log.info("replica %r disconnected after %d", stream.hello.replica, stream.state.stored)
            self._sink.goodbye(stream.hello, self._clock())

    def _check_identity(self, replica: str, peer: str) -> None:
        """Raises StreamRefused, "replica_identity": a certificate was asked for, and it is another replica's."""
        names = self.listener.names_of_peer(peer) if self.listener is not None else None
        if names is not None and not may_speak_for(names, replica):
            raise StreamRefused(
                f"stream of replica {replica!r}",
                found=f"its certificate stands for {', '.join(sorted(names)) or 'no name'}",
                instead="Give the engine a certificate whose DNS or URI name is LATENTWATCH_REPLICA.",
                reason=RefusalReason.REPLICA_IDENTITY,
            )


async def _next_message(context: Context) -> bytes | None:
    """None at the end, for which gRPC has a mark that is no message."""
    data: object = await context.read()
    return data if isinstance(data, bytes) else None


def _authorization(context: Context) -> str:
    metadata = context.invocation_metadata() or ()
    return next((value for key, value in metadata if key == "authorization" and isinstance(value, str)), "")


async def _end_when_idle(stream: _Stream) -> None:
    while (left := stream.state.patience_seconds(time.monotonic())) > 0:
        await asyncio.sleep(left)
    stream.end(stream_idle(stream.hello))


async def _finish(task: asyncio.Task[T]) -> T | None:
    """Stop a task and wait until it has; returns what it returned, None if it did not get that far."""
    task.cancel()
    await asyncio.wait((task,))
    if task.cancelled():
        return None
    if (error := task.exception()) is not None:
        raise error
    return task.result()
