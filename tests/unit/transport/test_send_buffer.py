"""Whatever happens between a sender and its collectors: no token is lost or told twice without being counted."""

from __future__ import annotations

import functools
import gc
import itertools
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from latentwatch.errors import StreamRefused
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.step.batch import FIRE_DTYPE, SEGMENT_DTYPE, RequestClosed, RequestOpened, StepBatch
from latentwatch.transport import codec
from latentwatch.transport.send_buffer import BOOKS, Drop, SendBuffer, tokens_of
from latentwatch.transport.shed_priority import ShedPriority
from latentwatch.transport.sink import ReceivedBatch
from latentwatch.transport.spooled import Spooled

from tests.support.wire import batch

PRIORITY = ShedPriority([("none", 0.0, False), ("warning", 2.0, False), ("critical", 2.0, False)])
MAX_BYTES = 4_000


def one_step(sequence: int, plain: int, warning: int, critical: int, sendable: bool) -> StepBatch:
    """One request's tokens, of which some matter; request and positions tell what each token is."""
    rows, marked = plain + warning + critical, warning + critical
    fires = [(row, 1 if row < plain + warning else 2, 3.0) for row in range(plain, plain + marked)]
    unseen = [(sequence, 0, 2, TokenState.UNSEEN, Reason.PREFIX_CACHE, Phase.PROMPT)]
    scored = [(sequence, 2, rows, TokenState.SCORED, Reason.NONE, Phase.OUTPUT)] if rows else []
    return StepBatch(
        step=sequence if sendable else -1,
        time_unix_nano=1,
        segments_S=np.array(unseen + scored, SEGMENT_DTYPE),
        fires_N=np.array(fires, FIRE_DTYPE),
        dense_RP=np.empty((rows, 0), np.float16),
        norm_RH=np.ones((rows, 1), np.float32),
    )


class Collector:
    """Counts each token of what is above the highest number that it has, and may forget what it did not acknowledge."""

    def __init__(self) -> None:
        self.high = 0
        self.tokens: Counter[tuple[int, int]] = Counter()
        self.shed = 0
        self._safe = (0, Counter[tuple[int, int]](), 0)

    def receive(self, message: bytes) -> None:
        received = codec.decode_request(message)
        assert isinstance(received, ReceivedBatch)
        if received.sequence <= self.high:
            return
        self.high = received.sequence
        for handle, start, count, _, reason, _ in received.batch.segments_S.tolist():
            self.tokens.update((handle, start + i) for i in range(count))
            self.shed += count if reason == Reason.BUFFER_FULL else 0

    def commit(self) -> int:
        self._safe = (self.high, self.tokens.copy(), self.shed)
        return self.high

    def crash(self) -> None:
        self.high, tokens, self.shed = self._safe
        self.tokens = tokens.copy()


@functools.cache
def handles_of(message: bytes) -> set[int]:
    """The batches of which one tells: itself, and those that were joined into it."""
    received = codec.decode_request(message)
    assert isinstance(received, ReceivedBatch)
    return set(received.batch.segments_S["handle"].tolist())


class Deliveries(RuleBasedStateMachine):
    """A sender's moves in any order, against a collector that reads, acknowledges, refuses, crashes and comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = SendBuffer(MAX_BYTES, priority=PRIORITY)
        self.collector = Collector()
        self.numbers = itertools.count(1)
        self.offered = 0
        self.spool: list[Spooled] = []
        self.read = 0
        self.wire: list[tuple[int, bytes]] = []
        self.last_sent = 0
        self.highest_sent = 0
        self.connected = True

    @rule(
        rows=st.tuples(st.integers(0, 60), st.integers(0, 8), st.integers(0, 8)),
        times=st.sampled_from([1, 5, 30]),
        spools=st.booleans(),
        sendable=st.sampled_from([True] * 9 + [False]),
    )
    def offer(self, rows: tuple[int, int, int], times: int, spools: bool, sendable: bool) -> None:
        for _ in range(times):
            number = next(self.numbers)
            value = one_step(number, *rows, sendable)
            self.offered += tokens_of(value)
            if spools and sendable:
                self.spool.append(Spooled(number, tokens_of(value), codec.encode_batch(number, value)))
                continue
            self.buffer.add(number, value)
            self.within_bounds()

    @precondition(lambda self: self.connected)
    @rule(times=st.sampled_from([1, 2, 30]))
    def send(self, times: int) -> None:
        for _ in range(times):
            while self.read < len(self.spool) and self.spool[self.read].sequence <= self.buffer.acked:
                self.read += 1
            ahead = self.spool[self.read] if self.read < len(self.spool) else None
            outgoing = self.buffer.send_next(ahead)
            if outgoing is None:
                return
            self.read += outgoing.spooled
            assert outgoing.sequence > self.last_sent, "numbers rise within a stream"
            self.last_sent = outgoing.sequence
            self.highest_sent = max(self.highest_sent, outgoing.sequence)
            try:
                self.wire.append((outgoing.sequence, outgoing.message()))
            except StreamRefused:
                self.buffer.cannot_send(outgoing.sequence)

    @precondition(lambda self: self.wire)
    @rule(count=st.integers(1, 40))
    def arrive(self, count: int) -> None:
        for _, message in self.wire[:count]:
            self.collector.receive(message)
        del self.wire[:count]

    @precondition(lambda self: self.connected)
    @rule(again=st.integers(0, 3))
    def acknowledge(self, again: int) -> None:
        """Now, and old acks once more."""
        high = self.collector.commit()
        self.buffer.acknowledge(high)
        self.buffer.acknowledge(max(0, high - again))

    @precondition(lambda self: self.connected and not self.wire)
    @rule(beyond=st.integers(1, 10**9))
    def acknowledge_beyond_what_was_sent(self, beyond: int) -> None:
        """It has all that was sent; that it claims more must not cost what is sent later."""
        if self.collector.high >= max((pending.sequence for pending in self.in_flight()), default=0):
            self.collector.commit()
            if self.collector.high == self.highest_sent:
                self.buffer.acknowledge(self.collector.high + beyond)

    @precondition(lambda self: self.connected)
    @rule(crashes=st.booleans())
    def end_the_stream(self, crashes: bool) -> None:
        if crashes:
            self.collector.crash()
        carried = [pending.sequence for pending in self.in_flight() if not pending.spooled]
        self.wire.clear()
        self.buffer.requeue()
        kept = {pending.sequence for pending in self.buffer}
        assert [pending.sequence for pending in self.buffer if pending.sequence in carried] == [
            number for number in carried if number in kept
        ], "they wait again in their order"
        assert self.buffer.oldest_in_flight is None
        self.within_bounds()
        self.last_sent = self.read = 0
        self.connected = False

    @precondition(lambda self: not self.connected)
    @rule()
    def begin_a_stream(self) -> None:
        """The collector's welcome tells what it has."""
        self.connected = True
        self.buffer.acknowledge(self.collector.commit())

    @precondition(lambda self: self.buffer.oldest_in_flight is not None)
    @rule()
    def the_collector_refuses_the_first_that_it_did_not_acknowledge(self) -> None:
        self.buffer.acknowledge(self.collector.commit())
        if self.buffer.oldest_in_flight is not None:
            self.buffer.drop_oldest_in_flight()
        self.end_the_stream(False)

    @invariant()
    def nothing_is_lost_or_told_twice(self) -> None:
        assert max(self.collector.tokens.values(), default=0) <= 1
        told_again = {pending.sequence for pending in self.buffer}
        for pending in self.buffer:
            if isinstance(pending.content, bytes) and pending.content:
                told_again |= handles_of(pending.content)
        acked = sum(
            count
            for (handle, _), count in self.collector.tokens.items()
            if handle <= self.buffer.acked and handle not in told_again
        )
        waiting = sum(pending.tokens for pending in self.buffer if not pending.spooled)
        on_disk = sum(spooled.tokens for spooled in self.spool if spooled.sequence > self.buffer.acked)
        assert self.offered == acked + waiting + on_disk + self.buffer.books.dropped_tokens.total()

    @invariant()
    def the_bytes_are_those_of_the_entries(self) -> None:
        assert self.buffer.nbytes == sum(pending.nbytes for pending in self.buffer)
        assert self.buffer.in_flight_bytes == sum(pending.nbytes for pending in self.in_flight())
        assert len(self.buffer) == len(list(self.buffer))

    def teardown(self) -> None:
        """A collector that works gets the rest, and then every token has been told of or counted."""
        if self.connected:
            self.end_the_stream(False)
        self.begin_a_stream()
        while len(self.buffer) or self.collector.high < max((s.sequence for s in self.spool), default=0):
            before = self.buffer.acked, self.buffer.books.dropped_batches.total()
            self.send(30)
            self.arrive(30)
            self.acknowledge(0)
            if before == (self.buffer.acked, self.buffer.books.dropped_batches.total()):
                break
        books = self.buffer.books
        assert len(self.buffer) == 0
        assert self.offered == self.collector.tokens.total() + books.dropped_tokens.total()
        shed = int(books.shed_tokens.sum())
        assert self.collector.shed <= shed
        if not books.dropped_batches.total():
            assert self.collector.shed == shed, "what is shed is counted once"

    def in_flight(self) -> list:
        return list(itertools.islice(self.buffer, len(self.buffer._in_flight)))

    def within_bounds(self) -> None:
        waiting = [pending for pending in self.buffer if pending not in self.in_flight()]
        assert self.buffer.nbytes <= 2 * MAX_BYTES or len(waiting) <= 1
        assert self.buffer.nbytes <= MAX_BYTES or all(pending.rank == BOOKS for pending in waiting)


TestDeliveries = Deliveries.TestCase
TestDeliveries.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class Ends(RuleBasedStateMachine):
    """Requests begin, compute and end while batches are spooled, sent, joined, dropped, requeued and forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = SendBuffer(200)
        self.sequence = self.handles = 0
        self.running: dict[int, int] = {}
        self.ended: set[int] = set()
        self.spool: list[Spooled] = []
        self.read = 0
        self.heard: set[int] = set()
        self.told: Counter[int] = Counter()
        self.high = 0
        self.safe: tuple[int, set[int], Counter[int]] = (0, set(), Counter())

    def offered(self, batch: StepBatch, spools: bool) -> None:
        batch = self.buffer.with_owed(batch)
        # A gap between two numbers keeps some batches from being joined, so that others are dropped.
        self.sequence += 1 + (self.sequence % 4 > 0)
        if spools:
            message = codec.encode_batch(self.sequence, batch)
            self.spool.append(Spooled(self.sequence, tokens_of(batch), message))
            getattr(self.buffer, "record_spooled", getattr(self.buffer, "record_sent", None))(batch)
        else:
            self.buffer.add(self.sequence, batch)

    @rule(
        begins=st.integers(0, 2),
        computes=st.booleans(),
        ends=st.integers(0, 2),
        spools=st.sampled_from([False] * 4 + [True]),
        times=st.sampled_from([1, 1, 4, 12]),
    )
    def step(self, begins: int, computes: bool, ends: int, spools: bool, times: int) -> None:
        for _ in range(times):
            opened = [RequestOpened(self.handles + i + 1, "r" * 30, 4) for i in range(begins)]
            self.handles += begins
            self.running |= {event.handle: 0 for event in opened}
            segments = []
            for handle, at in self.running.items() if computes else ():
                segments.append((handle, at, 1, TokenState.UNSEEN, Reason.PREFIX_CACHE, Phase.PROMPT))
                self.running[handle] += 1
            over = sorted(self.running)[:ends]
            closed = tuple(RequestClosed(n, "r" * 30, 4, 1, self.running.pop(n), Outcome.FINISHED) for n in over)
            self.ended |= set(over)
            books = replace(one_step(1, 0, 0, 0, True), segments_S=np.array(segments, SEGMENT_DTYPE))
            self.offered(replace(books, opened=tuple(opened), closed=closed), spools)

    @rule(times=st.sampled_from([1, 1, 2, 30]), arrives=st.booleans(), acknowledges=st.booleans())
    def send(self, times: int, arrives: bool, acknowledges: bool) -> None:
        """What does not arrive is lost with its stream."""
        for _ in range(times):
            while self.read < len(self.spool) and self.spool[self.read].sequence <= self.buffer.acked:
                self.read += 1
            outgoing = self.buffer.send_next(self.spool[self.read] if self.read < len(self.spool) else None)
            if outgoing is None:
                break
            self.read += outgoing.spooled
            if arrives:
                self.receive(outgoing.message())
        if not arrives:
            self.end_the_stream(False)
        elif acknowledges:
            self.acknowledge()

    def receive(self, message: bytes) -> None:
        received = codec.decode_request(message)
        assert isinstance(received, ReceivedBatch)
        if received.sequence > self.high:
            self.high = received.sequence
            self.heard |= {event.handle for event in received.batch.opened}
            self.heard |= set(received.batch.segments_S["handle"].tolist())
            self.told.update(event.handle for event in received.batch.closed)

    @rule()
    def acknowledge(self) -> None:
        self.safe = self.high, self.heard.copy(), self.told.copy()
        self.buffer.acknowledge(self.high)

    @rule(crashes=st.booleans())
    def end_the_stream(self, crashes: bool) -> None:
        if crashes:
            self.high, heard, told = self.safe
            self.heard, self.told = heard.copy(), told.copy()
        self.buffer.requeue()
        self.read = 0
        self.acknowledge()

    def teardown(self) -> None:
        """A collector that works gets the rest."""
        self.end_the_stream(False)
        for _ in range(3):
            self.offered(StepBatch(step=1, time_unix_nano=1), False)
            for _ in range(1000):
                self.send(30, True, True)
                if not len(self.buffer) and self.read >= len(self.spool):
                    break
        assert max(self.told.values(), default=0) <= 1, "told once"
        assert not (self.heard & self.ended) - self.told.keys(), "no request that a collector heard of stays open"
        assert self.buffer.books.dropped_requests == len(self.ended - self.told.keys()), "the others are counted"


TestEnds = Ends.TestCase
TestEnds.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def end_of(handle: int) -> StepBatch:
    return replace(one_step(handle, 1, 0, 0, True), closed=(RequestClosed(handle, "r", 4, 1, 4, Outcome.FINISHED),))


@pytest.mark.parametrize("spooled", [False, True])
def test_an_end_in_a_batch_that_is_refused_is_told_once_more_and_then_counted(spooled):
    buffer = SendBuffer(1 << 20)
    if spooled:
        ahead = Spooled(1, 3, codec.encode_batch(1, end_of(7)))
    else:
        ahead = None
        buffer.add(1, end_of(7))
    assert buffer.send_next(ahead) is not None
    buffer.drop_oldest_in_flight()
    again = buffer.with_owed(StepBatch(step=2, time_unix_nano=1))
    assert [event.handle for event in again.closed] == [7] and buffer.books.dropped_requests == 0
    buffer.add(2, again)
    assert buffer.send_next(None) is not None
    buffer.drop_oldest_in_flight()
    assert not buffer.with_owed(StepBatch(step=3, time_unix_nano=1)).closed
    assert buffer.books.dropped_requests == 1


def test_a_request_that_is_heard_of_when_nothing_else_waits_has_its_end_told():
    """Its beginning was given up; what is sent of it later leaves a buffer that is empty."""
    buffer = SendBuffer(1)
    buffer.add(1, replace(one_step(1, 0, 0, 0, True), opened=(RequestOpened(9, "r", 4),)))
    buffer.add(3, one_step(3, 0, 0, 0, True))
    assert buffer.books.dropped_batches == {Drop.NO_ROOM: 1}
    assert buffer.send_next(None) is not None
    buffer.acknowledge(3)
    buffer.add(5, one_step(9, 0, 0, 0, True))
    assert buffer.send_next(None) is not None
    buffer.acknowledge(5)
    buffer.add(7, end_of(9))
    buffer.add(9, one_step(8, 0, 0, 0, True))
    assert [event.handle for event in buffer.with_owed(StepBatch(step=1, time_unix_nano=1)).closed] == [9]
    assert buffer.books.dropped_requests == 0


def test_a_refusal_that_comes_when_there_is_no_room_is_counted_once():
    """The refused batch is the oldest, and so the first to go when the ended stream's batches wait again."""
    buffer = SendBuffer(1)
    buffer.add(1, one_step(1, 5, 0, 0, True))
    assert buffer.send_next(None) is not None
    buffer.add(2, one_step(2, 5, 0, 0, True))
    buffer.drop_oldest_in_flight()
    buffer.requeue()
    assert buffer.books.dropped_batches == {Drop.REFUSED: 1}
    assert [pending.sequence for pending in buffer] == [2] and buffer.acked == 1


def test_a_batch_without_scores_of_the_lowest_rank_is_not_counted_as_shed():
    buffer = SendBuffer(2_000, priority=PRIORITY)
    buffer.add(1, one_step(1, 0, 0, 8, True))
    buffer.add(2, one_step(2, 60, 0, 0, True))
    (first, second) = buffer
    assert (first.shed, second.shed, buffer.books.shed_batches) == (False, True, 1)
    assert buffer.books.shed_tokens.tolist() == [60, 0, 0]


def test_what_was_sent_once_is_not_joined():
    """A collector may have a part of it; joined, that part would come again under a number that it does not know."""
    buffer, collector = SendBuffer(MAX_BYTES), Collector()
    for number in range(1, 11):
        buffer.add(number, one_step(number, 2, 0, 0, True))
    for _ in range(5):
        outgoing = buffer.send_next(None)
        assert outgoing is not None
        collector.receive(outgoing.message())
    buffer.requeue()
    for number in range(11, 101):
        buffer.add(number, one_step(number, 2, 0, 0, True))
    assert buffer.books.joined_batches and not buffer.books.dropped_batches
    buffer.acknowledge(3)
    while (outgoing := buffer.send_next(None)) is not None:
        collector.receive(outgoing.message())
        buffer.acknowledge(collector.high)
    assert set(collector.tokens.values()) == {1} and collector.tokens.total() == 400 and not len(buffer)


def test_a_batch_that_cannot_be_shed_cannot_be_sent_and_is_dropped_at_once():
    buffer = SendBuffer(1)
    buffer.add(1, replace(batch(1), step=-1))
    assert len(buffer) == buffer.nbytes == 0
    assert buffer.books.dropped_tokens == {Drop.REFUSED: tokens_of(batch(1))}


def test_no_more_than_half_of_the_bound_goes_to_a_collector_that_never_acknowledges():
    buffer = SendBuffer(100_000)
    for number in range(1, 101):
        buffer.add(number, batch(number, rows=200))
    largest = max(pending.nbytes for pending in buffer)
    while buffer.send_next(None) is not None:
        pass
    assert 50_000 < buffer.in_flight_bytes <= 50_000 + largest
    assert len(buffer) == 100


def test_the_claimed_memory_is_that_of_the_waiting_batches():
    """The bound is on these claims; a claim too low is a bound that does not hold."""
    buffer = SendBuffer(1 << 30)

    def add(number: int) -> None:
        opened = tuple(RequestOpened(10**9 + i, f"cmpl-{number:020d}-{i}", 5000) for i in range(number % 3))
        buffer.add(number, replace(batch(number, rows=number % 50, fires=number % 7), opened=opened))

    add(1)
    tracemalloc.start()
    try:
        gc.collect()
        begin = tracemalloc.get_traced_memory()[0]
        for number in range(2, 1002):
            add(number)
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - begin
        assert 0.9 * used < buffer.nbytes < 1.5 * used
        begin = tracemalloc.get_traced_memory()[0] - used
        buffer.max_bytes = 250_000
        buffer.requeue()
        assert all(pending.rank == BOOKS for pending in buffer) and not buffer.books.joined_batches
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - begin
        assert 0.9 * used < buffer.nbytes < 1.5 * used
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("spooled", [4, 6])
def test_the_lower_number_leaves_first_wherever_it_lies(spooled):
    buffer = SendBuffer(1 << 20)
    buffer.add(5, batch(5))
    outgoing = buffer.send_next(Spooled(spooled, 3, b"message"))
    assert outgoing is not None and outgoing.spooled == (spooled == 4)


def test_of_books_for_which_there_is_no_room_the_ends_are_told_and_requests_that_nobody_saw_are_counted():
    """Request 1 began before, and ends in what is dropped; each other one begins and ends there."""
    buffer, collector = SendBuffer(3_000), Collector()
    opened = [RequestOpened(n, f"r{n}", 4) for n in range(1, 400)]
    buffer.add(1, replace(one_step(1, 0, 0, 0, True), opened=(opened[0],)))
    outgoing = buffer.send_next(None)
    assert outgoing is not None
    collector.receive(outgoing.message())
    buffer.acknowledge(1)
    told: list[RequestClosed] = []
    for n in range(2, 300):
        ends = [RequestClosed(n, f"r{n}", 4, 1, 4, Outcome.FINISHED)]
        ends += [RequestClosed(1, "r1", 4, 9, 12, Outcome.FINISHED)] if n == 5 else []
        # A gap between two numbers: books that do not follow on each other are not joined.
        batch_n = replace(one_step(n, 0, 0, 0, True), opened=(opened[n - 1],), closed=tuple(ends))
        buffer.add(2 * n, buffer.with_owed(batch_n))
    for heartbeat in (700, 701):
        buffer.add(heartbeat, buffer.with_owed(StepBatch(step=1, time_unix_nano=1)))
        while (outgoing := buffer.send_next(None)) is not None:
            received = codec.decode_request(outgoing.message())
            assert isinstance(received, ReceivedBatch)
            told += received.batch.closed
            buffer.acknowledge(outgoing.sequence)
    assert [closed.handle for closed in told].count(1) == 1
    dropped = buffer.books.dropped_requests
    assert dropped > 100 and len(told) == 299 - dropped
