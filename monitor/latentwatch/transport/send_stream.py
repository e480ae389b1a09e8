"""One stream of a sender, as gRPC pulls it in a thread of its own: the hello, then batch by batch what waits.

It shares a buffer with the threads of the sender, and its lock, which is never held across I/O.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import grpc

from latentwatch.log_limit import LogLimit
from latentwatch.transport import codec
from latentwatch.transport.send_buffer import Outgoing, SendBuffer
from latentwatch.transport.spool import Spool
from latentwatch.transport.spooled import Spooled

log = logging.getLogger(__name__)


class SendStream:
    """What one stream carries. Its public attributes are guarded by the lock."""

    def __init__(
        self,
        lock: threading.Condition,
        buffer: SendBuffer,
        spool: Spool | None,
        *,
        is_done: Callable[[], bool],
        may_log: LogLimit,
        clock: Callable[[], float],
        reply_timeout_seconds: float,
    ) -> None:
        """With the lock held. `is_done`: closing leaves nothing to do."""
        self._lock = lock
        self._buffer = buffer
        self._is_done = is_done
        self._may_log = may_log
        self._clock = clock
        self._reply_timeout_seconds = reply_timeout_seconds
        self.acked = buffer.acked
        """Highest number that was acknowledged before this stream."""
        self._reader = spool.reader(self.acked) if spool is not None else None
        self._ahead: Spooled | None = None
        """The oldest batch in the spool that this stream has not carried."""
        self.call: grpc.RpcContext | None = None
        self.is_welcome = False
        self.stalled = False
        self.ended = False
        """The iterator of a stream that ended ends as well."""
        self._owed_since = clock()

    def replied(self) -> None:
        """The collector said something; the lock is held."""
        self._owed_since = self._clock()

    def messages(self, hello: bytes) -> Iterator[bytes]:
        """What gRPC sends: the hello, and after the welcome every batch that waits, oldest first."""
        with contextlib.ExitStack() as stack:
            if self._reader is not None:
                stack.callback(self._reader.close)
            yield hello
            while (outgoing := self._next()) is not None:
                data = self._encoded(outgoing)
                if data:
                    yield data

    @property
    def _behind(self) -> bool:
        """Whether there may be a batch to read ahead."""
        return self._ahead is None and self._reader is not None and self._reader.behind

    def _next(self) -> Outgoing | None:
        """Wait for a batch to send and move it in flight; None when the stream is over."""
        while True:
            if self._behind and self._reader is not None:
                self._ahead = self._reader.read()
            with self._lock:
                while not self._behind:
                    if self.ended or self._is_done():
                        return None
                    if self.is_welcome:
                        if self._ahead is not None and self._ahead.sequence <= self._buffer.acked:
                            self._ahead = None
                            continue
                        idle = self._buffer.oldest_in_flight is None
                        outgoing = self._buffer.send_next(self._ahead)
                        if outgoing is not None:
                            self._ahead = None if outgoing.spooled else self._ahead
                            self._owed_since = self._clock() if idle else self._owed_since
                            return outgoing
                        if idle:
                            self._lock.wait()
                            continue
                    left = self._owed_since + self._reply_timeout_seconds - self._clock()
                    if left <= 0:
                        self.stalled = True
                        if self.call is not None:
                            self.call.cancel()
                        return None
                    self._lock.wait(left)

    def _encoded(self, outgoing: Outgoing) -> bytes:
        """The message of a batch in flight; empty when it cannot be sent, and then it is dropped and counted."""
        try:
            data = outgoing.message()
            if len(data) <= codec.MAX_MESSAGE_BYTES:
                return data
            found = f"a token or request of it takes {len(data)} bytes, a message holds {codec.MAX_MESSAGE_BYTES}"
        except Exception as failure:
            # A batch that cannot be encoded now never can: it is dropped and counted below, and the next one goes.
            found = str(failure)
        with self._lock:
            self._buffer.cannot_send(outgoing.sequence)
        if self._may_log("encode"):
            log.error("batch %d cannot be sent and is dropped: %s", outgoing.sequence, found)
        return b""
