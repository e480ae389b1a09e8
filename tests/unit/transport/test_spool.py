"""The spool: what is read back after a crash, a full disk, damage; and the sender that stands before it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.errors import ConfigRefused, StreamRefused
from latentwatch.exporter.backlog import BacklogDelivery
from latentwatch.transport import codec, spool
from latentwatch.transport.channel import Backoff
from latentwatch.transport.sender import Sender
from latentwatch.transport.spool import Spool, SpoolFolder, SpoolSettings
from latentwatch.transport.spooled import Spooled

from tests.support.wire import FakeSink, ServerThread, batch, eventually, hello, same, tokens

FAST = Backoff(first_seconds=0.01, longest_seconds=0.05, refused_seconds=0.05)
HERE, BEFORE = "0" * 32, "b" * 32
MESSAGES = [codec.encode_batch(number, batch(number, rows=number % 4)) for number in range(1, 31)]


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def folder(path: Path, *, max_bytes: int = 1 << 20, clock: Clock | None = None) -> SpoolFolder:
    return SpoolFolder(SpoolSettings(path, max_bytes, sync_seconds=0), "pod-0/0", clock=clock or Clock())


def write(made: Spool, *numbers: int) -> list[bool]:
    return [made.append(number, 9, MESSAGES[number - 1]) for number in numbers]


def read(made: Spool, after: int = 0) -> list[Spooled]:
    reader = made.reader(after)
    found = list(iter(reader.read, None))
    reader.close()
    return found


def numbers(made: Spool, after: int = 0) -> list[int]:
    return [found.sequence for found in read(made, after)]


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*/*/*.spool"))


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_SEGMENT_BYTES", 1000)


def test_what_was_appended_is_read_back_in_order_and_unchanged(tmp_path, small_segments):
    made = folder(tmp_path).open(hello())
    assert all(write(made, *range(1, 31)))
    assert len(segments(tmp_path)) > 3
    assert read(made) == [Spooled(number, 9, MESSAGES[number - 1]) for number in range(1, 31)]
    assert numbers(made, after=17) == list(range(18, 31))
    assert (made.last, made.empty) == (30, False)


def test_only_its_user_can_read_it(tmp_path):
    made = folder(tmp_path / "new").open(hello())
    write(made, 1)
    made.release(1)
    for path in (tmp_path / "new").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    made.close()


def test_a_reader_finds_what_is_appended_later(tmp_path, small_segments):
    made = folder(tmp_path).open(hello())
    reader = made.reader(0)
    for number in range(1, 31):
        assert reader.read() is None and not reader.behind
        write(made, number)
        assert reader.behind
        assert reader.read().sequence == number


def test_what_is_acknowledged_gives_its_room_back_and_the_rest_stays(tmp_path, small_segments):
    shared = folder(tmp_path)
    made = shared.open(hello())
    write(made, *range(1, 31))
    whole = shared.bytes
    made.release(20)
    assert shared.bytes < whole and shared.bytes == sum(path.stat().st_size for path in segments(tmp_path))
    assert numbers(made, after=made.acked) == list(range(21, 31))
    made.release(30)
    made.close()
    assert not list(tmp_path.glob("*/*")), "the last one takes the boot's folder with it"
    assert shared.bytes == 0


def test_the_next_exporter_of_the_same_boot_goes_on_from_what_is_acknowledged(tmp_path, small_segments):
    first = folder(tmp_path).open(hello())
    write(first, *range(1, 11))
    first.release(4)
    first.close()
    second = folder(tmp_path).open(hello())
    assert (second.acked, second.last, second.waiting_tokens) == (4, 10, 6 * 9)
    assert write(second, 11, 12) == [True, True]
    assert numbers(second, after=second.acked) == list(range(5, 13))


def test_two_processes_do_not_write_one_boot(tmp_path):
    first = folder(tmp_path).open(hello())
    clock = Clock()
    shared = folder(tmp_path, clock=clock)
    second = shared.open(hello())
    assert not second.locked and write(second, 1) == [False] and shared.failures == 1
    assert shared.in_use(BEFORE)
    first.close()
    clock.seconds += 10
    assert write(second, 1) == [True], "the first one left"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_crash_at_any_byte_leaves_a_prefix_of_what_was_written(data):
    """Of a segment, or of all of them: the file ends wherever the system had got to."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        path = Path(name)
        patched.setattr(spool, "_SEGMENT_BYTES", data.draw(st.sampled_from([500, 5000, 1 << 20]), label="segment"))
        made = folder(path).open(hello())
        count = data.draw(st.integers(0, 12), label="batches")
        write(made, *range(1, count + 1))
        made.close()
        files = segments(path)
        if files:
            last = files[-1]
            os.truncate(last, data.draw(st.integers(0, last.stat().st_size), label="bytes left"))
        shared = folder(path)
        again = shared.open(hello())
        found = read(again)
        assert found == [Spooled(number, 9, MESSAGES[number - 1]) for number in range(1, len(found) + 1)]
        assert shared.refused == 0, "a torn end is no damage"
        assert write(again, 20, 21) == [True, True]
        assert numbers(again)[len(found) :] == [20, 21]
        again.close()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_byte_never_yields_another_batch(data):
    """What is read is what was written, without the damaged batch and those behind it in its segment."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        path = Path(name)
        patched.setattr(spool, "_SEGMENT_BYTES", 1500)
        made = folder(path).open(hello())
        write(made, *range(1, 13))
        made.close()
        victim = data.draw(st.sampled_from(segments(path)), label="segment")
        content = bytearray(victim.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1), label="at")
        content[at] ^= data.draw(st.integers(1, 255), label="bits")
        victim.write_bytes(content)
        shared = folder(path)
        again = shared.open(hello())
        found = read(again)
        again.close()
        written = [Spooled(number, 9, MESSAGES[number - 1]) for number in range(1, 13)]
        assert [one for one in written if one in found] == found
        assert len(found) < 12


def test_damage_that_comes_while_it_is_open_is_refused_and_what_follows_in_other_segments_is_read(
    tmp_path, small_segments, caplog
):
    shared = folder(tmp_path)
    made = shared.open(hello())
    write(made, *range(1, 31))
    victim = segments(tmp_path)[1]
    with victim.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\0\0\0")
    found = numbers(made)
    assert len(found) == 29 and found[0] == 1 and found[-1] == 30
    assert shared.refused == 1 and victim.name in caplog.text
    made.release(30)
    assert made.empty


@pytest.mark.parametrize("name", ["notes.txt", "000000000001.spool"])
def test_a_foreign_file_is_refused_by_name_and_left_alone(tmp_path, caplog, name):
    boot = tmp_path / "pod-0%2F0" / HERE
    boot.mkdir(parents=True)
    (boot / name).write_text("shopping list")
    shared = folder(tmp_path)
    made = shared.open(hello())
    assert shared.refused == 1 and str(boot / name) in caplog.text
    assert write(made, 1, 2) == [True, True] and numbers(made) == [1, 2]
    made.release(2)
    made.close()
    assert (boot / name).read_text() == "shopping list"


def test_a_spool_of_another_boot_is_refused_where_it_was_put(tmp_path):
    other = folder(tmp_path / "a").open(hello(boot_id=BEFORE))
    write(other, 1)
    other.close()
    boot = tmp_path / "b" / "pod-0%2F0" / HERE
    boot.mkdir(parents=True)
    shutil.copy(segments(tmp_path / "a")[0], boot)
    (tmp_path / "b" / "pod-0%2F0" / "tmp").mkdir()
    shared = folder(tmp_path / "b")
    assert numbers(shared.open(hello())) == []
    assert shared.refused == 1
    assert list(shared.earlier(HERE)) == []
    assert shared.refused == 2, "a folder that is no boot's"


def test_beyond_the_bound_it_takes_no_more_until_there_is_room(tmp_path, small_segments):
    shared = folder(tmp_path, max_bytes=3000)
    made = shared.open(hello())
    taken = write(made, *range(1, 31))
    held = sum(taken)
    assert 0 < held < 30 and taken == [True] * held + [False] * (30 - held)
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= 3000
    assert shared.failures == 0, "full is no failure"
    made.release(held)
    assert write(made, 30) == [True]


def test_a_disk_that_is_full_is_counted_and_tried_again(tmp_path, monkeypatch, caplog):
    clock = Clock()
    shared = folder(tmp_path, clock=clock)
    made = shared.open(hello())
    write(made, 1, 2)
    real = os.write

    def full(descriptor: int, data: Any) -> int:
        if len(data) > 20:
            return real(descriptor, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert write(made, 3, 4) == [False, False]
    assert shared.failures == 1 and "No space left" in caplog.text
    monkeypatch.undo()
    assert write(made, 5) == [False], "not yet"
    clock.seconds += 10
    assert write(made, 6) == [True]
    assert numbers(made) == [1, 2, 6]


def test_a_folder_that_cannot_be_used_costs_the_spool_only(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    clock = Clock()
    shared = folder(tmp_path / "file", clock=clock)
    made = shared.open(hello())
    assert write(made, 1) == [False] and shared.failures == 1
    assert "Not a directory" in caplog.text
    for sequence in range(1, 20):
        made.release(sequence)
    assert shared.failures == 1, "acknowledgements of what is in memory touch no disk"
    (tmp_path / "file").unlink()
    clock.seconds += 10
    assert write(made, 20) == [True], "once it can be used it is"
    made.close()


@pytest.mark.parametrize(("name", "value"), [("_MIB", "much"), ("_MIB", "0"), ("_SYNC_SECONDS", "-1"), ("_MIB", "nan")])
def test_settings_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(ConfigRefused, match=f"LATENTWATCH_SPOOL{name}: it is '{value}'"):
        SpoolSettings.from_env({"LATENTWATCH_SPOOL": "/x", f"LATENTWATCH_SPOOL{name}": value})


def test_settings_come_from_the_environment():
    assert SpoolSettings.from_env({"LATENTWATCH_SPOOL_MIB": "5"}) is None
    env = {"LATENTWATCH_SPOOL": "/x", "LATENTWATCH_SPOOL_MIB": "5", "LATENTWATCH_SPOOL_SYNC_SECONDS": "0"}
    assert SpoolSettings.from_env(env) == SpoolSettings(Path("/x"), 5 << 20, 0.0)


def test_what_is_written_is_synced_in_the_background(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    made = SpoolFolder(SpoolSettings(tmp_path, sync_seconds=0.01), "pod-0/0").open(hello())
    write(made, 1)
    eventually(lambda: len(synced) == 1)
    made.release(1)
    made.close()


# The sender before it.


@pytest.fixture
def make() -> Iterator[Callable[..., Sender]]:
    """Senders that are closed at the end of the test."""
    made: list[Sender] = []

    def make(target: str, who: Any = None, **options: Any) -> Sender:
        made.append(Sender(target, who or hello(), **({"backoff": FAST} | options)))
        return made[-1]

    yield make
    for one in made:
        one.close(0)


@pytest.fixture
def target(socket_path: Path) -> str:
    return f"unix://{socket_path}"


def test_what_was_spooled_is_sent_once_in_order_and_unchanged(make, target, tmp_path, small_segments):
    shared, sink = folder(tmp_path), FakeSink()
    made = shared.open(hello())
    one = make(target, spool=made)
    for step in range(1, 51):
        one.offer(batch(step))
    one.start()
    with ServerThread(sink, target):
        for step in range(51, 101):
            one.offer(batch(step))
        eventually(lambda: one.stats().acked == 100)
    assert sink.sequences == list(range(1, 101)) and sink.duplicates == 0
    assert all(same(value, batch(value.step)) for _, value in sink.batches)
    stats = one.close(1)
    assert (stats.buffered_batches, stats.dropped_batches, made.empty) == (0, 0, True)


def test_an_exporter_that_dies_leaves_what_no_collector_holds_to_the_next_one(make, target, tmp_path):
    """The first collector keeps its state; of what its exporter was not told, some may be in it."""
    sink = FakeSink()
    first = folder(tmp_path).open(hello())
    one = make(target, spool=first)
    one.start()
    with ServerThread(sink, target) as server:
        for step in range(1, 21):
            one.offer(batch(step))
        eventually(lambda: one.stats().acked == 20)
        server.stop()
    for step in range(21, 41):
        one.offer(batch(step))
    one.close(0)  # as a kill, but for the thread: nothing is written on the way out
    first.close()
    made = folder(tmp_path).open(hello())
    two = make(target, spool=made, earlier=40)
    two.offer(batch(41))
    again = FakeSink(held={("pod-0/0", HERE): 25})
    with ServerThread(again, target):
        two.start()
        eventually(lambda: two.stats().acked == 41)
    assert sink.sequences + again.sequences == [*range(1, 21), *range(26, 42)]
    assert one.stats().dropped_tokens == 0


def test_while_the_disk_takes_nothing_batches_wait_in_memory_and_the_order_is_kept(make, target, tmp_path, monkeypatch):
    clock = Clock()
    made = folder(tmp_path, clock=clock).open(hello())
    one = make(target, spool=made)
    one.offer(batch(1))
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        one.offer(batch(2))
        one.offer(batch(3))
    clock.seconds += 10
    one.offer(batch(4))
    assert one.stats().buffered_batches == 2
    sink = FakeSink()
    with ServerThread(sink, target):
        one.start()
        eventually(lambda: one.stats().acked == 4)
    assert sink.steps == [1, 2, 3, 4]


def test_beyond_spool_and_memory_scores_are_shed_and_no_token_is_missing(make, target, tmp_path):
    made = folder(tmp_path, max_bytes=5000).open(hello())
    one = make(target, spool=made, max_buffer_bytes=20_000)
    offered = 0
    for step in range(1, 61):
        value = batch(step, rows=100, fires=50)
        offered += tokens(value)
        one.offer(value)
    assert one.stats().shed_batches > 0
    sink = FakeSink()
    with ServerThread(sink, target):
        one.start()
        eventually(lambda: one.stats().acked == 60)
    assert sink.steps == list(range(1, 61))
    assert sum(tokens(value) for _, value in sink.batches) + one.stats().dropped_tokens == offered


def test_a_spooled_batch_that_is_refused_again_and_again_does_not_hold_up_the_rest(make, target, tmp_path):
    sink = FakeSink()
    sink.refuse_sequences = {3}
    one = make(target, spool=folder(tmp_path).open(hello()))
    with ServerThread(sink, target):
        one.start()
        for step in range(1, 7):
            one.offer(batch(step))
        eventually(lambda: one.stats().acked == 6)
    assert sink.sequences == [1, 2, 4, 5, 6]
    assert (one.stats().refused_batches, one.stats().dropped_tokens) == (1, tokens(batch(3)))


def test_closing_without_a_collector_ends_within_its_bound_and_leaves_the_rest_on_the_disk(make, target, tmp_path):
    made = folder(tmp_path).open(hello())
    one = make(target, spool=made)
    one.start()
    for step in range(1, 11):
        one.offer(batch(step))
    begin = time.monotonic()
    stats = one.close(0.2)
    assert time.monotonic() - begin < 5, "0.2 s and about one more, on a busy machine"
    assert (stats.dropped_tokens, stats.buffered_batches) == (0, 0)
    one.offer(batch(11))
    assert one.stats().dropped_tokens == tokens(batch(11)), "what comes later is counted"
    assert numbers(made) == list(range(1, 11))


# What earlier boots left.


def left(path: Path, boot_id: str, *numbers: int) -> None:
    made = folder(path).open(hello(boot_id=boot_id))
    write(made, *numbers)
    made.close()


def test_earlier_boots_are_delivered_first_each_under_its_own_name(make, target, tmp_path):
    class Order(FakeSink):
        def __init__(self) -> None:
            super().__init__({("pod-0/0", BEFORE): 2})
            self.met: list[str] = []

        def hello(self, hello: Any, now: float) -> int:
            self.met.append(hello.boot_id)
            return super().hello(hello, now)

    left(tmp_path, "c" * 32, 1, 2)
    left(tmp_path, BEFORE, 1, 2, 3)
    shared, sink = folder(tmp_path), Order()
    live = make(target, spool=shared.open(hello()))
    live.offer(batch(1))
    with ServerThread(sink, target):
        BacklogDelivery(shared, live, HERE, lambda who, made: make(target, who, spool=made))
        eventually(lambda: live.stats().acked == 1)
    assert sink.met == ["c" * 32, BEFORE, HERE]
    assert sink.sequences == [1, 2, 3, 1]
    assert sink.held == {("pod-0/0", "c" * 32): 2, ("pod-0/0", BEFORE): 3, ("pod-0/0", HERE): 1}
    assert [path.name for path in (tmp_path / "pod-0%2F0").iterdir()] == [HERE]


def test_a_boot_that_the_collector_refuses_stays_until_its_room_is_needed(make, target, tmp_path, caplog):
    class Choosy(FakeSink):
        def hello(self, hello: Any, now: float) -> int:
            if hello.boot_id == BEFORE:
                raise StreamRefused("w", found="f", instead="i", reason="watchlist_mismatch")
            return super().hello(hello, now)

    left(tmp_path, BEFORE, 1, 2, 3)
    size = sum(path.stat().st_size for path in segments(tmp_path))
    shared, sink = folder(tmp_path, max_bytes=size + 1500), Choosy()
    made = shared.open(hello())
    live = make(target, spool=made)
    with ServerThread(sink, target):
        leftovers = BacklogDelivery(shared, live, HERE, lambda who, made: make(target, who, spool=made))
        live.offer(batch(1))
        eventually(lambda: live.stats().acked == 1)
    leftovers.stop()
    assert shared.refused == 1 and "no collector takes it (w: f. i)" in caplog.text
    assert (tmp_path / "pod-0%2F0" / BEFORE).exists() and shared.discarded_tokens == 0
    assert write(made, *range(2, 12)) == [True] * 10
    assert not (tmp_path / "pod-0%2F0" / BEFORE).exists() and shared.discarded_tokens == 27


def test_an_engine_without_leftovers_starts_at_once_and_a_stop_leaves_them(make, target, tmp_path):
    left(tmp_path, BEFORE, 1)
    shared = folder(tmp_path)
    live = make(target, spool=shared.open(hello()))
    leftovers = BacklogDelivery(shared, live, HERE, lambda who, made: make(target, who, spool=made))
    leftovers.stop()  # nobody listens there
    assert live._thread is not None
    live.close(0)
    assert [numbers(made) for made in folder(tmp_path).earlier(HERE)] == [[1]]


def test_rare_trouble_is_logged_rarely(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    clock = Clock()
    (tmp_path / "file").write_text("")
    made = folder(tmp_path / "file", clock=clock).open(hello())
    for _ in range(20):
        clock.seconds += 10
        write(made, 1)
    assert len(caplog.records) == 1
