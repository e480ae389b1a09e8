"""What a sender has not delivered yet: what leaves next, and what is given up where there is no room for all.

The guarantee. Each batch that was added is acknowledged, waiting, in flight, or counted in `books`: as dropped, with
the reason, or as joined, whose tokens and requests a later batch tells. No token is in two of these.

The bound is `max_bytes`. Over it, of the batches that the current stream has not carried, always the oldest first: the
scores of all rows but those where a warning or critical feature is above its limit; then, of all batches, those of
warnings; then those of critical features. Each batch keeps its books, so that the collector still learns which tokens
it did not see and why. Over twice the bound the books of many batches become those of one, which say the same of every
token. Only when that gives no room either do the oldest books go, but for those that a collector may have: what ends in
them although it began before is told with the next batch, and what both began and ended in them is counted.

A batch of which scores were given up waits as its message, in a quarter of the memory (375 bytes against 1,390 for ten
rows of a decode step). To read and write it again where more of it has to go takes a quarter of the time that giving up
the rows takes, and memory is what there is too little of then.

Pure: no gRPC, thread, file or clock. What a spool holds is handed in when it is its turn.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from latentwatch.errors import StreamRefused
from latentwatch.names import Reason
from latentwatch.step.batch import StepBatch
from latentwatch.step.reshape import column_bytes, joined_books, with_rows
from latentwatch.transport import codec
from latentwatch.transport.request_ends import RequestEnds
from latentwatch.transport.shed_priority import RANKS, ShedPriority
from latentwatch.transport.sink import ReceivedBatch
from latentwatch.transport.spooled import Spooled

BATCH_BYTES: Final = 1536
"""Measured cost of one waiting StepBatch beside its columns: Python objects, four array headers, counters."""
MESSAGE_BYTES: Final = 224
"""The same for one that waits as its message."""
REQUEST_BYTES: Final = 240
"""Measured cost of one RequestOpened or RequestClosed beside its texts."""
BOOKS: Final = 1 + max(RANKS.values())
"""Rank of a batch without scores: above that of any score."""
_JOINED_BATCHES: Final = 64
_JOINED_BYTES: Final = codec.MAX_MESSAGE_BYTES // 4
"""Bounds of what one joined batch is made of: whoever holds the sender's lock waits meanwhile."""


class Drop(Enum):
    """Why a batch was given up with its books."""

    NO_ROOM = 1
    """It was the oldest, over twice the bound."""
    REFUSED = 2
    """The collector refused it again and again, or it cannot be encoded."""
    CLOSED = 3
    """It was left when the sender was closed."""


@dataclass
class SendBooks:
    """What became of batches that are not delivered; cumulative."""

    shed_batches: int = 0
    """Batches of which scores were given up, all or some."""
    shed_tokens: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BOOKS, np.int64))
    """By rank: the tokens whose scores those were."""
    joined_batches: int = 0
    """Batches without scores that became part of a later one; their numbers are left out."""
    resent_batches: int = 0
    dropped_batches: Counter[Drop] = field(default_factory=Counter)
    dropped_tokens: Counter[Drop] = field(default_factory=Counter)
    """Tokens of the segments of those; no collector hears of them before their request ends."""
    dropped_requests: int = 0
    """Requests that began and ended in those for which there was no room, of which no collector hears; and those whose
    end was refused twice."""

    def drop(self, tokens: int, why: Drop) -> None:
        """Count a batch of so many tokens that is given up."""
        self.dropped_batches[why] += 1
        self.dropped_tokens[why] += tokens


class Outgoing(NamedTuple):
    """A batch that went in flight."""

    sequence: int
    content: StepBatch | bytes
    spooled: bool

    def message(self) -> bytes:
        """As it goes on the wire. Raises StreamRefused where it cannot be encoded."""
        if isinstance(self.content, bytes):
            return self.content
        return codec.encode_batch(self.sequence, self.content)


@dataclass(slots=True, eq=False)
class Pending:
    """A batch that waits or is in flight."""

    sequence: int
    tokens: int
    content: StepBatch | bytes
    """Its message once scores of it were given up, or where it lies in a spool."""
    nbytes: int
    rank: int
    """The lowest rank of scores that it may still have."""
    spooled: bool = False
    shed: bool = False
    first: int = 0
    """The lowest number of what was joined to it; 0 for its own."""


class SendBuffer:
    """The batches of one boot. Added with rising numbers, they leave in the order of their numbers."""

    def __init__(
        self,
        max_bytes: int,
        *,
        priority: ShedPriority | None = None,
        highest_sent: int = 0,
        acked: int = 0,
        on_drop: Callable[[int, int], None] | None = None,
    ) -> None:
        """
        Args:   max_bytes: for scores; books may take as much again.   priority: None sheds all scores alike.
                highest_sent: what a sender before this one may have sent.   acked: what a collector is known to hold.
                on_drop: told the numbers of each batch that is dropped, first and last, once it is in the books.
        """
        self.max_bytes = max_bytes
        self._on_drop = on_drop
        self.books = SendBooks()
        self._priority = priority
        self._highest_sent = highest_sent
        self._acked = acked
        # `_queue` holds what the current stream has not carried, `_in_flight` what it has; oldest first, each older in
        # flight than in the queue. `_joined` waits as the queue does, and is older than what was not sent of it.
        # `_to_shed` are those of the queue that may still have scores, by their rank.
        self._queue: deque[Pending] = deque()
        self._joined: deque[Pending] = deque()
        self._in_flight: deque[Pending] = deque()
        self._to_shed: tuple[deque[Pending], ...] = tuple(deque() for _ in range(BOOKS))
        self._queue_bytes = 0
        self._in_flight_bytes = 0
        self._ends = RequestEnds()

    @property
    def acked(self) -> int:
        """Highest number of which a collector said that it holds it, and everything before."""
        return self._acked

    @property
    def nbytes(self) -> int:
        """Memory that is taken."""
        return self._queue_bytes + self._in_flight_bytes

    @property
    def in_flight_bytes(self) -> int:
        """The part of it that the current stream carried."""
        return self._in_flight_bytes

    @property
    def oldest_in_flight(self) -> int | None:
        """Number of the batch that a collector means when it refuses one."""
        return self._in_flight[0].sequence if self._in_flight else None

    def __len__(self) -> int:
        return len(self._in_flight) + len(self._joined) + len(self._queue)

    def __iter__(self) -> Iterator[Pending]:
        """Everything that waits or is in flight; for those in flight in the order of their numbers."""
        yield from (*self._in_flight, *self._joined, *self._queue)

    def add(self, sequence: int, batch: StepBatch, message: bytes = b"") -> None:
        """Let a batch wait, and give up what is over the bound.

        Args: sequence: above all before it.   message: the batch as it goes on the wire, where that is known.
        """
        cost = MESSAGE_BYTES + len(message) if message else _cost_bytes(batch)
        pending = Pending(sequence, tokens_of(batch), message or batch, cost, rank=0)
        self._queue.append(pending)
        self._to_shed[0].append(pending)
        self._queue_bytes += pending.nbytes
        self._keep_within_bounds()

    def with_owed(self, batch: StepBatch) -> StepBatch:
        """The batch that is numbered next, with the ends that it has to tell as well."""
        return self._ends.with_owed(batch)

    @property
    def owes_ends(self) -> bool:
        """Whether `with_owed` would add any."""
        return self._ends.owes

    def record_spooled(self, batch: StepBatch) -> None:
        """The spool has it: collectors will hear of its requests, whatever was dropped of them, or will be."""
        self._ends.told(batch, older_wait=len(self) > 0)

    def send_next(self, ahead: Spooled | None) -> Outgoing | None:
        """Move the batch of the lowest number in flight; None where none waits, or enough is in flight.

        Enough is half of the bound, so that a collector which reads but never acknowledges cannot have all of it.

        Args: ahead: the next one in the spool, above what is acknowledged.
        """
        first = self._first()
        if not (first or ahead) or self._in_flight_bytes > self.max_bytes // 2:
            return None
        if ahead is not None and not (first and first[0].sequence < ahead.sequence):
            outgoing = Outgoing(ahead.sequence, ahead.message, spooled=True)
            cost = MESSAGE_BYTES + len(ahead.message)
            pending = Pending(ahead.sequence, ahead.tokens, ahead.message, cost, BOOKS, spooled=True)
        else:
            pending = self._pop_waiting()
            outgoing = Outgoing(pending.sequence, pending.content, spooled=False)
            if self._ends.any_untold:
                # What waited before it was sent or dropped already.
                self._ends.told(_batch(pending.content), older_wait=False)
        self._in_flight.append(pending)
        self._in_flight_bytes += pending.nbytes
        self.books.resent_batches += pending.sequence <= self._highest_sent
        self._highest_sent = max(self._highest_sent, pending.sequence)
        return outgoing

    def acknowledge(self, sequence: int) -> None:
        """A collector holds everything up to and including `sequence`, of what was sent."""
        self._release(min(sequence, self._highest_sent))

    def requeue(self) -> None:
        """The stream ended: what it carried and no collector acknowledged waits again, in order, before the rest."""
        carried = [pending for pending in reversed(self._in_flight) if not pending.spooled]
        self._queue.extendleft(carried)
        for pending in carried:
            if pending.rank < BOOKS:
                self._to_shed[pending.rank].appendleft(pending)
        self._queue_bytes += sum(pending.nbytes for pending in carried)
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._keep_within_bounds()

    def drop_oldest_in_flight(self) -> None:
        """The collector will not have it. Its number counts as acknowledged from now on."""
        oldest = self._in_flight[0]
        self._release(oldest.sequence)
        self._refuse(oldest)

    def cannot_send(self, sequence: int) -> None:
        """Drop a batch in flight that cannot be encoded; one that is not in flight any more comes again."""
        for pending in self._in_flight:
            if pending.sequence == sequence:
                self._in_flight.remove(pending)
                self._in_flight_bytes -= pending.nbytes
                self._refuse(pending)
                return

    def close(self) -> None:
        """Drop everything but what a spool holds."""
        for pending in self:
            if not pending.spooled:
                self._drop(pending, Drop.CLOSED)
        for waiting in (self._in_flight, self._joined, self._queue, *self._to_shed):
            waiting.clear()
        self._queue_bytes = self._in_flight_bytes = 0

    def give_up(self, sequence: int, tokens: int, why: Drop) -> None:
        """Count a batch that never got here, of this number, 0 for none."""
        self._drop_range(sequence, sequence, tokens, why)

    def _drop(self, pending: Pending, why: Drop) -> None:
        self._drop_range(pending.first or pending.sequence, pending.sequence, pending.tokens, why)

    def _drop_range(self, first: int, last: int, tokens: int, why: Drop) -> None:
        self.books.drop(tokens, why)
        if self._on_drop is not None:
            self._on_drop(first, last)

    def _first(self) -> deque[Pending]:
        """Where the oldest batch in memory that is not in flight waits; empty where none does."""
        if self._joined and not (self._queue and self._queue[0].sequence < self._joined[0].sequence):
            return self._joined
        return self._queue

    def _pop_waiting(self) -> Pending:
        pending = self._first().popleft()
        self._queue_bytes -= pending.nbytes
        if pending.rank < BOOKS:
            self._to_shed[pending.rank].remove(pending)  # one of the first there
        return pending

    def _release(self, sequence: int) -> None:
        while self._in_flight and self._in_flight[0].sequence <= sequence:
            self._in_flight_bytes -= self._in_flight.popleft().nbytes
        while (first := self._first()) and first[0].sequence <= sequence:
            self._pop_waiting()
        self._acked = max(self._acked, sequence)

    def _keep_within_bounds(self) -> None:
        for waiting in self._to_shed:
            while waiting and self.nbytes > self.max_bytes:
                self._shed(waiting.popleft())
        while len(self._joined) + len(self._queue) > 1 and self.nbytes > 2 * self.max_bytes:
            if not self._join() and not self._drop_oldest_unsent():
                break

    def _drop_oldest_unsent(self) -> bool:
        """Drop the oldest batch that no collector can have; False where there is none but the newest."""
        place = self._first()
        if place is self._queue and self._queue[0].sequence <= self._highest_sent:
            # Those that were sent once stand before all others, and are few: what one stream had in flight.
            place = self._joined or self._queue
        oldest = next((pending for pending in place if pending.sequence > self._highest_sent), None)
        if oldest is None or (self._queue and oldest is self._queue[-1]):
            return False
        place.remove(oldest)
        self._queue_bytes -= oldest.nbytes
        if oldest.rank < BOOKS:
            self._to_shed[oldest.rank].remove(oldest)
        self.books.dropped_requests += self._ends.dropped(_batch(oldest.content))
        self._drop(oldest, Drop.NO_ROOM)
        return True

    def _refuse(self, pending: Pending) -> None:
        # Bytes that cannot be read tell of no request, and no collector could read them either.
        with contextlib.suppress(StreamRefused):
            self.books.dropped_requests += self._ends.refused(_batch(pending.content))
        self._drop(pending, Drop.REFUSED)

    def _shed(self, pending: Pending) -> None:
        """Give up the scores of the lowest rank of a batch in the queue, and keep its books."""
        self._queue_bytes -= pending.nbytes
        try:
            batch = _batch(pending.content)
            rank_R = self._priority.rank_R(batch) if self._priority else np.zeros(batch.rows, np.uint8)
            keep_R = rank_R > pending.rank
            pending.content = codec.encode_batch(pending.sequence, with_rows(batch, keep_R, Reason.BUFFER_FULL))
        except Exception:
            # Whatever is wrong with it, it cannot be sent either.
            self._queue.remove(pending)
            self._refuse(pending)
            return
        pending.nbytes = MESSAGE_BYTES + len(pending.content)
        self._queue_bytes += pending.nbytes
        self.books.shed_tokens += np.bincount(rank_R[~keep_R], minlength=BOOKS)
        self.books.shed_batches += not (pending.shed or keep_R.all())
        pending.shed |= not keep_R.all()
        pending.rank = pending.rank + 1 if keep_R.any() else BOOKS
        if pending.rank < BOOKS:
            self._to_shed[pending.rank].append(pending)

    def _join(self) -> bool:
        """Make one batch of the books of many, oldest first; False where none can be joined.

        What was sent once is left as it is: a collector may hold a part of it, and knows it by its number.
        """
        sent: list[Pending] = []
        parts: list[Pending] = []
        size = 0
        while self._queue and self._queue[0].sequence <= self._highest_sent:
            sent.append(self._queue.popleft())
        while self._queue and len(parts) < _JOINED_BATCHES and size < _JOINED_BYTES:
            part = self._queue[0]
            goes_on = not parts or parts[-1].sequence + 1 == part.sequence
            if part.rank < BOOKS or not goes_on or size + part.nbytes > codec.MAX_MESSAGE_BYTES:
                break
            parts.append(self._queue.popleft())
            size += part.nbytes
        if len(parts) > 1:
            last = parts[-1].sequence
            message = codec.encode_batch(last, joined_books([_batch(part.content) for part in parts]))
            tokens = sum(part.tokens for part in parts)
            first = parts[0].first or parts[0].sequence
            joined = Pending(last, tokens, message, MESSAGE_BYTES + len(message), BOOKS, first=first)
            self._queue_bytes += joined.nbytes - size
            self._joined.append(joined)
            self.books.joined_batches += len(parts) - 1
        else:
            self._queue.extendleft(parts)
        self._queue.extendleft(reversed(sent))
        return len(parts) > 1


def _batch(content: StepBatch | bytes) -> StepBatch:
    """Raises StreamRefused where bytes are no encoded batch."""
    if isinstance(content, StepBatch):
        return content
    received = codec.decode_request(content)
    assert isinstance(received, ReceivedBatch)
    return received.batch


def tokens_of(batch: StepBatch) -> int:
    """Tokens that its books tell of."""
    return int(batch.segments_S["count"].sum(dtype="i8"))


def _cost_bytes(batch: StepBatch) -> int:
    """Memory that a waiting batch holds, bytes; at least nine tenths of what tracemalloc sees."""
    events = (*batch.opened, *batch.closed)
    texts = sum(sys.getsizeof(value) for event in events for value in vars(event).values() if isinstance(value, str))
    return BATCH_BYTES + column_bytes(batch) + REQUEST_BYTES * len(events) + texts
