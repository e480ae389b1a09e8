"""The thread between the collector and the disk: a bounded queue in, batches out. It never holds up the collector.

A full queue drops what comes next and counts it; so does a store that fails, after which it is tried again. Evidence
is lost then, and nothing else.

Beside a journal it writes what the journal has: else a collector that is killed would find in its evidence requests
that it has not seen, and which their engine sends again.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from latentwatch.evidence.records import NotWritten, Record, kind, size_bytes

T = TypeVar("T")

log = logging.getLogger(__name__)

QUEUE_BYTES: Final = 64 << 20
BATCH_RECORDS: Final = 5_000
"""Per transaction: large enough that its fixed cost vanishes, small enough that it takes some 100 ms."""
_PAUSE_SECONDS: Final = 0.2
"""Between batches while little comes: bounds how late evidence can be read."""
_PRUNE_SECONDS: Final = 1.0
_COMPLAIN_SECONDS: Final = 60.0
_ERROR_CHARACTERS: Final = 300


class RecordTarget(Protocol):
    """Where records go. Called by the writer's thread only."""

    def write(self, records: Sequence[Record], now: float) -> None:
        """Take records. Raises NotWritten with those that count as dropped, or anything: then all of them do."""

    def prune(self, now: float) -> None:
        """Called about once a second."""

    def close(self) -> None:
        """Called once, last."""


@dataclass(frozen=True)
class WriterTotals:
    """Counts since the writer started, by kind of record."""

    written: Mapping[str, int]
    dropped: Mapping[tuple[str, str], int]
    """By kind and reason: queue_full or write_failed."""
    queued_bytes: int
    last_error: str = ""
    """Why the last failed write failed; empty where none did."""


NOTHING_WRITTEN: Final = WriterTotals({}, {}, 0)
DROP_REASONS: Final = ("queue_full", "write_failed")


class Writer:
    """Writes records in a thread of its own."""

    def __init__(
        self,
        target: RecordTarget,
        *,
        name: str = "evidence",
        queue_bytes: int = QUEUE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._target = target
        self._clock = clock
        self._queue_bytes = queue_bytes
        self._queue: deque[Record] = deque()
        self._tasks: deque[tuple[int, Callable[[], None]]] = deque()
        """Each with the number of records that were queued before it."""
        self._put = self._done = 0
        self._released: int | None = None
        """How many of those that were put may be written; None: all."""
        self._queued_bytes = 0
        self._written: Counter[str] = Counter()
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._changed = threading.Condition()
        self._closing = False
        self._complained = -_COMPLAIN_SECONDS
        self._last_error = ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, records: Sequence[Record]) -> None:
        """Queue records; does not wait for anything but other callers."""
        with self._changed:
            for record in records:
                size = size_bytes(record)
                if self._queued_bytes + size > self._queue_bytes:
                    self._dropped[kind(record), "queue_full"] += 1
                else:
                    self._queue.append(record)
                    self._put += 1
                    self._queued_bytes += size
            if len(self._queue) >= BATCH_RECORDS:
                self._changed.notify()

    def wait_for_release(self) -> None:
        """From now on write only what was put before `release`, or before `close`."""
        with self._changed:
            self._released = self._put

    def release(self) -> None:
        """What was put until now may be written."""
        with self._changed:
            if self._released is not None:
                self._released = self._put

    def run(self, task: Callable[[], T]) -> Future[T]:
        """Do something in the writer's thread, after every record that was put before, whatever comes after it."""
        future: Future[T] = Future()
        with self._changed:
            self._tasks.append((self._put, functools.partial(_resolve, task, future)))
            self._changed.notify()
        return future

    def totals(self) -> WriterTotals:
        """What became of the records so far."""
        with self._changed:
            return WriterTotals(dict(self._written), dict(self._dropped), self._queued_bytes, self._last_error)

    def close(self, seconds: float = 10.0) -> None:
        """Write what is queued, then close the target. What is not written in time is lost."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        pruned = self._clock()
        while True:
            with self._changed:
                if not self._wanted():
                    self._changed.wait(_PAUSE_SECONDS)
                batch = [self._queue.popleft() for _ in range(min(BATCH_RECORDS, self._ready()))]
                self._queued_bytes -= sum(map(size_bytes, batch))
                done = self._closing and not batch and not self._tasks
            if batch:
                self._write(batch)
                self._done += len(batch)
            while (task := self._next_task()) is not None:
                task()
            now = self._clock()
            if now - pruned >= _PRUNE_SECONDS or now < pruned:
                pruned = now
                self._guarded(functools.partial(self._target.prune, now))
            if done:
                self._guarded(self._target.close)
                return

    def _next_task(self) -> Callable[[], None] | None:
        with self._changed:
            return self._tasks.popleft()[1] if self._tasks and self._tasks[0][0] <= self._done else None

    def _wanted(self) -> bool:
        due = self._tasks and self._tasks[0][0] <= self._done + self._ready()
        return bool(self._closing or due or self._ready() >= BATCH_RECORDS)

    def _ready(self) -> int:
        """Records in the queue that may be written."""
        if self._released is None or self._closing:
            return len(self._queue)
        return self._released - self._done

    def _write(self, batch: list[Record]) -> None:
        error = self._guarded(lambda: self._target.write(batch, self._clock()))
        failed = () if error is None else error.records if isinstance(error, NotWritten) else batch
        dropped = Counter(map(kind, failed))
        with self._changed:
            self._written.update(Counter(map(kind, batch)) - dropped)
            self._dropped.update({(name, "write_failed"): count for name, count in dropped.items()})

    def _guarded(self, work: Callable[[], object]) -> Exception | None:
        """What went wrong. It is said once a minute: a full disk would fill the log too."""
        try:
            work()
        except Exception as error:  # whatever a disk or a driver does, the thread goes on
            reason = error.__cause__ if isinstance(error, NotWritten) else error
            self._last_error = f"{type(reason).__name__}: {reason}"[:_ERROR_CHARACTERS]
            if time.monotonic() - self._complained > _COMPLAIN_SECONDS:
                self._complained = time.monotonic()
                log.warning("%s is not written: %s", self._thread.name, self._last_error)
            return error
        return None


def _resolve(task: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(task())
    except Exception as error:
        future.set_exception(error)
