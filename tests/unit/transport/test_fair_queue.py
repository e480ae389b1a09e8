"""A stream waits for its own messages, not for another one's."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from typing import Any

import grpc
import pytest
from latentwatch.collector.config import Bounds
from latentwatch.collector.core import Core
from latentwatch.transport import codec
from latentwatch.transport.fair_queue import FairQueue, Flow
from latentwatch.transport.sender import Sender

from tests.support.streams import hello as stream_hello
from tests.support.streams import sparse, watchlist
from tests.support.wire import FakeSink, ServerThread, batch, eventually, hello, in_loop


def order(streams: dict[str, tuple[int, int]]) -> list[str]:
    """Who was served, in order. Args: streams: messages and the length of each, by name; all are there at once."""
    served: list[str] = []

    async def stream(turns: FairQueue, name: str, messages: int, length: int) -> None:
        account = Flow()
        for _ in range(messages):
            await turns.run(account, length, lambda: served.append(name), alone=False)

    async def run() -> None:
        turns = FairQueue()
        await asyncio.gather(*(stream(turns, name, *work) for name, work in streams.items()))
        assert turns.facts.waiting == 0 and turns.facts.oldest_seconds == 0.0

    in_loop(run())
    return served


def test_streams_of_equal_messages_take_turns_however_many_each_has():
    served = order({"noisy": (500, 1000), "quiet": (10, 1000)})
    assert all(served[: 2 * i].count("quiet") >= i - 1 for i in range(1, 11))


def test_a_stream_pays_for_its_bytes():
    served = order({"large": (10, 100_000), "small": (90, 10_000)})
    assert abs(served[:55].count("large") - 5) <= 1


def test_who_was_silent_has_no_claim_on_the_past():
    """Else one that comes back after an hour would keep the others out for as long."""

    async def run() -> list[str]:
        turns, busy, late, served = FairQueue(), Flow(), Flow(), list[str]()

        def work(name: str) -> Any:
            return lambda: served.append(name)

        for _ in range(100):
            await turns.run(busy, 1000, work("busy"), alone=True)
        served.clear()

        async def rest(account: Flow, name: str) -> None:
            for _ in range(20):
                await turns.run(account, 1000, work(name), alone=False)

        await asyncio.gather(rest(late, "late"), rest(busy, "busy"))
        return served

    served = in_loop(run())
    assert 4 <= served[:10].count("busy") <= 6


def test_a_waiter_that_is_cancelled_holds_up_nobody_and_a_failure_is_its_own():
    async def run() -> None:
        turns = FairQueue()
        gone = asyncio.create_task(turns.run(Flow(), 1, lambda: None, alone=False))
        await asyncio.sleep(0)
        gone.cancel()
        assert await turns.run(Flow(), 1, lambda: 7, alone=False) == 7
        with pytest.raises(ZeroDivisionError):
            await turns.run(Flow(), 1, lambda: 1 / 0, alone=False)
        assert await turns.run(Flow(), 1, lambda: 8, alone=False) == 8

    in_loop(run())


class SlowSink(FakeSink):
    """Notes whose batch came when."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds_per_batch = 0.002
        self.served: list[tuple[str, int]] = []

    def observe(self, hello: Any, received: Any, now: float) -> None:
        super().observe(hello, received, now)
        self.served.append((hello.replica, received.sequence))


def test_a_replica_at_fifty_times_the_rate_delays_a_quiet_one_by_no_more_than_its_turn(tmp_path):
    """Between two of the quiet one's batches that both wait, the noisy one gets about one in."""
    sink, address = SlowSink(), f"unix://{tmp_path}/c.sock"
    noisy, quiet = (Sender(address, hello(replica=name, boot_id=mark * 32)) for name, mark in (("n", "a"), ("q", "b")))
    for i in range(1000):
        noisy.offer(batch(i))
    for i in range(20):
        quiet.offer(batch(i))
    with ServerThread(sink, address):
        noisy.start()
        eventually(lambda: len(sink.served) > 50)
        quiet.start()
        eventually(lambda: len(sink.served) == 1020, 60)
    for sender in (noisy, quiet):
        assert sender.close(1).dropped_batches == sender.stats().shed_batches == 0
    places = [place for place, (name, _) in enumerate(sink.served) if name == "q"]
    assert [sequence for name, sequence in sink.served if name == "q"] == list(range(1, 21))
    assert places[-1] < 1000, "the quiet one was done while the noisy one still sent"
    between = sorted(after - before for before, after in itertools.pairwise(places))
    assert between[len(between) // 2] <= 3


def refusal_of(address: str, *messages: bytes) -> tuple[Any, grpc.StatusCode, str]:
    """The last reply, and how gRPC says that the stream ended."""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(codec.METHOD)(iter(messages))
        replies = []
        with contextlib.suppress(grpc.RpcError):
            for data in call:
                replies.append(codec.decode_reply(data))
        return replies[-1], call.code(), call.details()


def test_one_replica_too_many_is_refused_in_words_and_as_a_status_and_counted(tmp_path):
    core, address = Core(watchlist([sparse("f")]), Bounds(replicas=1)), f"unix://{tmp_path}/c.sock"
    core.ingest.hello(stream_hello(), time.time())
    late = stream_hello(replica="pod-1/0", boot_id="1" * 32)
    with ServerThread(core.ingest, address, on_refused=core.ingest.refused):
        said, code, details = refusal_of(address, codec.encode_hello(late, last_acked_sequence=0, time_unix_nano=0))
    assert said.reason == "too_many_replicas" and code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "this collector already knows 1 replicas, and its bound is 1" in details and "Start another" in details
    assert core.lookup.snapshot(0).collector.streams_refused["too_many_replicas"] == 1
    assert [view.replica for view in core.lookup.snapshot(0).replicas] == ["pod-0/0"]
