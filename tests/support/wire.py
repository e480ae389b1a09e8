"""Batches, hellos and a Sink for the tests of the transport."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from latentwatch.errors import StreamRefused
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.step.batch import (
    FIRE_DTYPE,
    SEGMENT_DTYPE,
    EngineCounters,
    RequestClosed,
    RequestOpened,
    StepBatch,
    owns_rows,
)
from latentwatch.transport.codec.fields import MAX_COUNT
from latentwatch.transport.hello import Hello
from latentwatch.transport.receiver import Receiver
from latentwatch.transport.report import Report
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport

T = TypeVar("T")


def hello(**changes: Any) -> Hello:
    values: dict[str, Any] = {
        "replica": "pod-0/0",
        "boot_id": "0" * 32,
        "engine": "0",
        "model_name": "toy",
        "watchlist_sha256": "a" * 64,
        "armed": True,
        "not_armed_reason": "",
        "not_armed_text": "",
        "plugin_version": "0.1.0",
        "engine_version": "0.32.0",
    }
    return Hello(**(values | changes))


def batch(step: int, *, rows: int = 8, fires: int = 4, probes: int = 2, hooks: int = 1) -> StepBatch:
    """One request's decode step and another's unseen prompt; `rows` tokens carry scores, one more does not."""
    rng = np.random.default_rng(step)
    fires_N = np.zeros(fires, FIRE_DTYPE)
    fires_N["row"] = np.sort(rng.integers(0, max(rows, 1), fires))
    fires_N["act"] = rng.random(fires, dtype=np.float32)
    segments = [(7, step, 1, TokenState.UNSEEN, Reason.PREFIX_CACHE, Phase.PROMPT)]
    if rows:
        segments.append((step, 0, rows, TokenState.SCORED, Reason.NONE, Phase.OUTPUT))
    return StepBatch(
        step=step,
        time_unix_nano=step * 1000,
        segments_S=np.array(segments, SEGMENT_DTYPE),
        fires_N=fires_N if rows else fires_N[:0],
        dense_RP=rng.random((rows, probes)).astype(np.float16),
        norm_RH=rng.random((rows, hooks)).astype(np.float32),
        opened=(RequestOpened(step, f"cmpl-{step}", 3),),
        closed=(RequestClosed(step, f"cmpl-{step}", 3, 2, 4, Outcome.FINISHED),),
        counters=EngineCounters(steps=step),
    )


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_U32 = st.integers(0, 2**32 - 1)
_U64 = st.integers(0, 2**64 - 1)
_COUNT = st.integers(0, MAX_COUNT)
_I64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def batches(draw: Any) -> StepBatch:
    """Any batch that the codec takes; most mean nothing."""
    segments = draw(
        st.lists(
            st.tuples(
                _I64,
                st.integers(0, 2**31 - 100),
                st.integers(1, 9),
                st.sampled_from(TokenState),
                st.sampled_from(Reason),
                st.sampled_from(Phase),
            ),
            max_size=6,
        )
    )
    segments_S = np.array(segments, SEGMENT_DTYPE)
    rows = int(segments_S["count"][owns_rows(segments_S)].sum())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    fires_N = np.frombuffer(rng.bytes(10 * draw(st.integers(0, 12)) if rows else 0), FIRE_DTYPE).copy()
    fires_N["row"] = np.sort(fires_N["row"] % max(rows, 1))
    probes, hooks = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    return StepBatch(
        step=draw(_U64),
        time_unix_nano=draw(_I64),
        segments_S=segments_S,
        fires_N=fires_N,
        # Any bit pattern, NaN and infinities too: what a value may be is for step.checks to say.
        dense_RP=np.frombuffer(rng.bytes(2 * rows * probes), "<f2").reshape(rows, probes),
        norm_RH=np.frombuffer(rng.bytes(4 * rows * hooks), "<f4").reshape(rows, hooks),
        opened=tuple(draw(st.lists(st.builds(RequestOpened, _I64, _TEXT, _U32, _TEXT, _TEXT), max_size=3))),
        closed=tuple(
            draw(
                st.lists(st.builds(RequestClosed, _I64, _TEXT, _U32, _U32, _U32, st.sampled_from(Outcome)), max_size=3)
            )
        ),
        counters=draw(st.builds(EngineCounters, *[_COUNT] * len(fields(EngineCounters)))),
    )


def tokens(batch: StepBatch) -> int:
    return int(batch.segments_S["count"].sum())


def same(one: StepBatch, other: StepBatch) -> bool:
    """Equal in every column, to the bit (a NaN equals itself)."""
    columns = ("segments_S", "fires_N", "dense_RP", "norm_RH")
    values = ("step", "time_unix_nano", "opened", "closed", "counters")
    return all(
        getattr(one, name).dtype == getattr(other, name).dtype
        and getattr(one, name).shape == getattr(other, name).shape
        and getattr(one, name).tobytes() == getattr(other, name).tobytes()
        for name in columns
    ) and all(getattr(one, name) == getattr(other, name) for name in values)


class FakeSink:
    """Keeps what it is given and refuses what it is told to. Thread-safe to read."""

    def __init__(self, held: dict[tuple[str, str], int] | None = None) -> None:
        self.held = dict(held or {})
        self.batches: list[tuple[int, StepBatch]] = []
        self.reports: list[tuple[int, Report]] = []
        self.calls: list[str] = []
        self.duplicates = self.commits = 0
        self.refuse_hello: StreamRefused | None = None
        self.refuse_sequences: set[int] = set()
        self.seconds_per_batch = 0.0

    def hello(self, hello: Hello, now: float) -> int:
        self.calls.append("hello")
        if self.refuse_hello is not None:
            raise self.refuse_hello
        return self.held.get((hello.replica, hello.boot_id), 0)

    def observe(self, hello: Hello, received: ReceivedBatch, now: float) -> None:
        key, sequence = (hello.replica, hello.boot_id), received.sequence
        if sequence in self.refuse_sequences:
            raise StreamRefused(f"batch {sequence}", found="the test", instead="None.", reason="malformed_batch")
        if self.seconds_per_batch:
            time.sleep(self.seconds_per_batch)
        if sequence <= self.held.get(key, 0):
            self.duplicates += 1
            return
        self.held[key] = sequence
        self.batches.append((sequence, received.batch))

    def merge(self, hello: Hello, received: ReceivedReport, now: float) -> None:
        self.held[hello.replica, hello.boot_id] = received.sequence
        self.reports.append((received.sequence, received.report))

    def commit(self) -> None:
        self.commits += 1

    def goodbye(self, hello: Hello, now: float) -> None:
        self.calls.append("goodbye")

    @property
    def sequences(self) -> list[int]:
        return [sequence for sequence, _ in self.batches]

    @property
    def steps(self) -> list[int]:
        return [batch.step for _, batch in self.batches]


class ServerThread:
    """A Receiver in an event loop of another thread, so that a test can use the blocking sender beside it."""

    def __init__(self, sink: Any, *listen: str, **options: Any) -> None:
        self.receiver = Receiver(sink, listen, clock=lambda: 1.0, **options)
        self.running = False
        in_loop(self.receiver.start())
        self.running = True

    def stop(self, grace: float = 2.0) -> None:
        self.running = False
        in_loop(self.receiver.stop(grace))

    def __enter__(self) -> ServerThread:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.stop()


def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` in the one event loop of the tests and wait for it.

    One loop, because grpc.aio has one poller a process: an event of a loop that was closed reaches the next one and
    is logged as an error.
    """
    return asyncio.run_coroutine_threadsafe(work, _loop()).result(10)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="test-loop", daemon=True).start()
    return loop


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return as soon as the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)
