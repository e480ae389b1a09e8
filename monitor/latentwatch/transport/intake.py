"""Where batches come in: each gets its number for good, and a place to wait, in the spool or in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import NamedTuple

from latentwatch.log_limit import LogLimit
from latentwatch.step.batch import StepBatch
from latentwatch.step.reshape import pieces
from latentwatch.transport import codec
from latentwatch.transport.send_buffer import Drop, SendBuffer, tokens_of
from latentwatch.transport.sink import ReceivedBatch
from latentwatch.transport.spool import Spool

log = logging.getLogger(__name__)


class Numbered(NamedTuple):
    """A batch with the number that it has for good."""

    sequence: int
    batch: StepBatch
    message: bytes
    """As it goes on the wire; empty where it was not encoded, or cannot be."""


class Intake:
    """For one thread, but for `closing`. Nothing here raises, or waits for a collector."""

    def __init__(
        self,
        buffer: SendBuffer,
        spool: Spool | None,
        lock: threading.Condition,
        *,
        earlier: int,
        encodes: bool,
        may_log: LogLimit,
    ) -> None:
        """
        Args:   lock: guards the buffer; whoever waits for it is told of what comes in.
                earlier: the highest number that a sender of this boot before this one gave.
                encodes: each batch when it is numbered. A spool needs it in any case.
        """
        self._buffer = buffer
        self._spool = spool
        self._lock = lock
        self._encodes = encodes or spool is not None
        self._may_log = may_log
        self.sequence = earlier
        """The highest number that was given to a batch."""
        self.closing = False
        """What still comes in is only counted."""

    def number(self, batch: StepBatch) -> list[Numbered]:
        """The batch in pieces that fit a message, each with its number. They are for `send`."""
        try:
            numbered = []
            with self._lock:
                batch = self._buffer.with_owed(batch)
            for piece in pieces(batch, codec.fits_a_message):
                message = _message(self.sequence + 1, piece) if self._encodes else b""
                self.sequence += 1
                numbered.append(Numbered(self.sequence, piece, message))
            return numbered
        except Exception:
            # The caller drains the engine's ring: a batch that cannot be taken must not stop those after it.
            if self._may_log("offer"):
                log.exception("latentwatch's sender could not take a batch")
            with self._lock:
                self._buffer.give_up(0, 0, Drop.REFUSED)
            return []

    @property
    def owes_ends(self) -> bool:
        """Whether ends of requests wait for the next batch that is numbered."""
        with self._lock:
            return self._buffer.owes_ends

    def send(self, numbered: Sequence[Numbered]) -> list[int]:
        """Take batches for delivery, in the order of their numbers; those numbers that the spool took."""
        spooled = []
        for sequence, batch, message in numbered:
            if self._to_spool(sequence, batch, message):
                spooled.append(sequence)
            else:
                self._to_memory(sequence, batch, message)
        with self._lock:
            self._lock.notify_all()
        return spooled

    def resume(self, messages: Sequence[tuple[int, bytes]]) -> list[int]:
        """Take what a sender of this boot before this one had numbered, before anything new.

        Returns: the numbers of those that the spool has.
        """
        spooled = []
        for sequence, message in messages:
            if self._spool is not None and sequence in self._spool.found:
                spooled.append(sequence)  # the sender before this one ended right after it had written it
                continue
            try:
                received = codec.decode_request(message)
                assert isinstance(received, ReceivedBatch)
            except Exception:
                log.exception("latentwatch: batch %d of the exporter before this one cannot be read", sequence)
                with self._lock:
                    self._buffer.give_up(sequence, 0, Drop.REFUSED)
                continue
            if self._spool is not None and sequence < self._spool.last:
                # The spool did not take it then, and holds later ones by now: there it would stand behind them.
                self._to_memory(sequence, received.batch, message)
            else:
                spooled += self.send([Numbered(sequence, received.batch, message)])
        return spooled

    def _to_spool(self, sequence: int, batch: StepBatch, message: bytes) -> bool:
        """Whether the spool took a batch."""
        if self._spool is None or self.closing or not message:
            return False
        if not self._spool.append(sequence, tokens_of(batch), message):
            return False
        with self._lock:
            self._buffer.record_spooled(batch)
        return True

    def _to_memory(self, sequence: int, batch: StepBatch, message: bytes) -> None:
        with self._lock:
            if self.closing:
                self._buffer.give_up(sequence, tokens_of(batch), Drop.CLOSED)
            else:
                self._buffer.add(sequence, batch, message)


def _message(sequence: int, batch: StepBatch) -> bytes:
    """Empty for a batch that cannot be sent: it waits as it is until the stream meets the same failure, and counts."""
    try:
        message = codec.encode_batch(sequence, batch)
    except Exception:
        # Whatever is wrong with it, the stream says so in the log.
        return b""
    return message if len(message) <= codec.MAX_MESSAGE_BYTES else b""
