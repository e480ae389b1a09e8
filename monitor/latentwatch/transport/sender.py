"""The sender: batches of one engine boot to one collector, over one gRPC stream, from a thread of its own.

The guarantee. Whatever `offer` accepted is either acknowledged by a collector that holds it, or still in the spool or
the buffer, or counted in `stats()` as shed or dropped. Both are bounded whatever the collector does, and `offer`
neither waits for it nor raises.

Where batches wait. With a spool, each batch is written there before it can be sent, and read back to be sent; only what
the spool does not take waits in memory. Batches leave in the order of their numbers, wherever they lie.

What is given up first. Over `max_buffer_bytes`, of the batches that this stream has not carried yet, always the oldest
first: the scores of all rows but those where a warning or critical feature is above its limit (`stakes`); then, of all
batches, those of warnings; then those of critical features. Each batch keeps its books, so that the collector still
learns which tokens it did not see and why. Over twice that bound the books of many batches become those of one, which
say the same of every token. Only when that gives no room either do the oldest books go (`dropped_batches`,
`dropped_tokens`).

Why the synchronous gRPC API. Its iterator is pulled one message at a time under HTTP/2 flow control, which bounds
what gRPC itself holds; and grpc.aio's poller is shared by every event loop of a process, which makes a second loop
in a second thread (a test, a collector in the same process) log spurious errors.

Threads: `_run` owns the channel and reads replies; gRPC pulls `_requests` in a thread of its own, one per stream;
`offer`, `stats` and `close` come from the caller's. `_lock` guards everything they share and is never held across
I/O.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt

from latentwatch.errors import ConfigRefused, StreamRefused
from latentwatch.log_limit import LogLimit
from latentwatch.names import Reason, Severity
from latentwatch.step.batch import StepBatch
from latentwatch.step.reshape import column_bytes, joined_books, pieces, with_rows
from latentwatch.transport import codec
from latentwatch.transport.address import Address
from latentwatch.transport.credentials import Credentials
from latentwatch.transport.hello import Hello
from latentwatch.transport.shed_priority import RANKS, ShedPriority
from latentwatch.transport.sink import ReceivedBatch
from latentwatch.transport.spool import Spool
from latentwatch.transport.spool_segments import Spooled

log = logging.getLogger(__name__)

CHANNEL_OPTIONS: Final = (
    ("grpc.max_send_message_length", codec.MAX_MESSAGE_BYTES),
    # A frozen pod or a forgotten NAT entry closes no connection; only an unanswered ping shows it.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # After recent traffic that ping is gRPC's own, for flow control, and has this limit: 60 s by default (measured).
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # Also the time one connection attempt may take, so it has to outlast a TLS handshake across regions.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Each attempt has its own channel and must not wait for the back-off of the one before: `Backoff` decides.
    ("grpc.use_local_subchannel_pool", 1),
    # Scores go where they were told to go, not through a proxy meant for the engine's downloads.
    ("grpc.enable_http_proxy", 0),
)

_ENTRY_BYTES: Final = 1536
"""Measured cost of one waiting StepBatch beside its columns: Python objects, four array headers, counters."""
_STRIPPED_ENTRY_BYTES: Final = 224
"""The same for a batch kept as bytes."""
_REQUEST_BYTES: Final = 240
"""Measured cost of one RequestOpened or RequestClosed beside its texts."""
_BOOKS: Final = 1 + max(RANKS.values())
"""Detail of a batch without scores; a lower one is the lowest rank of the rows whose scores it still has."""
_JOINED_BATCHES: Final = 64
_JOINED_BYTES: Final = codec.MAX_MESSAGE_BYTES // 4
"""Bounds of what one joined batch is made of: the lock is held meanwhile."""
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
_BLAMES_A_BATCH: Final = frozenset({"malformed_batch", "collector_error"})


@dataclass(frozen=True)
class Backoff:
    """Waits between streams, seconds. Each is drawn from the upper half of its range, so that the engines which one
    collector lost do not come back in step."""

    first_seconds: float = 0.2
    longest_seconds: float = 1.0
    """A collector that returns is found again within this time, plus one connection set-up."""
    factor: float = 1.6
    refused_seconds: float = 5.0
    """After a Refusal: the collector is there and means it, a person has to act."""

    def seconds(self, failures: int, refused: bool, rng: random.Random) -> float:
        """The wait after the `failures`-th stream in a row (from 1) that brought no acknowledgement."""
        longest = self.refused_seconds if refused else self.longest_seconds
        first = self.refused_seconds if refused else self.first_seconds
        # The exponent is capped because a collector may be away for days, and floats overflow.
        upper = min(longest, first * self.factor ** min(failures - 1, 64))
        return upper * rng.uniform(0.5, 1.0)


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


class _Pending:
    """A batch that waits or is on its way. Once its scores are shed, `body` holds it: bytes are smaller."""

    __slots__ = ("batch", "body", "detail", "has_scores", "nbytes", "sequence", "spooled", "tokens")

    def __init__(self, sequence: int, batch: StepBatch) -> None:
        self.sequence = sequence
        self.batch: StepBatch | None = batch
        self.body = b""
        self.detail = 0
        self.has_scores = batch.rows > 0
        self.tokens = _tokens(batch)
        self.nbytes = _cost_bytes(batch)
        self.spooled = False

    @classmethod
    def from_spool(cls, spooled: Spooled) -> _Pending:
        """A batch that lies on the disk; its message is let go once it is sent."""
        pending = cls.__new__(cls)
        pending.sequence, pending.tokens, pending.body = spooled
        pending.batch, pending.has_scores, pending.spooled, pending.detail = None, False, True, 0
        pending.nbytes = _STRIPPED_ENTRY_BYTES + len(pending.body)
        return pending

    def shed(self, stakes: ShedPriority | None) -> npt.NDArray[np.int64]:
        """Give up the scores of the lowest rank, keep the books; int64 [ranks], the tokens whose scores went."""
        try:
            batch = self.batch if self.batch is not None else _decoded(self.body)
            rank_R = stakes.rank_R(batch) if stakes is not None else np.zeros(batch.rows, np.uint8)
            keep_R = rank_R > self.detail
            self.detail = self.detail + 1 if keep_R.any() else _BOOKS
            self.body = codec.encode_batch(self.sequence, with_rows(batch, keep_R, Reason.BUFFER_FULL))
            went = np.bincount(rank_R[~keep_R], minlength=_BOOKS)
        except Exception:
            # What cannot be encoded is dropped and counted when its turn comes, as any other such batch.
            self.body, self.detail, went = b"", _BOOKS, np.zeros(_BOOKS, np.int64)
        self.batch = None
        self.nbytes = _STRIPPED_ENTRY_BYTES + len(self.body)
        return went


class _ReadAhead:
    """The spool as one stream sees it: the oldest batch there that the stream has not carried."""

    def __init__(self, spool: Spool | None, after: int) -> None:
        self._reader = spool.reader(after) if spool is not None else None
        self.pending: _Pending | None = None

    @property
    def behind(self) -> bool:
        """Whether `read` may find a batch."""
        return self.pending is None and self._reader is not None and self._reader.behind

    def read(self) -> None:
        """Fill `pending` where it is empty and there is something to fill it with."""
        if self.behind and self._reader is not None and (spooled := self._reader.read()) is not None:
            self.pending = _Pending.from_spool(spooled)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


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
        next_sequence: Callable[[], int] | None = None,
        stakes: ShedPriority | None = None,
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
                books above twice of it.   stakes: whose scores are shed last; None makes no difference.
                spool: where batches wait until they are acknowledged; it outlives the sender and is not closed by it.
                next_sequence: gives numbers that rise from 1 over all senders of this boot.
                reply_timeout_seconds: a stream that owes us a reply for longer is ended and another one opened.
                clock: seconds, rising.   wall_clock_ns: nanoseconds since the Unix epoch.
        Raises: ConfigRefused, "target_invalid".   StreamRefused, "malformed_hello": no collector would accept it.
        """
        self._target = Address.parse(target)
        self._hello = hello
        self._credentials = credentials or Credentials()
        self._max_bytes = max_buffer_bytes
        self._backoff = backoff or Backoff()
        self._reply_timeout_seconds = reply_timeout_seconds
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._rng = rng or random.Random()  # noqa: S311, it only spreads reconnects
        codec.encode_hello(hello, last_acked_sequence=0, time_unix_nano=0)

        self._lock = threading.Condition()
        # `_queue` holds what the current stream has not carried, `_in_flight` what it has; oldest first, each
        # older in flight than in the queue. `_joined` waits as the queue does, and is older than what was not sent of
        # it. `_to_shed` are those of the queue that still have scores, by their detail.
        self._queue: deque[_Pending] = deque()
        self._joined: deque[_Pending] = deque()
        self._to_shed: tuple[deque[_Pending], ...] = tuple(deque() for _ in range(_BOOKS))
        self._in_flight: deque[_Pending] = deque()
        self._queue_bytes = 0
        self._in_flight_bytes = 0
        self._stakes = stakes
        self._shed_tokens = np.zeros(_BOOKS, np.int64)  # by rank
        self._spool = spool
        self._next_sequence = next_sequence or itertools.count(1).__next__
        self._sequence = 0
        # What a sender before this one spooled, it may have sent as well.
        self._highest_sent = spool.last if spool is not None else 0
        self._acked = spool.acked if spool is not None else 0
        self._shed_batches = self._dropped_batches = self._dropped_tokens = self._refused_batches = 0
        self._resent_batches = self._welcomes = self._joined_batches = 0
        self._last_refusal: StreamRefused | None = None
        self._last_error = ""
        self._suspect = 0
        self._suspect_refusals = 0
        self._may_log = LogLimit(_LOG_AGAIN_SECONDS, clock)

        self._stream = 0  # number of the current stream; the iterator of an older one ends
        self._welcomed = False
        self._owed_since = 0.0
        self._stalled = False
        self._call: Any = None
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
        try:
            for piece in pieces(batch, codec.fits_a_message):
                self._sequence = self._next_sequence()
                if self._to_spool(self._sequence, piece):
                    continue
                pending = _Pending(self._sequence, piece)
                with self._lock:
                    if self._closing:
                        self._count_dropped(pending)
                        continue
                    self._queue.append(pending)
                    self._to_shed[0].append(pending)
                    self._queue_bytes += pending.nbytes
            with self._lock:
                self._keep_within_bounds()
                self._lock.notify_all()
        except Exception:
            # The caller drains the engine's ring: a batch that cannot be taken must not stop those after it.
            if self._may_log("offer"):
                log.exception("latentwatch's sender could not take a batch")
            with self._lock:
                self._dropped_batches += 1
                self._refused_batches += 1

    def stats(self) -> SenderStats:
        """The state now; cheap enough to read for every batch."""
        with self._lock:
            return SenderStats(
                sequence=self._sequence,
                acked=self._acked,
                buffered_batches=len(self._joined) + len(self._queue) + len(self._in_flight),
                buffered_bytes=self._queue_bytes + self._in_flight_bytes,
                shed_batches=self._shed_batches,
                shed_critical_tokens=int(self._shed_tokens[RANKS[Severity.CRITICAL]]),
                shed_warning_tokens=int(self._shed_tokens[RANKS[Severity.WARNING]]),
                joined_batches=self._joined_batches,
                dropped_batches=self._dropped_batches,
                dropped_tokens=self._dropped_tokens,
                refused_batches=self._refused_batches,
                resent_batches=self._resent_batches,
                reconnects=max(0, self._welcomes - 1),
                connected=self._welcomed,
                last_refusal=self._last_refusal,
                last_error=self._last_error,
            )

    def close(self, drain_seconds: float = 5.0) -> SenderStats:
        """Deliver what waits, for at most `drain_seconds`, then stop; what is left in memory is counted as dropped.

        Returns within `drain_seconds` and about a second, whatever the collector does.
        """
        with self._lock:
            self._closing = True
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
                call = self._call
            if call is not None:
                call.cancel()
            thread.join(_CLOSE_SECONDS)
        with self._lock:
            for pending in (*self._in_flight, *self._joined, *self._queue):
                if not pending.spooled:
                    self._count_dropped(pending)
            for waiting in (self._in_flight, self._joined, self._queue, *self._to_shed):
                waiting.clear()
            self._in_flight_bytes = self._queue_bytes = 0
        return self.stats()

    def _to_spool(self, sequence: int, batch: StepBatch) -> bool:
        """Whether the spool took a batch; one that cannot be sent is left to `_encoded` to tell."""
        if self._spool is None or self._closing:
            return False
        try:
            message = codec.encode_batch(sequence, batch)
        except Exception:
            # It waits in memory, where `_encoded` meets the same failure and counts it.
            return False
        return len(message) <= codec.MAX_MESSAGE_BYTES and self._spool.append(sequence, _tokens(batch), message)

    # The buffer. Every method of this part is called with the lock held.

    def _keep_within_bounds(self) -> None:
        for detail, waiting in enumerate(self._to_shed):
            while waiting and self._queue_bytes + self._in_flight_bytes > self._max_bytes:
                pending = waiting.popleft()
                self._queue_bytes -= pending.nbytes
                self._shed_batches += pending.has_scores and detail == 0
                self._shed_tokens += pending.shed(self._stakes)
                self._queue_bytes += pending.nbytes
                if pending.detail < _BOOKS:
                    self._to_shed[pending.detail].append(pending)
        while (
            len(self._joined) + len(self._queue) > 1 and self._queue_bytes + self._in_flight_bytes > 2 * self._max_bytes
        ):
            if not self._join():
                self._count_dropped(self._pop_queue())

    def _join(self) -> bool:
        """Make one batch of the books of many, oldest first; False where none can be joined.

        What was sent once is left as it is: a collector may hold a part of it, and knows it by its number.
        """
        sent: list[_Pending] = []
        parts: list[_Pending] = []
        size = 0
        while self._queue and self._queue[0].sequence <= self._highest_sent:
            sent.append(self._queue.popleft())
        while self._queue and len(parts) < _JOINED_BATCHES and size < _JOINED_BYTES:
            part = self._queue[0]
            if part.detail < _BOOKS or not part.body or (parts and parts[-1].sequence + 1 != part.sequence):
                break
            parts.append(self._queue.popleft())
            size += part.nbytes
        if len(parts) > 1:
            joined = _Pending(parts[-1].sequence, joined_books([_decoded(part.body) for part in parts]))
            joined.shed(None)
            self._queue_bytes += joined.nbytes - size
            self._joined.append(joined)
            self._joined_batches += len(parts) - 1
        else:
            self._queue.extendleft(parts)
        self._queue.extendleft(reversed(sent))
        return len(parts) > 1

    def _first(self) -> deque[_Pending]:
        """Where the oldest batch in memory that is not in flight waits; empty where none does."""
        if self._joined and not (self._queue and self._queue[0].sequence < self._joined[0].sequence):
            return self._joined
        return self._queue

    def _pop_queue(self) -> _Pending:
        pending = self._first().popleft()
        self._queue_bytes -= pending.nbytes
        if pending.detail < _BOOKS:
            self._to_shed[pending.detail].remove(pending)  # one of the first there
        return pending

    def _pop_in_flight(self) -> _Pending:
        pending = self._in_flight.popleft()
        self._in_flight_bytes -= pending.nbytes
        return pending

    def _move_in_flight(self, spooled: _ReadAhead) -> _Pending:
        """The batch of the lowest number, in memory or read from the spool."""
        if not self._in_flight:
            self._owed_since = self._clock()
        ahead, first = spooled.pending, self._first()
        if ahead is not None and not (first and first[0].sequence < ahead.sequence):
            pending, spooled.pending = ahead, None
        else:
            pending = self._pop_queue()
        self._in_flight.append(pending)
        self._in_flight_bytes += pending.nbytes
        self._resent_batches += pending.sequence <= self._highest_sent
        self._highest_sent = max(self._highest_sent, pending.sequence)
        return pending

    def _take_back(self) -> None:
        """What the ended stream carried and no collector acknowledged waits again, in order, before the rest."""
        carried = [pending for pending in reversed(self._in_flight) if not pending.spooled]
        self._queue.extendleft(carried)
        for pending in carried:
            if pending.detail < _BOOKS:
                self._to_shed[pending.detail].appendleft(pending)
        self._queue_bytes += sum(pending.nbytes for pending in carried)
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._keep_within_bounds()

    def _release(self, sequence: int) -> None:
        """Forget what a collector holds: all that was sent, up to and including `sequence`."""
        sequence = min(sequence, self._highest_sent)
        while self._in_flight and self._in_flight[0].sequence <= sequence:
            self._pop_in_flight()
        while (first := self._first()) and first[0].sequence <= sequence:
            self._pop_queue()
        self._acked = max(self._acked, sequence)

    def _count_dropped(self, pending: _Pending, *, refused: bool = False) -> None:
        self._dropped_batches += 1
        self._dropped_tokens += pending.tokens
        self._refused_batches += refused

    # The stream. These run in the sender's own thread, `_requests` and what it calls in gRPC's.

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
        return bool(self._first() or self._in_flight) or (self._spool is not None and not self._spool.empty)

    def _one_stream(self) -> bool:
        """Open a stream and carry batches until it ends. Returns whether it ended for a reason that will stay."""
        refusal: StreamRefused | None = None
        stays = False
        error = "the collector ended the stream"
        channel: Any = None
        try:
            channel = self._credentials.channel(str(self._target), CHANNEL_OPTIONS)
            metadata = self._credentials.metadata()
            with self._lock:
                if self._done():
                    return False
                self._stream += 1
                self._stalled = False
                self._owed_since = self._clock()
                call = self._call = channel.stream_stream(codec.METHOD)(self._requests(self._stream), metadata=metadata)
            for data in call:
                reply = codec.decode_reply(data)
                if isinstance(reply, StreamRefused):
                    refusal = reply
                    break
                self._on_reply(reply)
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

    def _on_reply(self, reply: codec.Welcome | codec.Ack) -> None:
        with self._lock:
            self._owed_since = self._clock()
            if isinstance(reply, codec.Ack):
                self._release(reply.sequence)
            else:
                self._release(reply.resume_after_sequence)
                self._welcomes += 1
                self._welcomed = True
                self._last_refusal = None
                self._last_error = ""
            acked = self._acked
        if self._spool is not None:
            self._spool.release(acked)
        with self._lock:
            self._lock.notify_all()
        if isinstance(reply, codec.Welcome):
            log.info("connected to the collector at %s", self._target)

    def _on_end(self, refusal: StreamRefused | None, error: str) -> None:
        """Settle what the ended stream leaves."""
        with self._lock:
            carried = self._in_flight[0] if self._in_flight else None
            self._stream += 1
            self._welcomed = False
            self._call = None
            self._take_back()
            if refusal is not None:
                self._last_refusal = refusal
                error = str(refusal)
                if carried is not None and refusal.reason in _BLAMES_A_BATCH:
                    self._blame(carried)
            elif self._stalled:
                error = f"no reply for {self._reply_timeout_seconds:g} s"
            closing = self._done()
            if not closing:
                self._last_error = error
            acked = self._acked
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
                self._max_bytes >> 20,
            )

    def _blame(self, oldest: _Pending) -> None:
        """Count a refusal against the oldest batch, and drop it when it keeps the others from getting through.

        The lock is held.
        """
        self._suspect_refusals = self._suspect_refusals + 1 if self._suspect == oldest.sequence else 1
        self._suspect = oldest.sequence
        if self._suspect_refusals >= _SUSPECT_REFUSALS:
            self._release(oldest.sequence)
            self._count_dropped(oldest, refused=True)

    def _requests(self, stream: int) -> Iterator[bytes]:
        """What gRPC sends on one stream: the hello, and after the welcome every batch that waits, oldest first."""
        with self._lock:
            last_acked = self._acked
        yield codec.encode_hello(self._hello, last_acked_sequence=last_acked, time_unix_nano=self._wall_clock_ns())
        with contextlib.closing(_ReadAhead(self._spool, last_acked)) as spooled:
            while (pending := self._next(stream, spooled)) is not None:
                data = self._encoded(pending)
                if data:
                    yield data

    def _next(self, stream: int, spooled: _ReadAhead) -> _Pending | None:
        """Wait for a batch to send on `stream` and move it in flight; None when the stream is over."""
        while True:
            spooled.read()
            with self._lock:
                while not spooled.behind:
                    if self._stream != stream or self._done():
                        return None
                    if self._welcomed:
                        if spooled.pending is not None and spooled.pending.sequence <= self._acked:
                            spooled.pending = None
                            continue
                        # Half the buffer, so that a collector which reads but never acknowledges cannot hold all of it.
                        waits = self._first() or spooled.pending is not None
                        if waits and self._in_flight_bytes <= self._max_bytes // 2:
                            return self._move_in_flight(spooled)
                        if not self._in_flight:
                            self._lock.wait()
                            continue
                    left = self._owed_since + self._reply_timeout_seconds - self._clock()
                    if left <= 0:
                        self._stalled = True
                        self._call.cancel()
                        return None
                    self._lock.wait(left)

    def _encoded(self, pending: _Pending) -> bytes:
        """The message of a batch in flight; empty when it cannot be sent, and then it is dropped and counted."""
        with self._lock:
            sequence, batch, data = pending.sequence, pending.batch, pending.body
            if pending.spooled:
                pending.body = b""
        try:
            if batch is not None:
                data = codec.encode_batch(sequence, batch)
            if not data:
                found = "its books could not be encoded when its scores were shed"
            elif len(data) <= codec.MAX_MESSAGE_BYTES:
                return data
            else:
                found = f"a token or request of it takes {len(data)} bytes, a message holds {codec.MAX_MESSAGE_BYTES}"
        except Exception as failure:
            # A batch that cannot be encoded now never can: it is dropped and counted below, and the next one goes.
            found = str(failure)
        with self._lock:
            if pending in self._in_flight:
                self._in_flight.remove(pending)
                self._in_flight_bytes -= pending.nbytes
                self._count_dropped(pending, refused=True)
        if self._may_log("encode"):
            log.error("batch %d cannot be sent and is dropped: %s", sequence, found)
        return b""


def _decoded(body: bytes) -> StepBatch:
    """Raises StreamRefused where `body` is no encoded batch."""
    received = codec.decode_request(body)
    assert isinstance(received, ReceivedBatch)
    return received.batch


def _tokens(batch: StepBatch) -> int:
    return int(batch.segments_S["count"].sum(dtype="i8"))


def _cost_bytes(batch: StepBatch) -> int:
    """Memory that a waiting batch holds, bytes; at least nine tenths of what tracemalloc sees."""
    events = (*batch.opened, *batch.closed)
    texts = sum(sys.getsizeof(value) for event in events for value in vars(event).values() if isinstance(value, str))
    return _ENTRY_BYTES + column_bytes(batch) + _REQUEST_BYTES * len(events) + texts
