"""The sender: batches of one engine boot to one collector, over one gRPC stream, from a thread of its own.

The guarantee. Whatever `offer` accepted is either acknowledged by a collector that holds it, or still in the spool or
the buffer, or counted in `stats()` as shed or dropped. Both are bounded whatever the collector does, and `offer`
neither waits for it nor raises.

Where batches wait. With a spool, each batch is written there before it can be sent, and read back to be sent; only what
the spool does not take waits in memory, in a `SendBuffer`, which says what is given up first. Batches leave in the
order of their numbers, wherever they lie.

Why the synchronous gRPC API. Its iterator is pulled one message at a time under HTTP/2 flow control, which bounds
what gRPC itself holds; and grpc.aio's poller is shared by every event loop of a process, which makes a second loop
in a second thread (a test, a collector in the same process) log spurious errors.

Threads: `_run` owns the channel and reads replies; gRPC pulls `SendStream.messages` in a thread of its own, one per
stream; `offer`, `stats` and `close` come from the caller's. `_lock` guards everything they share and is never held
across I/O.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc

from latentwatch.errors import ConfigRefused, RefusalReason, StreamRefused
from latentwatch.log_limit import LogLimit
from latentwatch.names import Severity
from latentwatch.step.batch import StepBatch
from latentwatch.transport import codec
from latentwatch.transport.address import Address
from latentwatch.transport.channel import CHANNEL_OPTIONS, Backoff
from latentwatch.transport.credentials import Credentials
from latentwatch.transport.hello import Hello
from latentwatch.transport.intake import Intake
from latentwatch.transport.send_buffer import Drop, SendBuffer
from latentwatch.transport.send_stream import SendStream
from latentwatch.transport.shed_priority import RANKS, ShedPriority
from latentwatch.transport.spool import Spool

log = logging.getLogger(__name__)

_SUSPECT_REFUSALS: Final = 3
"""Refusals of the same batch before it is dropped so that those behind it get through."""
_LOG_AGAIN_SECONDS: Final = 600.0
_CLOSE_SECONDS: Final = 0.5
"""How long `close` lets a collector end the stream by itself, before it is cut."""
_NEEDS_A_PERSON: Final = frozenset(
    {
        grpc.StatusCode.UNIMPLEMENTED,  # another gRPC service listens there
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,  # the collector's message limit is lower than ours
    }
)
"""Ways for a stream to end that trying again at once does not mend."""
_BLAMES_A_BATCH: Final = frozenset({RefusalReason.MALFORMED_BATCH, RefusalReason.COLLECTOR_ERROR})


@dataclass(frozen=True)
class SenderStats:
    """What the sender did so far. Counts are cumulative since it was made."""

    sequence: int
    """Highest sequence given to a batch; 0 before the first."""
    acked: int
    """Highest sequence that a collector acknowledged in this boot."""
    buffered_batches: int
    buffered_bytes: int
    shed_batches: int
    """Batches whose scores were given up, all or in part; their tokens arrive as dropped{buffer_full}."""
    shed_critical_tokens: int
    """Of those tokens, the ones above the limit of a critical feature."""
    shed_warning_tokens: int
    """Of those tokens, the ones above the limit of a warning feature, and of no critical one."""
    joined_batches: int
    """Batches without scores that became part of a later one; their numbers are left out."""
    dropped_batches: int
    """Batches given up with their books: beyond the hard bound, impossible to encode, or left at close."""
    dropped_tokens: int
    """Tokens of the segments in `dropped_batches`; no collector hears of them before their request ends."""
    dropped_requests: int
    """Requests that began and ended in those, of which no collector hears; and those whose end was refused twice."""
    refused_batches: int
    """Those of `dropped_batches` that the collector refused, or that could not be encoded."""
    resent_batches: int
    reconnects: int
    """Streams that a collector welcomed, after the first."""
    connected: bool
    """A collector has welcomed the current stream."""
    last_refusal: StreamRefused | None
    """What the collector said when it last refused; None once it welcomed a stream after that."""
    last_error: str
    """One line on why the last stream ended, empty while none did."""

    @classmethod
    def of(cls, buffer: SendBuffer, **of_the_stream: Any) -> SenderStats:
        """What the buffer says, and the rest as it is given."""
        books = buffer.books
        return cls(
            acked=buffer.acked,
            buffered_batches=len(buffer),
            buffered_bytes=buffer.nbytes,
            shed_batches=books.shed_batches,
            shed_critical_tokens=int(books.shed_tokens[RANKS[Severity.CRITICAL]]),
            shed_warning_tokens=int(books.shed_tokens[RANKS[Severity.WARNING]]),
            joined_batches=books.joined_batches,
            dropped_batches=books.dropped_batches.total(),
            dropped_tokens=books.dropped_tokens.total(),
            dropped_requests=books.dropped_requests,
            refused_batches=books.dropped_batches[Drop.REFUSED],
            resent_batches=books.resent_batches,
            **of_the_stream,
        )


class _Blame:
    """Which batch keeps those behind it from getting through, by the refusals that it drew."""

    def __init__(self) -> None:
        self._sequence = self._refusals = 0

    def falls_on(self, sequence: int) -> bool:
        """A refusal fell on this batch; whether it is one too many."""
        self._refusals = self._refusals + 1 if self._sequence == sequence else 1
        self._sequence = sequence
        return self._refusals >= _SUSPECT_REFUSALS


class Sender:
    """Carries StepBatches of one engine boot to a collector. Make it, `start()` it, `offer` to it, `close()` it.

    A Sender must be started in the process that uses it: its thread does not survive a fork. Batches are offered from
    one thread.
    """

    def __init__(
        self,
        target: str,
        hello: Hello,
        *,
        credentials: Credentials | None = None,
        max_buffer_bytes: int = 64 << 20,
        spool: Spool | None = None,
        earlier: int = 0,
        encodes: bool = False,
        on_drop: Callable[[int, int], None] | None = None,
        priority: ShedPriority | None = None,
        backoff: Backoff | None = None,
        reply_timeout_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        rng: random.Random | None = None,
    ) -> None:
        """
        Args:   target: `unix:///path` or `host:port`.
                credentials: absent for a collector that asks for none; their files are read for each stream.
                max_buffer_bytes: memory for what no collector acknowledged yet, bytes; scores are shed above it,
                books above twice of it.   priority: whose scores are shed last; None makes no difference.
                spool: where batches wait until they are acknowledged; it outlives the sender and is not closed by it.
                earlier: the highest number that senders of this boot before this one gave a batch.
                encodes: each batch when it is numbered; see Intake.
                on_drop: told the numbers of each batch that is dropped, first and last, 0 for none; with the lock held.
                reply_timeout_seconds: a stream that owes us a reply for longer is ended and another one opened.
                clock: seconds, rising.   wall_clock_ns: nanoseconds since the Unix epoch.
        Raises: ConfigRefused, "target_invalid".   StreamRefused, "malformed_hello": no collector would accept it.
        """
        self._target = Address.parse(target)
        self._hello = hello
        self._credentials = credentials or Credentials()
        self._backoff = backoff or Backoff()
        self._reply_timeout_seconds = reply_timeout_seconds
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._rng = rng or random.Random()  # noqa: S311, it only spreads reconnects
        codec.encode_hello(hello, last_acked_sequence=0, time_unix_nano=0)

        self._spool = spool
        self._may_log = LogLimit(_LOG_AGAIN_SECONDS, clock)
        self._lock = threading.Condition()
        # What a sender before this one spooled, it may have sent as well.
        sent, acked = (spool.last, spool.acked) if spool is not None else (0, 0)
        self._buffer = SendBuffer(
            max_buffer_bytes, priority=priority, highest_sent=max(sent, earlier), acked=acked, on_drop=on_drop
        )
        self.intake = Intake(self._buffer, spool, self._lock, earlier=earlier, encodes=encodes, may_log=self._may_log)
        """What `offer` does, in its parts."""
        self._welcomes = 0
        self._last_refusal: StreamRefused | None = None
        self._last_error = ""
        self._blame = _Blame()
        self._stream: SendStream | None = None
        self._closing = False
        self._drain_until = -math.inf
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to connect. A second call does nothing."""
        with self._lock:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="latentwatch-sender", daemon=True)
                self._thread.start()

    def offer(self, batch: StepBatch) -> None:
        """Take one batch for delivery. Never waits for the collector, never raises; after `close` it only counts."""
        self.intake.send(self.intake.number(batch))

    def stats(self) -> SenderStats:
        """The state now; cheap enough to read for every batch."""
        with self._lock:
            return SenderStats.of(
                self._buffer,
                sequence=self.intake.sequence,
                reconnects=max(0, self._welcomes - 1),
                connected=self._stream is not None and self._stream.is_welcome,
                last_refusal=self._last_refusal,
                last_error=self._last_error,
            )

    def close(self, drain_seconds: float = 5.0) -> SenderStats:
        """Deliver what waits, for at most `drain_seconds`, then stop; what is left in memory is counted as dropped.

        Returns within `drain_seconds` and about a second, whatever the collector does.
        """
        with self._lock:
            self._closing = self.intake.closing = True
            thread = self._thread
            self._drain_until = self._clock() + drain_seconds if thread is not None else -math.inf
            self._lock.notify_all()
            while not self._done():
                self._lock.wait(max(0.0, min(self._drain_until - self._clock(), _CLOSE_SECONDS)))
            self._drain_until = -math.inf
            self._lock.notify_all()
        if thread is not None:
            thread.join(_CLOSE_SECONDS)
            with self._lock:
                call = self._stream.call if self._stream is not None else None
            if call is not None:
                call.cancel()
            thread.join(_CLOSE_SECONDS)
        with self._lock:
            self._buffer.close()
        return self.stats()

    @property
    def acked(self) -> int:
        """Highest number of which a collector said that it holds it, and everything before."""
        return self._buffer.acked

    # The stream. These run in the sender's own thread; gRPC's pulls the stream's messages.

    def _run(self) -> None:
        failures = 0
        while True:
            with self._lock:
                if self._done():
                    return
                welcomes = self._welcomes
            try:
                refused = self._one_stream()
            except Exception:
                # Without this thread nothing would ever be sent again.
                refused = False
                if self._may_log("stream"):
                    log.exception("latentwatch's sender failed; it opens a new stream")
            with self._lock:
                failures = 1 if self._welcomes > welcomes else failures + 1
                retry_at = self._clock() + self._backoff.seconds(failures, refused, self._rng)
                while not self._done() and (left := retry_at - self._clock()) > 0:
                    self._lock.wait(min(left, _CLOSE_SECONDS) if self._closing else left)

    def _done(self) -> bool:
        """Whether closing leaves nothing to do; the lock is held."""
        return self._closing and (self._clock() >= self._drain_until or not self._waits())

    def _waits(self) -> bool:
        """Whether anything is not acknowledged yet."""
        return len(self._buffer) > 0 or (self._spool is not None and not self._spool.empty)

    def _one_stream(self) -> bool:
        """Open a stream and carry batches until it ends. Returns whether it ended for a reason that will stay."""
        refusal: StreamRefused | None = None
        stays = False
        error = "the collector ended the stream"
        channel: grpc.Channel | None = None
        try:
            channel = self._credentials.channel(str(self._target), CHANNEL_OPTIONS)
            metadata = self._credentials.metadata()
            with self._lock:
                if self._done():
                    return False
                stream = self._stream = self._new_stream()
                method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(codec.METHOD)
                hello = codec.encode_hello(
                    self._hello, last_acked_sequence=stream.acked, time_unix_nano=self._wall_clock_ns()
                )
                call = stream.call = method(stream.messages(hello), metadata=metadata)
            for data in call:
                reply = codec.decode_reply(data)
                if isinstance(reply, StreamRefused):
                    refusal = reply
                    break
                self._on_reply(stream, reply)
        except grpc.RpcError as failure:
            error = f"{failure.code().name}: {failure.details()}"
            stays = failure.code() in _NEEDS_A_PERSON
        except StreamRefused as failure:
            refusal = failure
        except ConfigRefused as failure:
            error, stays = str(failure), True
        finally:
            self._on_end(refusal, error)
            if channel is not None:
                channel.close()
        return stays or refusal is not None

    def _new_stream(self) -> SendStream:
        return SendStream(
            self._lock,
            self._buffer,
            self._spool,
            is_done=self._done,
            may_log=self._may_log,
            clock=self._clock,
            reply_timeout_seconds=self._reply_timeout_seconds,
        )

    def _on_reply(self, stream: SendStream, reply: codec.Welcome | codec.Ack) -> None:
        with self._lock:
            stream.replied()
            if isinstance(reply, codec.Ack):
                self._buffer.acknowledge(reply.sequence)
            else:
                self._buffer.acknowledge(reply.resume_after_sequence)
                self._welcomes += 1
                stream.is_welcome = True
                self._last_refusal = None
                self._last_error = ""
            acked = self._buffer.acked
        if self._spool is not None:
            self._spool.release(acked)
        with self._lock:
            self._lock.notify_all()
        if isinstance(reply, codec.Welcome):
            log.info("connected to the collector at %s", self._target)

    def _on_end(self, refusal: StreamRefused | None, error: str) -> None:
        """Settle what the ended stream leaves."""
        with self._lock:
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.ended = True
            if refusal is not None:
                self._last_refusal = refusal
                error = str(refusal)
                oldest = self._buffer.oldest_in_flight
                if oldest is not None and refusal.reason in _BLAMES_A_BATCH and self._blame.falls_on(oldest):
                    self._buffer.drop_oldest_in_flight()
            elif stream is not None and stream.stalled:
                error = f"no reply for {self._reply_timeout_seconds:g} s"
            self._buffer.requeue()
            closing = self._done()
            if not closing:
                self._last_error = error
            acked = self._buffer.acked
            self._lock.notify_all()
        if self._spool is not None:
            self._spool.release(acked)  # what was dropped for the collector's sake as well
        if refusal is not None:
            if self._may_log(f"refused {refusal.reason[:64]}"):
                log.error("the collector at %s refused this engine's scores: %.1000s", self._target, refusal)
        elif not closing and self._may_log("unreachable"):
            log.warning(
                "collector %s: %s. Scores wait in a buffer of %d MiB; start the collector or correct its address.",
                self._target,
                error,
                self._buffer.max_bytes >> 20,
            )
