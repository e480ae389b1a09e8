"""The state on a disk: a collector that resumed cannot be told from one that never stopped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.client_ids import IdKind
from latentwatch.collector.config import Bounds
from latentwatch.collector.core import Core
from latentwatch.collector.durability import checkpoint, journal, schema
from latentwatch.collector.durability.journal import DurableSink
from latentwatch.errors import StateRefused
from latentwatch.names import Severity
from latentwatch.step.batch import StepBatch
from latentwatch.transport import codec
from latentwatch.watchlist.file import Limit

from tests.support.streams import Schedule, hello, probe, received, sparse, tokens, watchlist

FEATURES = (
    sparse("jailbreak", limit=Limit("max", 3.0), severity=Severity.CRITICAL),
    sparse("weather"),
    sparse("bos", limit=Limit("max", 0.1), skip=1),
    probe("deceive", limit=Limit("rolling_mean", 1.0, 4)),
    probe("mood", limit=Limit("max", 2.0, phase="output")),
)
SMALL = Bounds(open_requests=4, closed_requests=3, flagged_requests=2, exceedances=5, windows=4)


def core(sha256: str = "ab" * 32, bounds: Bounds = SMALL) -> Core:
    return Core(watchlist(FEATURES, sha256=sha256), bounds)


def batches(seed: int, requests: int = 6) -> list[StepBatch]:
    rng = np.random.default_rng(seed)
    made = [
        tokens(rng, FEATURES, handle=i, total=int(rng.integers(2, 40)), prompt_tokens=2) for i in range(1, requests + 1)
    ]
    return Schedule.random(rng, made, 9).batches(FEATURES)


def plain(value: Any) -> Any:
    """A state with its arrays as bytes, so that two can be compared to the bit."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(held) for key, held in value.items()}
    return [plain(held) for held in value] if isinstance(value, list | tuple) else value


def same(one: Core, other: Core) -> None:
    assert plain(one.state()) == plain(other.state())
    for serial in one.lookup.latest(100):
        assert repr(one.lookup.request(serial)) == repr(other.lookup.request(serial))
    assert repr(one.lookup.exceedances(100)) == repr(other.lookup.exceedances(100))


def run(sink: Any, steps: list[StepBatch], first: int = 1) -> None:
    """A second passes with each step; every third is followed by a tick."""
    for sequence, batch in enumerate(steps, start=first):
        sink.observe(hello(), received(sequence, batch), 1000.0 + sequence)
        sink.commit()
        if sequence % 3 == 0:
            sink.tick(1000.0 + sequence)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_a_collector_restored_from_a_file_goes_on_as_if_it_had_never_stopped(seed, share):
    steps = batches(seed)
    cut = int(share * len(steps))
    whole, second = core(), core()
    whole.ingest.hello(hello(), 1000.0)
    run(whole.ingest, steps[:cut])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.npz"
        checkpoint.write(path, {"a": 1}, whole.state())
        second.restore(checkpoint.read(path, {"a": 1}))
    same(whole, second)
    run(whole.ingest, steps[cut:], cut + 1)
    run(second.ingest, steps[cut:], cut + 1)
    same(whole, second)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_a_journal_that_ends_anywhere_resumes_at_a_whole_batch_and_the_sender_fills_in_the_rest(seed, data):
    """What a kill leaves: a checkpoint somewhere before, and a journal cut at any byte."""
    steps = batches(seed)
    whole = core()
    whole.ingest.hello(hello(), 1000.0)
    run(whole.ingest, steps)
    with tempfile.TemporaryDirectory() as folder:
        first = DurableSink(core(), Path(folder), 1000.0)
        first.hello(hello(), 1000.0)
        renewed = data.draw(st.integers(0, len(steps)))
        run(first, steps[:renewed])
        asyncio.run(first.maintain(9e9))
        run(first, steps[renewed:], renewed + 1)
        (path,) = Path(folder).rglob("journal-*.log")
        torn = path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size))]
        killed(first)
        path.write_bytes(torn)

        second = core()
        sink = DurableSink(second, Path(folder), 1000.0)
        assert second.lookup.snapshot(0).replicas[0].connected is False
        held = sink.hello(hello(), 1000.0)
        assert renewed <= held <= len(steps)
        for sequence, batch in enumerate(steps[held:], start=held + 1):
            sink.observe(hello(), received(sequence, batch), 1000.0 + sequence)
        totals = [made.lookup.snapshot(0) for made in (whole, second)]
        assert np.array_equal(totals[0].engines[0].tokens, totals[1].engines[0].tokens)
        assert totals[0].engines[0].requests == totals[1].engines[0].requests
        assert np.array_equal(totals[0].models[0].fired_F, totals[1].models[0].fired_F)
        assert np.array_equal(totals[0].models[0].exceedances_F, totals[1].models[0].exceedances_F)
        assert totals[1].collector.duplicates == totals[1].collector.lost_sequences == 0
        killed(sink)


def killed(sink: DurableSink) -> None:
    """What the system does when a process is killed: its descriptors are closed, and nothing else."""
    sink._journal.close()
    sink._folder.release()


def test_the_journal_holds_what_was_received_to_the_byte(tmp_path):
    """Nothing is encoded again, so a field order or number format of another writer's does not matter."""
    sink = DurableSink(core(), tmp_path, 1000.0)
    sink.hello(hello(), 1000.0)
    came = received(1, batches(0)[0])
    # The same fields with an empty column said first: a message as another protobuf library may write it.
    padded = replace(came, message=b"\x12\x02\x08\x01" + came.message)
    assert codec.decode_request(padded.message).sequence == 1
    sink.observe(hello(), padded, 1001.0)
    sink.commit()
    (path,) = tmp_path.rglob("journal-*.log")
    assert padded.message in path.read_bytes()
    killed(sink)
    again = core()
    assert DurableSink(again, tmp_path, 1002.0).hello(hello(), 1002.0) == 1


def test_a_second_checkpoint_replaces_the_first_and_a_stop_leaves_no_journal_to_read(tmp_path):
    steps = batches(0)
    sink = DurableSink(core(), tmp_path, 1000.0)
    sink.hello(hello(), 1000.0)
    run(sink, steps)
    asyncio.run(sink.maintain(9e9))
    assert len(list(tmp_path.rglob("checkpoint-*"))) == len(list(tmp_path.rglob("journal-*"))) == 1
    sink.close(2000.0)
    made = core()
    again = DurableSink(made, tmp_path, 2000.0)
    assert again.facts.resumed_events == 0 and again.facts.durable
    assert again.hello(hello(), 2000.0) == len(steps)
    assert made.lookup.snapshot(0).collector.messages == len(steps)


def test_a_request_that_is_deleted_is_in_no_file_and_does_not_come_back(tmp_path):
    """And what it added to counts stays."""
    named, counts = b"chatcmpl-2-0123abcd", lambda p: [m.exceedances_F.tolist() for m in p.lookup.snapshot(0.0).models]
    roomy = Bounds(open_requests=8)
    one = DurableSink(core(bounds=roomy), tmp_path, 1000.0)
    one.hello(hello(), 1000.0)
    run(one, batches(1))
    before = counts(one._core)
    asyncio.run(one._checkpoint(1100.0))
    assert one._core.lookup.find("chatcmpl-2") and held(tmp_path, named)
    assert asyncio.run(one.forget({IdKind.RESPONSE: ("chatcmpl-2",)}, 1101.0))
    assert not one._core.lookup.find("chatcmpl-2") and not held(tmp_path, named)
    killed(one)
    again = DurableSink(core(bounds=roomy), tmp_path, 1102.0)
    assert not again._core.lookup.find("chatcmpl-2") and again._core.lookup.find("chatcmpl-1")
    assert counts(again._core) == before
    again.close(1103.0)


def held(folder: Path, text: bytes) -> bool:
    """Whether these bytes are in a file, or in what a checkpoint has packed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    packed = (zipfile.ZipFile(path) for path in files if path.suffix == ".npz")
    content = [path.read_bytes() for path in files] + [part.read(name) for part in packed for name in part.namelist()]
    return any(text in one or text.decode().encode("utf-32-le") in one for one in content)


def test_a_full_disk_stops_no_counting_and_a_later_checkpoint_makes_up_for_it(tmp_path, monkeypatch):
    steps = batches(1)
    made = core()
    sink = DurableSink(made, tmp_path, 1000.0)
    sink.hello(hello(), 1000.0)
    run(sink, steps[:3])

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        run(sink, steps[3:5], 4)
        asyncio.run(sink.maintain(2000.0))
        assert not sink.facts.durable and sink.facts.write_failures == 2
    run(sink, steps[5:6], 6)
    assert made.lookup.snapshot(0).collector.messages == 6
    asyncio.run(sink.maintain(3000.0))
    assert sink.facts.durable
    run(sink, steps[6:], 7)
    killed(sink)
    second = core()
    assert DurableSink(second, tmp_path, 4000.0).hello(hello(), 4000.0) == len(steps)
    second.ingest.goodbye(hello(), 1000.0)
    assert np.array_equal(second.lookup.snapshot(0).engines[0].tokens, made.lookup.snapshot(0).engines[0].tokens)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file here can be begun or written; what is there can be read."""

    def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT and not Path(path).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, flags, *rest, **options)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.open
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "open", opened)
        patched.setattr(os, "write", full)
        yield


def test_a_collector_starts_from_its_state_while_the_disk_is_full_says_so_and_makes_up_for_it_later(tmp_path, caplog):
    steps = batches(1)
    first = DurableSink(core(), tmp_path, 1000.0)
    first.hello(hello(), 1000.0)
    run(first, steps[:4])
    killed(first)
    with full_disk():
        second = DurableSink(core(), tmp_path, 1001.0)
        assert not second.facts.durable and second.facts.write_failures == 1
        assert "cannot be written: No space left on device" in caplog.text
        assert second.hello(hello(), 1001.0) == 4, "what the disk has is counted"
        run(second, steps[4:6], 5)
        asyncio.run(second.maintain(1010.0))
        assert not second.facts.durable
    asyncio.run(second.maintain(1020.0))
    assert second.facts.durable and second.facts.files_aside == 0
    killed(second)
    assert DurableSink(core(), tmp_path, 1021.0).hello(hello(), 1021.0) == 6


def test_a_state_that_cannot_be_read_is_set_aside_once_that_is_possible_and_never_removed(
    tmp_path, monkeypatch, caplog
):
    """A folder that another user owns, a disk that gives errors: the engines are monitored meanwhile."""
    steps = batches(1)
    first = DurableSink(core(), tmp_path, 1000.0)
    first.hello(hello(), 1000.0)
    run(first, steps[:4])
    killed(first)
    (before,) = tmp_path.rglob("journal-*.log")
    content = before.read_bytes()

    def denied(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "read", denied)
        patched.setattr(Path, "rename", denied)
        patched.setattr(os, "write", denied)
        second = DurableSink(core(), tmp_path, 1001.0)
        assert "cannot be read: Permission denied" in caplog.text
        assert second.hello(hello(), 1001.0) == 0 and not second.facts.durable
        run(second, steps[:5])
        asyncio.run(second.maintain(1010.0))
        assert not second.facts.durable
    assert before.read_bytes() == content
    asyncio.run(second.maintain(1020.0))
    assert second.facts.durable and second.facts.files_aside == 2
    assert before.with_name(before.name + ".aside").read_bytes() == content
    assert not asyncio.run(second.forget({IdKind.RESPONSE: ("chatcmpl-1",)}, 1021.0)), (
        "what is set aside may tell of it"
    )
    killed(second)
    third = DurableSink(core(), tmp_path, 1022.0)
    assert third.hello(hello(), 1022.0) == 5 and third.facts.files_aside == 2


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT, errno.ENOSPC])
def test_a_state_folder_that_cannot_be_made_now_costs_the_state_and_not_the_collector(tmp_path, monkeypatch, code):
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    made = core()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", failing)
        sink = DurableSink(made, tmp_path / "state", 1000.0)
        sink.hello(hello(), 1000.0)
        run(sink, batches(1)[:3])
        asyncio.run(sink.maintain(1010.0))
    assert made.lookup.snapshot(0).collector.messages == 3 and not sink.facts.durable
    asyncio.run(sink.maintain(1020.0))
    assert sink.facts.durable
    killed(sink)
    assert DurableSink(core(), tmp_path / "state", 1021.0).hello(hello(), 1021.0) == 3


def test_a_journal_that_is_damaged_before_its_end_is_set_aside_whole_and_what_came_before_counts(tmp_path, caplog):
    steps = batches(1)
    sink = DurableSink(core(), tmp_path, 1000.0)
    sink.hello(hello(), 1000.0)
    run(sink, steps[:6])
    killed(sink)
    (path,) = tmp_path.rglob("journal-*.log")
    content = bytearray(path.read_bytes())
    at = content.index(received(4, steps[3]).message) - 13 - 8  # the frame of the fourth batch: its length
    content[at + 2] ^= 1  # 65,536 more bytes than the file has
    path.write_bytes(content)
    again = DurableSink(core(), tmp_path, 1001.0)
    assert again.hello(hello(), 1001.0) == 3
    assert again.facts.files_aside == 1 and "set aside" in caplog.text
    assert path.with_name(path.name + ".aside").read_bytes() == content


def test_evidence_that_is_not_written_keeps_the_journal_that_it_can_be_made_of_again(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "EVIDENCE_SECONDS", 0.2)
    monkeypatch.setattr(journal, "_SYNC_SECONDS", 0.1)
    waiting = list[Future[None]]()

    def written() -> Future[None]:
        waiting.append(Future())
        if len(waiting) == 1:  # that of the start
            waiting[0].set_result(None)
        return waiting[-1]

    steps = batches(1)
    sink = DurableSink(core(), tmp_path, 1000.0, evidence_written=written)
    sink.hello(hello(), 1000.0)
    run(sink, steps[:4])
    asyncio.run(sink.maintain(1100.0))
    run(sink, steps[4:6], 5)
    assert sink.facts.durable and len(list(tmp_path.rglob("journal-*"))) == 2
    assert not asyncio.run(sink.forget({IdKind.RESPONSE: ("chatcmpl-1",)}, 1101.0)), "the journals tell of it"
    killed(sink)
    again = core()
    assert DurableSink(again, tmp_path, 1102.0).hello(hello(), 1102.0) == 6, "one journal leads to the next"
    assert len(list(tmp_path.rglob("journal-*"))) == 1


def test_each_watchlist_has_a_state_of_its_own(tmp_path):
    sink = DurableSink(core(), tmp_path, 1000.0)
    sink.hello(hello(), 1000.0)
    run(sink, batches(0))
    sink.close(2000.0)
    other = DurableSink(core("cd" * 32), tmp_path, 2000.0)
    assert other.hello(hello(watchlist_sha256="cd" * 32), 2000.0) == 0
    other.close(2000.0)
    assert DurableSink(core(), tmp_path, 3000.0).hello(hello(), 3000.0) == len(batches(0))


def test_the_state_of_another_format_is_left_alone_and_named_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(schema, "FORMAT", schema.FORMAT - 1)
    DurableSink(core(), tmp_path, 1000.0).close(1000.0)
    (earlier,) = (path for path in tmp_path.iterdir() if path.is_dir())
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    DurableSink(core("cd" * 32), tmp_path, 1000.0).close(1000.0)
    assert not caplog.text, "that is of another watchlist"
    monkeypatch.undo()
    for _ in range(2):
        DurableSink(core(), tmp_path, 1001.0).close(1001.0)
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert str(earlier) in said and "begin at zero" in said and "Start the version that wrote it" in said
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before


def test_state_that_cannot_be_resumed_from_is_refused_and_not_overwritten(tmp_path):
    sink = DurableSink(core(), tmp_path, 1000.0)
    with pytest.raises(StateRefused) as refused:
        DurableSink(core(), tmp_path, 1000.0)
    assert refused.value.reason == "state_in_use"
    sink.close(1000.0)
    with pytest.raises(StateRefused, match="bounds") as refused:
        DurableSink(core(bounds=Bounds()), tmp_path, 1000.0)
    assert refused.value.reason == "state_header"
    (path,) = tmp_path.rglob("checkpoint-*")
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"engines")] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StateRefused) as refused:
        DurableSink(core(), tmp_path, 1000.0)
    assert refused.value.reason == "state_damaged"
    assert path.read_bytes() == damaged
    with pytest.raises(StateRefused) as refused:
        DurableSink(core(), Path("/proc/none"), 1000.0)
    assert refused.value.reason == "state_unusable"


def test_a_boot_that_was_forgotten_still_cannot_be_counted_twice():
    """Merged, never acknowledged, cut off for hours: the engine sends it again when it is back."""
    made = Core(watchlist(FEATURES))
    steps = batches(2)
    made.ingest.hello(hello(), 1000.0)
    run(made.ingest, steps)
    made.ingest.goodbye(hello(), 1100.0)
    made.ingest.tick(90_000.0)
    assert made.lookup.snapshot(0).replicas == ()
    assert made.ingest.hello(hello(), 90_001.0) == len(steps)


def test_a_clock_that_was_set_ends_no_request_and_keeps_none_for_ever():
    made = Core(watchlist(FEATURES))
    made.ingest.hello(hello(), 1000.0)
    made.ingest.observe(hello(), received(1, batches(3)[0]), 1000.0)
    opened = made.lookup.snapshot(0).engines[0].open_requests
    assert opened
    made.ingest.shift_clock(86_400.0)
    made.ingest.tick(1001.0 + 86_400.0)
    assert made.lookup.snapshot(0).engines[0].open_requests == opened
    made.ingest.tick(1001.0 + 86_400.0 + made.bounds.request_idle_seconds)
    assert made.lookup.snapshot(0).engines[0].open_requests == 0
