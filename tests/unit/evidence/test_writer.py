"""The thread between collector and disk: bounded, counted, and harmless when the disk is not."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest
from latentwatch.evidence.records import Exceeded, Record, RecordedRequest, size_bytes
from latentwatch.evidence.writer import Writer
from latentwatch.facts import Exceedance, RequestInfo
from latentwatch.names import Phase

from tests.support.wire import eventually

REQUEST = RecordedRequest(1, RequestInfo("chatcmpl-1", "pod-0/0", "toy", "0", 1.0, True))


class RecordTarget:
    def __init__(self) -> None:
        self.records: list[Record] = []
        self.batches: list[int] = []
        self.pruned = 0
        self.closed = False
        self.fail = 0
        self.gate = threading.Event()
        self.gate.set()

    def write(self, records, now):
        self.gate.wait()
        if self.fail:
            self.fail -= 1
            raise OSError(28, "No space left on device")
        self.records += records
        self.batches.append(len(records))

    def prune(self, now):
        self.pruned += 1

    def close(self):
        self.closed = True


def exceedances(count: int) -> list[Exceedance]:
    return [Exceeded(REQUEST, Exceedance(0, Phase.OUTPUT, i, 1.0, 1.0)) for i in range(count)]


def test_everything_is_written_in_order_and_closing_writes_the_rest():
    target = RecordTarget()
    writer = Writer(target)
    for record in exceedances(12_000):
        writer.put([record])
    writer.close()
    assert target.records == exceedances(12_000) and target.closed
    assert writer.totals().written == {"exceedance": 12_000} and writer.totals().dropped == {}
    assert writer.totals().queued_bytes == 0 and max(target.batches) <= 5000


def test_beside_a_journal_only_what_was_released_is_written_whatever_waits_and_closing_writes_the_rest():
    target = RecordTarget()
    writer = Writer(target)
    writer.put(exceedances(3))
    writer.wait_for_release()
    writer.put(exceedances(6_000))
    done = writer.run(lambda: len(target.records))
    time.sleep(0.5)
    assert len(target.records) == 3 and not done.done()
    writer.release()
    writer.put(exceedances(2))
    assert done.result(5) == 6_003 and len(target.records) == 6_003
    writer.close()
    assert len(target.records) == 6_005 and writer.totals().written == {"exceedance": 6_005}


def test_a_full_queue_drops_the_newest_counts_them_and_does_not_wait():
    target = RecordTarget()
    target.gate.clear()
    room = 100 * size_bytes(exceedances(1)[0])
    writer = Writer(target, queue_bytes=room)
    writer.put(exceedances(1))
    eventually(lambda: writer.totals().queued_bytes == 0)  # in the thread's hands, held at the gate
    started = time.monotonic()
    writer.put(exceedances(150))
    assert time.monotonic() - started < 1
    totals = writer.totals()
    assert totals.dropped == {("exceedance", "queue_full"): 50} and totals.queued_bytes <= room
    target.gate.set()
    writer.close()
    assert writer.totals().written == {"exceedance": 101}, "written and dropped add up to what was put"


def test_a_failing_disk_costs_the_batch_is_counted_and_said_once(caplog):
    target = RecordTarget()
    target.fail = 2
    writer = Writer(target)
    for expected in (1, 2):
        writer.put(exceedances(1))
        eventually(lambda expected=expected: sum(writer.totals().dropped.values()) == expected)
    writer.put(exceedances(3))
    writer.close()
    assert writer.totals().dropped == {("exceedance", "write_failed"): 2}
    assert writer.totals().written == {"exceedance": 3}
    assert caplog.text.count("No space left") == 1


def test_a_task_runs_after_the_records_before_it_and_gives_back_its_result_or_error():
    target = RecordTarget()
    writer = Writer(target)
    writer.put(exceedances(7000))
    seen: Future[int] = writer.run(lambda: len(target.records))
    assert seen.result(10) == 7000
    with pytest.raises(ZeroDivisionError):
        writer.run(lambda: 1 / 0).result(10)
    writer.close()


def test_the_target_is_pruned_about_once_a_second_by_the_given_clock():
    target, now = RecordTarget(), [1000.0]
    writer = Writer(target, clock=lambda: now[0])
    time.sleep(0.3)
    assert target.pruned == 0
    now[0] += 5
    eventually(lambda: target.pruned == 1)
    writer.close()


def test_a_task_runs_once_what_was_put_before_it_is_written_however_much_comes_after_it():
    """A checkpoint of the state waits for it: a queue that is never empty must not hold it up."""
    target = RecordTarget()
    target.gate.clear()
    writer = Writer(target)
    writer.put(exceedances(5_000))
    eventually(lambda: not writer.totals().queued_bytes)
    writer.put(exceedances(10))
    done = writer.run(lambda: len(target.records))
    writer.put(exceedances(3 * 5_000))
    assert not done.done()
    target.gate.set()
    assert 5_010 <= done.result(10) <= 10_000
    writer.close()
    assert len(target.records) == 4 * 5_000 + 10
