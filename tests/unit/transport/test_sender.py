"""The sender against real receivers that come, go, stall and refuse."""

from __future__ import annotations

import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch.errors import ConfigRefused, StreamRefused
from latentwatch.names import Phase, Reason, TokenState
from latentwatch.step.batch import (
    FIRE_DTYPE,
    SEGMENT_DTYPE,
    RequestOpened,
    StepBatch,
    owns_rows,
    tokens_by_state,
)
from latentwatch.step.checks import validate
from latentwatch.step.reshape import with_rows, without_scores
from latentwatch.transport import codec, sender
from latentwatch.transport.channel import Backoff
from latentwatch.transport.sender import Sender
from latentwatch.transport.shed_priority import ShedPriority
from latentwatch.transport.sink import ReceivedBatch

from tests.support.wire import FakeSink, ServerThread, batch, eventually, hello, same, tokens

FAST = Backoff(first_seconds=0.01, longest_seconds=0.05, refused_seconds=0.05)
KEY = ("pod-0/0", "0" * 32)


@pytest.fixture
def make() -> Iterator[Callable[..., Sender]]:
    """Senders that are closed at the end of the test."""
    made: list[Sender] = []

    def make(target: str, **options: Any) -> Sender:
        made.append(Sender(target, hello(), **({"backoff": FAST} | options)))
        return made[-1]

    yield make
    for one in made:
        one.close(0)


FIRES = np.empty(0, FIRE_DTYPE)


def tokens_of(batches: list[tuple[int, StepBatch]]) -> int:
    return sum(tokens(value) for _, value in batches)


def position_and_norm(value: StepBatch) -> list[tuple[int, float]]:
    owners = value.segments_S[owns_rows(value.segments_S)]
    positions = [start + i for _, start, count, *_ in owners.tolist() for i in range(count)]
    return list(zip(positions, value.norm_RH[:, 0].tolist(), strict=True))


async def no_ack(*_: Any) -> None:
    pass


def delivered_and_dropped(sinks: list[FakeSink], one: Sender) -> int:
    return sum(tokens(value) for sink in sinks for _, value in sink.batches) + one.stats().dropped_tokens


def test_what_is_offered_arrives_once_in_order_and_unchanged(make, address):
    sink = FakeSink()
    with ServerThread(sink, address):
        one = make(address)
        one.start()
        for step in range(1, 301):
            one.offer(batch(step))
        eventually(lambda: one.stats().acked == 300)
        assert sink.sequences == list(range(1, 301))
        assert all(same(value, batch(value.step)) for _, value in sink.batches)
        stats = one.close(1)
    assert (stats.buffered_batches, stats.buffered_bytes, stats.dropped_batches, stats.shed_batches) == (0, 0, 0, 0)
    assert sink.duplicates == 0


def test_batches_offered_before_the_collector_is_there_wait_for_it(make, address):
    one = make(address)
    one.start()
    for step in range(1, 51):
        one.offer(batch(step))
    eventually(lambda: "UNAVAILABLE" in one.stats().last_error)
    assert not one.stats().connected
    sink = FakeSink()
    with ServerThread(sink, address):
        eventually(lambda: one.stats().acked == 50)
        stats = one.stats()
        assert (stats.connected, stats.reconnects, stats.last_error) == (True, 0, "")
        assert sink.steps == list(range(1, 51))


def test_a_collector_that_returns_is_found_within_a_second(make, address):
    """With the backoff that ships, after an outage long enough for it to be at its longest."""
    one = make(address, backoff=None)
    one.start()
    one.offer(batch(1))
    time.sleep(1.0)
    with ServerThread(FakeSink(), address):
        begin = time.monotonic()
        eventually(lambda: one.stats().acked == 1)
        assert time.monotonic() - begin < 1.3, "1 s, and set-up on a busy machine"


def test_every_unacknowledged_batch_arrives_at_the_collector_that_replaces_a_killed_one(make, address):
    """Each batch is in the first collector's state or comes to the second; in order, none twice."""
    first = FakeSink()
    server = ServerThread(first, address)
    one = make(address)
    one.start()
    stop = threading.Event()

    def offer() -> None:
        step = 0
        while not stop.is_set() and step < 3000:
            step += 1
            one.offer(batch(step))
            time.sleep(0.0002)

    engine = threading.Thread(target=offer)
    engine.start()
    eventually(lambda: len(first.batches) > 100)
    server.stop()
    acked = one.stats().acked
    second = FakeSink(held=first.held)  # it restored the state of the one before
    with ServerThread(second, address):
        eventually(lambda: len(second.batches) > 100)
        stop.set()
        engine.join()
        eventually(lambda: one.stats().acked == one.stats().sequence)
    assert acked > 0
    assert first.steps + second.steps == list(range(1, one.stats().sequence + 1))
    assert second.duplicates == 0, "what the welcome named as held is not sent again"
    assert one.stats().reconnects == 1


def test_a_fresh_collector_gets_what_was_not_acknowledged_and_nothing_that_was(make, address):
    first = FakeSink()
    one = make(address)
    one.start()
    with ServerThread(first, address):
        for step in range(1, 21):
            one.offer(batch(step))
        eventually(lambda: one.stats().acked == 20)
    for step in range(21, 41):
        one.offer(batch(step))
    second = FakeSink()
    with ServerThread(second, address):
        eventually(lambda: one.stats().acked == 40)
    assert second.sequences == list(range(21, 41))


def test_batches_carried_but_not_acknowledged_are_sent_again(make, address):
    """A killed collector loses what it observed after its last ack; a fresh one gets exactly that."""
    first = FakeSink()
    server = ServerThread(first, address, ack_seconds=60.0, ack_batches=10)
    one = make(address)
    one.start()
    for step in range(1, 26):
        one.offer(batch(step))
    eventually(lambda: len(first.batches) == 25 and one.stats().acked == 20)
    server.receiver.servicer._write_ack = no_ack  # a polite stop gives a last ack, a kill does not
    server.stop()
    second = FakeSink()
    with ServerThread(second, address):
        eventually(lambda: one.stats().acked == 25)
    assert second.sequences == [21, 22, 23, 24, 25]
    assert one.stats().resent_batches == 5


def test_a_restarted_exporter_numbers_on_above_what_its_predecessor_sent(make, address):
    """Numbers count per engine boot; starting at 1 again, every batch would pass for a duplicate."""
    sink = FakeSink(held={KEY: 500})
    one = make(address, earlier=500)
    for step in range(1, 11):
        one.offer(batch(step))
    with ServerThread(sink, address):
        one.start()
        eventually(lambda: one.stats().acked == 510)
        one.offer(batch(11))
        eventually(lambda: one.stats().acked == 511)
    assert sink.sequences == list(range(501, 512))
    assert sink.duplicates == 0
    assert one.stats().sequence == 511


def test_shed_batches_are_numbered_on_as_well(make, address):
    sink = FakeSink(held={KEY: 500})
    one = make(address, max_buffer_bytes=1, earlier=500)
    one.offer(batch(1))
    with ServerThread(sink, address):
        one.start()
        eventually(lambda: one.stats().acked == 501)
    assert same(sink.batches[0][1], without_scores(batch(1), Reason.BUFFER_FULL))


class StuckSink(FakeSink):
    """Takes some batches, and no more until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def observe(self, hello, received, now):
        assert len(self.batches) < 20 or self.go_on.wait(120)
        super().observe(hello, received, now)


def test_offer_does_not_wait_and_shedding_keeps_the_books_when_the_collector_is_slow(make, address):
    sink = StuckSink()
    bound = 400_000
    one = make(address, max_buffer_bytes=bound)
    offered = 0
    with ServerThread(sink, address):
        one.start()
        for step in range(1, 501):
            value = batch(step, rows=200, fires=400)
            offered += tokens(value)
            one.offer(value)
            assert one.stats().buffered_bytes <= 2 * bound + 10_000
        assert len(sink.batches) < 500, "whoever waited for the sink would not be here"
        sink.go_on.set()
        eventually(lambda: one.stats().buffered_batches == 0)
        stats = one.stats()
    assert stats.shed_batches > 0
    assert stats.dropped_batches == 0
    assert delivered_and_dropped([sink], one) == offered
    shed = [value for _, value in sink.batches if value.rows == 0]
    assert len(shed) == stats.shed_batches
    assert (
        sum(
            count
            for value in shed
            for (_, reason, _), count in tokens_by_state(value.segments_S).items()
            if reason is Reason.BUFFER_FULL
        )
        == 200 * stats.shed_batches
    )
    assert sink.steps == list(range(1, 501))


def test_the_oldest_scores_are_shed_first(make, address):
    one = make(address, max_buffer_bytes=100_000)
    for step in range(1, 31):
        one.offer(batch(step, rows=500, fires=200))
    stats = one.stats()
    assert 0 < stats.shed_batches < 30
    assert stats.buffered_bytes <= 100_000
    sink = FakeSink()
    with ServerThread(sink, address):
        one.start()
        eventually(lambda: one.stats().acked == 30)
    assert [value.rows > 0 for _, value in sink.batches] == [False] * stats.shed_batches + [True] * (
        30 - stats.shed_batches
    )


def test_beyond_twice_the_bound_the_oldest_books_go_and_their_tokens_are_counted(make, address):
    """Each of these requests has one step and a long name: their books cannot be told any shorter."""
    one = make(address, max_buffer_bytes=20_000)
    values = [replace(batch(step), opened=(RequestOpened(step, f"cmpl-{step:0200d}", 3),)) for step in range(1, 501)]
    for value in values:
        one.offer(value)
        assert one.stats().buffered_bytes <= 40_000
    stats = one.stats()
    assert stats.dropped_batches > 0
    sink = FakeSink()
    with ServerThread(sink, address):
        one.start()
        eventually(lambda: one.stats().acked == 500)
    assert sink.steps[0] > 64 and sink.steps[-1] == 500, "the oldest went"
    assert delivered_and_dropped([sink], one) == sum(map(tokens, values))


def test_beyond_twice_the_bound_the_books_of_many_batches_become_those_of_one(make, address):
    """Eight requests decode for two thousand steps while no collector is there: no token is missing afterwards."""
    one = make(address, max_buffer_bytes=20_000)
    for step in range(2000):
        segments = [(handle, 5 + step, 1, TokenState.SCORED, Reason.NONE, Phase.OUTPUT) for handle in range(8)]
        scores = np.ones((8, 1), np.float16), np.ones((8, 1), np.float32)
        opened = tuple(RequestOpened(handle, f"cmpl-{handle}", 5) for handle in range(8)) if not step else ()
        one.offer(StepBatch(step + 1, 1, np.array(segments, SEGMENT_DTYPE), FIRES, *scores, opened))
    stats = one.stats()
    assert (stats.dropped_batches, stats.dropped_tokens) == (0, 0)
    assert stats.buffered_bytes <= 40_000
    sink = FakeSink()
    with ServerThread(sink, address):
        one.start()
        eventually(lambda: one.stats().acked == 2000)
    assert len(sink.batches) < 500
    covered = np.zeros((8, 2000), int)
    for _, value in sink.batches:
        for handle, start, count, *_ in value.segments_S.tolist():
            covered[handle, start - 5 : start - 5 + count] += 1
    assert (covered == 1).all()
    assert sum(len(value.opened) for _, value in sink.batches) == 8


def test_books_that_a_collector_may_hold_in_part_are_not_joined(make, address):
    """Batches 1 to 20 were carried once and half of them arrived; joined, they would be counted again."""
    sink = FakeSink()
    one = make(address, max_buffer_bytes=100_000)
    one.start()
    with ServerThread(sink, address, ack_seconds=60.0, ack_batches=10**6) as server:
        for step in range(1, 21):
            one.offer(batch(step))
        eventually(lambda: len(sink.batches) == 20)
        server.receiver.servicer._write_ack = no_ack
        server.stop()
    offered = 20 + 400
    one._buffer.max_bytes = 25_000
    for step in range(21, offered + 1):
        one.offer(batch(step))
    again = FakeSink(held={KEY: 10})
    with ServerThread(again, address):
        eventually(lambda: one.stats().acked == offered)
    assert again.duplicates == 0 and one.stats().joined_batches > 0
    counted = tokens_of(sink.batches[:10]) + tokens_of(again.batches) + one.stats().dropped_tokens
    assert counted == sum(tokens(batch(step)) for step in range(1, offered + 1))


STAKES = ShedPriority(
    [("none", 0.0, False), ("warning", 2.0, False), ("critical", 2.0, False), ("critical", 0.5, True)]
)


def at_stake(step: int) -> StepBatch:
    """Forty tokens of one request: 4 with a critical score, 6 with one of a warning, the others with plain ones."""
    value = np.array([(0, 0, 9.0), (1, 1, 1.0)] + [(row, 1, 3.0) for row in range(10, 18)] + [(17, 2, 5.0)], FIRE_DTYPE)
    probe = np.zeros((40, 1), np.float16)
    probe[[11, 30, 39]] = 0.75
    segment = [(step, 0, 3, TokenState.UNSEEN, Reason.PREFIX_CACHE, Phase.PROMPT)]
    segment += [(step, 3, 25, TokenState.SCORED, Reason.NONE, Phase.PROMPT)]
    segment += [(step, 28, 15, TokenState.SCORED, Reason.NONE, Phase.OUTPUT)]
    norm = np.arange(40, dtype=np.float32)[:, None]
    return StepBatch(step, 1, np.array(segment, SEGMENT_DTYPE), np.sort(value, order=["row", "feature"]), probe, norm)


@pytest.mark.parametrize(
    ("bound", "rows", "shed"),
    [(10**9, 40, (0, 0)), (1 << 16, None, (0, 0)), (52_000, None, (0, None)), (20_000, None, (None, None))],
    ids=["all fits", "plain rows go", "warnings go", "critical ones go"],
)
def test_what_matters_most_is_shed_last(make, address, bound, rows, shed):
    one = make(address, max_buffer_bytes=bound, priority=STAKES)
    for step in range(1, 101):
        one.offer(at_stake(step))
    sink = FakeSink()
    stats = one.stats()
    with ServerThread(sink, address):
        one.start()
        eventually(lambda: one.stats().acked == 100)
    kept = [value.rows for _, value in sink.batches]
    assert set(kept) <= {0, 4, 10, 40}
    if rows is not None:
        assert set(kept) == {rows}
    degrees = sorted(set(kept), reverse=True)
    assert len(degrees) <= 2 or degrees == kept[::-1], "not a warning's score goes while a plain one is left"
    ranks = [STAKES.rank_R(value) for _, value in sink.batches]
    assert stats.shed_critical_tokens == 400 - sum(int((rank == 2).sum()) for rank in ranks)
    assert stats.shed_warning_tokens == 600 - sum(int((rank == 1).sum()) for rank in ranks)
    for told, count in zip(shed, (stats.shed_critical_tokens, stats.shed_warning_tokens), strict=True):
        assert (count == 0) if told == 0 else (count > 0)
    assert tokens_of(sink.batches) == 100 * 43


def test_rows_that_stay_keep_their_scores_and_positions():
    whole = at_stake(1)
    kept = with_rows(whole, STAKES.rank_R(whole) >= 1, Reason.BUFFER_FULL)
    validate(kept, sparse_F=np.array([True, True, True, False]), hook_points=1)
    assert tokens_by_state(kept.segments_S) == {
        (TokenState.UNSEEN, Reason.PREFIX_CACHE, Phase.PROMPT): 3,
        (TokenState.SCORED, Reason.NONE, Phase.PROMPT): 8,
        (TokenState.SCORED, Reason.NONE, Phase.OUTPUT): 2,
        (TokenState.DROPPED, Reason.BUFFER_FULL, Phase.PROMPT): 17,
        (TokenState.DROPPED, Reason.BUFFER_FULL, Phase.OUTPUT): 13,
    }
    assert position_and_norm(kept) == [pair for pair in position_and_norm(whole) if pair[1] in (*range(10, 18), 30, 39)]
    assert kept.dense_RP[:, 0].tolist() == [0, 0.75, 0, 0, 0, 0, 0, 0, 0.75, 0.75]
    assert kept.fires_N.tolist() == [(row, 1, 3.0) for row in range(8)] + [(7, 2, 5.0)]
    everything = with_rows(whole, np.ones(40, bool), Reason.BUFFER_FULL)
    assert same(everything, whole)


def test_the_books_balance_over_kills_a_slow_sink_and_a_small_buffer(make, address):
    rng = random.Random(0)
    one = make(address, max_buffer_bytes=60_000)
    one.start()
    sinks, held, offered, step = [], {}, 0, 0
    for _ in range(6):
        sinks.append(FakeSink(held=held))
        sinks[-1].seconds_per_batch = rng.choice([0, 0.001])
        with ServerThread(sinks[-1], address, ack_batches=rng.choice([1, 16])) as server:
            for _ in range(rng.randint(50, 200)):
                step += 1
                value = batch(step, rows=rng.randint(0, 300))
                offered += tokens(value)
                one.offer(value)
            time.sleep(rng.random() * 0.1)
            server.stop()
        held = sinks[-1].held
    sinks.append(FakeSink(held=held))
    with ServerThread(sinks[-1], address):
        eventually(lambda: one.stats().buffered_batches == 0)
    steps = [value for sink in sinks for value in sink.steps]
    assert all(before < after for before, after in pairwise(steps)), "in order, nothing twice"
    assert delivered_and_dropped(sinks, one) == offered
    assert step - len(steps) == one.stats().dropped_batches + one.stats().joined_batches


def test_a_refusal_is_logged_once_retried_slowly_and_shown(make, address, caplog):
    sink = FakeSink()
    sink.refuse_hello = StreamRefused("w", found="f", instead="i", reason="watchlist_mismatch")
    with ServerThread(sink, address):
        one = make(address)
        one.start()
        one.offer(batch(1))
        eventually(lambda: sink.calls.count("hello") >= 4)
        refusal = one.stats().last_refusal
        assert refusal is not None
        assert vars(refusal) == vars(sink.refuse_hello)
        assert not one.stats().connected
        assert one.stats().buffered_batches == 1
        sink.refuse_hello = None
        eventually(lambda: one.stats().acked == 1)
        assert one.stats().last_refusal is None
    lines = [record for record in caplog.records if record.levelno == logging.ERROR and record.name == sender.__name__]
    assert len(lines) == 1
    assert "w: f. i" in lines[0].getMessage()


def test_a_batch_that_is_refused_again_and_again_does_not_hold_up_the_rest(make, address):
    sink = FakeSink()
    sink.refuse_sequences = {3}
    with ServerThread(sink, address):
        one = make(address)
        one.start()
        for step in range(1, 7):
            one.offer(batch(step))
        eventually(lambda: one.stats().acked == 6)
    assert sink.sequences == [1, 2, 4, 5, 6]
    stats = one.stats()
    assert (stats.refused_batches, stats.dropped_batches, stats.dropped_tokens) == (1, 1, tokens(batch(3)))


def test_a_refused_hello_never_costs_a_batch(make, address):
    """The reasons that blame a batch can also end a stream before any batch was carried."""
    sink = FakeSink()
    sink.refuse_hello = StreamRefused("w", found="f", instead="i", reason="collector_error")
    with ServerThread(sink, address):
        one = make(address)
        one.start()
        one.offer(batch(1))
        eventually(lambda: sink.calls.count("hello") >= 6)
        sink.refuse_hello = None
        eventually(lambda: one.stats().acked == 1)
    assert one.stats().dropped_batches == 0


@pytest.mark.parametrize(
    "value",
    [
        replace(batch(2), dense_RP=batch(2).dense_RP.astype(np.float64)),
        replace(batch(2), step=-1),
        replace(batch(2), opened=(RequestOpened(1, "\ud800", 1),)),
        None,
    ],
    ids=["dtype", "step", "surrogate", "none"],
)
def test_a_batch_that_cannot_be_sent_is_counted_and_those_around_it_arrive(make, address, value):
    sink = FakeSink()
    with ServerThread(sink, address):
        one = make(address)
        one.start()
        for item in (batch(1), value, batch(3)):
            one.offer(item)
        eventually(lambda: sink.steps == [1, 3])
        eventually(lambda: one.stats().buffered_batches == 0)
    assert one.stats().refused_batches == 1
    assert one.stats().dropped_batches == 1


def test_a_shed_batch_that_cannot_be_sent_is_counted_as_well(make, address):
    """Its books could not be encoded when its scores were shed; what is left of it must not pass for a batch."""
    sink = FakeSink()
    one = make(address, max_buffer_bytes=1)
    one.offer(replace(batch(1), step=-1))
    with ServerThread(sink, address):
        one.start()
        eventually(lambda: one.stats().dropped_batches == 1)
        one.offer(batch(2))
        eventually(lambda: sink.steps == [2])
    assert one.stats().dropped_tokens == tokens(batch(1))


def test_a_step_larger_than_a_message_arrives_in_pieces(make, address):
    big = batch(1, rows=100_000, fires=200_000, probes=8, hooks=2)
    sink = FakeSink()
    with ServerThread(sink, address):
        one = make(address)
        one.start()
        one.offer(big)
        eventually(lambda: one.stats().buffered_batches == 0)
    assert len(sink.batches) > 1
    assert np.concatenate([value.dense_RP for _, value in sink.batches]).tobytes() == big.dense_RP.tobytes()
    assert one.stats().shed_batches == 0


def test_a_stream_that_owes_a_reply_for_too_long_is_opened_again(make, address):
    sink = FakeSink()
    with ServerThread(sink, address, ack_seconds=60.0, ack_batches=10**6):
        one = make(address, reply_timeout_seconds=0.1)
        one.start()
        one.offer(batch(1))
        eventually(lambda: one.stats().reconnects >= 1)
        eventually(lambda: one.stats().acked == 1)  # by the welcome
    assert sink.sequences == [1]


def test_a_grpc_server_that_is_no_collector_is_tried_slowly_and_named(make, address, monkeypatch):
    monkeypatch.setattr(codec, "METHOD", "/other.Service/Stream")
    sink = FakeSink()
    with ServerThread(sink, address):
        one = make(address, backoff=replace(FAST, refused_seconds=60.0))
        begun, new_stream = [], one._new_stream
        one._new_stream = lambda: begun.append(new_stream()) or begun[-1]
        one.start()
        eventually(lambda: "UNIMPLEMENTED" in one.stats().last_error)
        time.sleep(0.2)
        assert [stream.ended for stream in begun] == [True], "one stream that began and ended"


COLLECTOR = """
import asyncio, sys
from latentwatch.transport.receiver import Receiver
from tests.support.wire import FakeSink

async def main():
    receiver = Receiver(FakeSink(), [sys.argv[1]], clock=float)
    await receiver.start()
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def collector_process(socket_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen([sys.executable, "-c", COLLECTOR, f"unix://{socket_path}"], cwd=root)
    yield process
    process.kill()
    process.wait()


def test_a_collector_killed_in_another_process_loses_nothing_that_it_did_not_acknowledge(
    make, collector_process, socket_path
):
    one = make(f"unix://{socket_path}")
    one.start()
    step = 0
    while one.stats().acked < 50:
        step += 1
        one.offer(batch(step))
        time.sleep(0.001)
    collector_process.kill()
    collector_process.wait()
    acked = one.stats().acked
    last = step + 50
    for later in range(step + 1, last + 1):
        one.offer(batch(later))
    sink = FakeSink()
    with ServerThread(sink, f"unix://{socket_path}"):
        eventually(lambda: one.stats().acked == last)
    assert sink.sequences == list(range(sink.sequences[0], last + 1))
    assert sink.sequences[0] <= acked + 33, "acks that were on their way at the kill, no more"
    assert one.stats().dropped_batches == 0


def test_a_collector_that_is_frozen_is_noticed_and_its_batches_arrive_when_it_thaws(
    make, collector_process, socket_path, monkeypatch
):
    """A frozen process keeps its connections; only unanswered pings tell. The limits are shortened for the test."""
    short = {"grpc.keepalive_time_ms": 200, "grpc.keepalive_timeout_ms": 200, "grpc.http2.ping_timeout_ms": 200}
    options = tuple((name, short.get(name, value)) for name, value in sender.CHANNEL_OPTIONS)
    monkeypatch.setattr(sender, "CHANNEL_OPTIONS", options)
    one = make(f"unix://{socket_path}")
    one.start()
    one.offer(batch(1))
    eventually(lambda: one.stats().acked == 1)
    collector_process.send_signal(signal.SIGSTOP)
    one.offer(batch(2))
    eventually(lambda: not one.stats().connected, 3)
    assert one.stats().buffered_batches == 1
    collector_process.send_signal(signal.SIGCONT)
    eventually(lambda: one.stats().acked == 2)


def test_an_idle_stream_stays_open(make, address):
    with ServerThread(FakeSink(), address, ack_batches=1):
        one = make(address, reply_timeout_seconds=0.3)
        one.start()
        eventually(lambda: one.stats().connected)
        time.sleep(0.7)
        one.offer(batch(1))
        eventually(lambda: one.stats().acked == 1)
        assert one.stats().reconnects == 0


def test_a_peer_that_is_no_collector_leaves_the_sender_waiting(make):
    """Something else listens on the port and answers nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        one = make(f"127.0.0.1:{silent.getsockname()[1]}")
        one.start()
        one.offer(batch(1))
        begin = time.monotonic()
        stats = one.close(0.2)
    assert time.monotonic() - begin < 2.5
    assert (stats.dropped_batches, stats.buffered_batches) == (1, 0)


def test_closing_delivers_what_is_buffered(make, address):
    before = set(threading.enumerate())
    sink = FakeSink()
    with ServerThread(sink, address):
        one = make(address)
        one.start()
        for step in range(1, 201):
            one.offer(batch(step))
        stats = one.close(5)
        assert stats.acked == 200
        eventually(lambda: sink.calls == ["hello", "goodbye"])
        one.offer(batch(201))
        assert one.stats().dropped_batches == 1
    # Other tests in this process may have left pools of theirs: only what this one began is counted.
    assert len(set(threading.enumerate()) - before) < 20
    assert not any(thread.name == "latentwatch-sender" for thread in threading.enumerate())


def test_closing_without_a_collector_ends_within_its_bound_and_counts_what_is_left(make, address):
    one = make(address)
    one.start()
    for step in range(1, 4):
        one.offer(batch(step))
    begin = time.monotonic()
    stats = one.close(0.3)
    assert time.monotonic() - begin < 1.5
    assert (stats.dropped_batches, stats.dropped_tokens) == (3, sum(tokens(batch(step)) for step in (1, 2, 3)))


def test_a_sender_that_was_never_started_closes_at_once(make):
    one = make("127.0.0.1:1")
    one.offer(batch(1))
    begin = time.monotonic()
    assert one.close(5).dropped_batches == 1
    assert time.monotonic() - begin < 0.5


def test_a_collector_that_is_away_is_logged_once(make, address, caplog):
    one = make(address)
    one.start()
    time.sleep(0.4)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1
    assert address in lines[0]
    assert "start the collector or correct its address" in lines[0]


def test_a_bad_target_or_hello_is_refused_where_the_sender_is_made():
    with pytest.raises(ConfigRefused) as refused:
        Sender("nonsense", hello())
    assert refused.value.reason == "target_invalid"
    with pytest.raises(StreamRefused):
        Sender("127.0.0.1:1", hello(boot_id="x"))


@pytest.mark.parametrize("refused", [False, True])
def test_waits_grow_to_their_bound_and_are_spread(refused):
    backoff, rng = Backoff(), random.Random(0)
    longest = backoff.refused_seconds if refused else backoff.longest_seconds
    waits = [[backoff.seconds(failures, refused, rng) for _ in range(200)] for failures in (1, 2, 3, 10, 10_000)]
    for drawn in waits:
        assert 0 < min(drawn) < 0.6 * max(drawn)
        assert max(drawn) <= longest
    assert max(waits[0]) <= (backoff.refused_seconds if refused else backoff.first_seconds)
    assert min(waits[-1]) >= longest / 2


def test_the_states_of_a_shed_batch_are_on_the_wire():
    value: StepBatch = without_scores(batch(1), Reason.BUFFER_FULL)
    read = codec.decode_request(codec.encode_batch(1, value))
    assert isinstance(read, ReceivedBatch)
    assert read.batch.segments_S["state"].tolist() == [TokenState.UNSEEN, TokenState.DROPPED]
    assert read.batch.dense_RP.shape == (0, 2)
