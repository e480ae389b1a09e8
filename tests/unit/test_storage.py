"""What has to be whole on a disk: whatever is cut off, flipped or refused, what is read is what was written."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.errors import BaselineRefused
from latentwatch.storage import FramedLog, FrameReader, Framing, HashedArtifact, Tail, atomic_write, lock_folder

HEAD = b"a log 1\n"
FRAMINGS = [Framing(), Framing("IQ", max_body_bytes=1000), Framing("dI", covered=False, max_body_bytes=1000)]
FIELDS: list[tuple[Any, ...]] = [(), (7, 1 << 40), (0.5, 3)]
BODIES = st.lists(st.binary(min_size=1, max_size=40), max_size=8)


def write(path: Path, kind: int, bodies: list[bytes]) -> None:
    log = FramedLog(path, FRAMINGS[kind], HEAD)
    for body in bodies:
        log.put(body, *FIELDS[kind])
        log.commit()
    assert log.size == path.stat().st_size
    log.close()


def read(path: Path, kind: int) -> tuple[list[tuple[Any, bytes]], Tail, int]:
    with path.open("rb") as file:
        reader = FrameReader(file, FRAMINGS[kind], len(HEAD))
        return [(frame.fields, frame.body) for frame in reader], reader.tail, reader.at


@settings(max_examples=200, deadline=None)
@given(kind=st.integers(0, 2), bodies=BODIES, share=st.floats(0, 1))
def test_a_log_that_ends_at_any_byte_reads_as_the_frames_before_it_and_is_torn(kind, bodies, share):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        write(path, kind, bodies)
        size = len(HEAD) + int(share * (path.stat().st_size - len(HEAD)))
        os.truncate(path, size)
        found, tail, at = read(path, kind)
        assert found == [(FIELDS[kind], body) for body in bodies[: len(found)]]
        assert tail is (Tail.END if at == size else Tail.TORN)
        assert size - at < FRAMINGS[kind].head_bytes + 40, "not one frame that was whole is left out"


@settings(max_examples=300, deadline=None)
@given(kind=st.integers(0, 1), bodies=BODIES.filter(bool), data=st.data())
def test_a_flipped_byte_ends_a_log_and_never_reads_as_something_else(kind, bodies, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        write(path, kind, bodies)
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(len(HEAD), len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        found, tail, _ = read(path, kind)
        assert len(found) < len(bodies) and tail is not Tail.END
        assert found == [(FIELDS[kind], body) for body in bodies[: len(found)]]


@settings(max_examples=100, deadline=None)
@given(bodies=BODIES.filter(bool), data=st.data())
def test_fields_before_the_checksum_can_change_and_bodies_cannot(bodies, data):
    """So recordings are: a time that was changed is not noticed, a message that was changed is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        write(path, 2, bodies)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(len(HEAD), len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        found, _, _ = read(path, 2)
        assert [body for _, body in found] == bodies[: len(found)]


def test_a_hole_in_a_file_is_no_frame(tmp_path):
    """What some filesystems leave of a file that had grown when the host lost power."""
    for kind in range(3):
        path = tmp_path / str(kind)
        write(path, kind, [b"one"])
        with path.open("ab") as file:
            file.write(bytes(100))
        assert read(path, kind)[:2] == ([(FIELDS[kind], b"one")], Tail.DAMAGED)


def test_a_log_is_not_begun_over_another_one_unless_it_is_said(tmp_path):
    path = tmp_path / "log"
    write(path, 0, [b"one"])
    with pytest.raises(FileExistsError):
        FramedLog(path, FRAMINGS[0], HEAD)
    assert read(path, 0)[0] == [((), b"one")]
    FramedLog(path, FRAMINGS[0], HEAD, replace=True).close()
    assert path.read_bytes() == HEAD and path.stat().st_mode & 0o777 == 0o600


def short(limit: int, *, fails: bool) -> Callable[[int, Any], int]:
    """A disk that takes so many bytes at once, and where `fails`, then none."""
    real, room = os.write, [limit]

    def write(descriptor: int, data: Any) -> int:
        if fails and not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(len(data), room[0] or limit)
        room[0] -= taken if fails else 0
        return real(descriptor, data[:taken])

    return write


def test_a_disk_that_takes_little_at_a_time_gets_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", short(3, fails=False))
    write(tmp_path / "log", 1, [b"one", b"two"])
    assert [body for _, body in read(tmp_path / "log", 1)[0]] == [b"one", b"two"]


@pytest.mark.parametrize("room", [1, 5, 20])
@pytest.mark.parametrize("truncates", [True, False])
def test_what_a_full_disk_did_not_take_is_not_there_and_the_next_commit_brings_it(
    tmp_path, monkeypatch, room, truncates
):
    log = FramedLog(tmp_path / "log", FRAMINGS[1], HEAD)
    log.put(b"before", 7, 1 << 40)
    log.commit()
    log.put(b"during", 7, 1 << 40)
    with monkeypatch.context() as full:
        full.setattr(os, "write", short(room, fails=True))
        if not truncates:
            full.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        for _ in range(2):
            with pytest.raises(OSError):
                log.commit()
    assert [body for _, body in read(tmp_path / "log", 1)[0]] == [b"before"]
    log.put(b"after", 7, 1 << 40)
    log.commit()
    assert [body for _, body in read(tmp_path / "log", 1)[0]] == [b"before", b"during", b"after"]
    assert log.size == (tmp_path / "log").stat().st_size


def test_a_log_that_cannot_be_begun_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", short(3, fails=True))
    with pytest.raises(OSError, match="No space"):
        FramedLog(tmp_path / "log", FRAMINGS[0], HEAD)
    assert not list(tmp_path.iterdir())


def test_a_duplicate_is_synced_after_the_log_was_closed_and_takes_nothing_of_what_was_put(tmp_path):
    log = FramedLog(tmp_path / "log", FRAMINGS[0], HEAD)
    log.put(b"one")
    other = log.duplicate()
    log.close()
    log.close()
    other.sync()
    other.commit()
    other.close()
    assert (tmp_path / "log").read_bytes() == HEAD


# Locks.


def test_a_folder_is_locked_once_until_it_is_released(tmp_path):
    lock = lock_folder(tmp_path)
    assert lock is not None and lock_folder(tmp_path) is None
    assert lock_folder(tmp_path, "other.lock") is not None
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
    lock.release()
    again = lock_folder(tmp_path)
    assert again is not None
    again.release()
    with pytest.raises(FileNotFoundError):
        lock_folder(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_lock_goes_with_a_process_that_is_killed(tmp_path):
    code = "import sys, time, pathlib; from latentwatch.storage import lock_folder as lock"
    code += "; held = lock(pathlib.Path(sys.argv[1])); print(held is not None, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        assert lock_folder(tmp_path) is None
        other.send_signal(signal.SIGKILL)
    lock = lock_folder(tmp_path)
    assert lock is not None
    lock.release()


def test_a_file_system_without_locks_is_an_error_and_no_marker_takes_their_place(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with monkeypatch.context() as without:
        without.setattr(fcntl, "flock", flock)
        for _ in range(2):
            with pytest.raises(OSError) as refused:
                lock_folder(tmp_path)
            assert refused.value.errno == errno.ENOSYS
    lock = lock_folder(tmp_path)
    assert lock is not None
    lock.release()


# Files that are replaced.


def failing(name: str, number: int) -> Callable[..., Any]:
    """os.NAME, which fails at its call of this number."""
    real, calls = getattr(os, name), [0]

    def call(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            raise OSError(errno.EIO, "broken")
        return real(*args, **more)

    return call


@pytest.mark.parametrize(
    ("name", "number", "content"),
    [
        ("fsync", 1, b"old"),
        ("replace", 1, b"old"),
        ("open", 1, b"old"),
        ("open", 2, b"new"),
        ("fsync", 2, b"new"),
        ("fsync", 3, b"new"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_at_any_step_leaves_the_old_file_or_the_new_one_and_no_part(
    tmp_path, monkeypatch, name, number, content, there
):
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"old")
    with monkeypatch.context() as broken:
        broken.setattr(os, name, failing(name, number))
        try:
            with atomic_write(path) as file:
                file.write(b"new")
            assert (name, number) == ("fsync", 3), "there is no third"
        except OSError as error:
            assert error.errno == errno.EIO
    if content == b"new" or there:
        assert path.read_bytes() == content
    assert {one.name for one in tmp_path.iterdir()} <= {"file"}
    assert (content == b"new" or there) == path.exists()


def test_a_writer_that_gives_up_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(tmp_path / "file") as file:
        file.write(b"ne")
        raise KeyError
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"old"]


def test_it_is_on_the_disk_before_it_takes_the_place_of_the_old_one_and_its_folder_after(tmp_path, monkeypatch):
    steps: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (steps.append(name), real(*a))[1])
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert steps == ["fsync", "replace", "fsync"]


def test_a_filesystem_that_cannot_sync_folders_is_taken_as_it_is(tmp_path, monkeypatch):
    calls = [0]

    def no_folders(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", no_folders)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


# Artifacts.

ARTIFACT = HashedArtifact(
    kind="thing",
    format="latentwatch.thing/1",
    max_bytes=10_000,
    command="latentwatch thing",
    again="Make it again.",
    refusal=BaselineRefused,
    missing="thing_missing",
    damaged="thing_format",
)
CARD = {"name": "grün", "values": [1, 2.5, None]}
TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(2, np.uint8)}


def test_an_artifact_is_read_as_it_was_written_and_its_hash_is_the_files(tmp_path):
    sha256 = ARTIFACT.write(ARTIFACT.to_bytes(CARD, TENSORS), tmp_path / "new" / "thing")
    data = ARTIFACT.read(tmp_path / "new" / "thing")
    assert subprocess.run(["sha256sum"], input=data, capture_output=True).stdout.split()[0].decode() == sha256
    card, tensors = ARTIFACT.parse(data, "thing")
    assert card == {"format": ARTIFACT.format, **CARD}
    assert {name: array.tolist() for name, array in tensors.items()} == {n: a.tolist() for n, a in TENSORS.items()}


def test_no_byte_of_an_artifact_changes_unnoticed():
    data = ARTIFACT.to_bytes(CARD, TENSORS)
    for at in range(len(data)):
        with pytest.raises(BaselineRefused) as refused:
            ARTIFACT.parse(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "thing")
        assert refused.value.reason == "thing_format"


def test_what_cannot_be_read_and_what_is_too_large_are_refused_by_name(tmp_path):
    (tmp_path / "large").write_bytes(bytes(10_001))
    for name, reason in (("none", "thing_missing"), ("large", "thing_format")):
        with pytest.raises(BaselineRefused, match=f"thing {tmp_path / name}: .*'latentwatch thing' wrote") as refused:
            ARTIFACT.read(tmp_path / name)
        assert refused.value.reason == reason


@settings(max_examples=200, deadline=None)
@given(
    kind=st.integers(0, 2), bodies=st.lists(st.binary(min_size=1, max_size=40), min_size=2, max_size=8), data=st.data()
)
def test_a_length_that_points_past_the_end_is_damage_where_a_whole_frame_stands_behind_it(kind, bodies, data):
    """And no torn end: that would leave out all that follows without a word."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        write(path, kind, bodies)
        flipped = data.draw(st.integers(0, len(bodies) - 2))
        content = bytearray(path.read_bytes())
        sizes = [FRAMINGS[kind].head_bytes + len(body) for body in bodies]
        length = len(HEAD) + sum(sizes[:flipped]) + (12 if kind == 2 else 0)
        content[length + 1] ^= 2  # 512 more than the file has, and no more than a body may
        path.write_bytes(content)
        found, tail, at = read(path, kind)
        assert tail is Tail.DAMAGED and at == len(HEAD) + sum(sizes[:flipped])
        assert found == [(FIELDS[kind], body) for body in bodies[:flipped]]


def test_a_large_torn_frame_is_told_from_damage_in_some_tenths_of_a_second(tmp_path):
    rng = np.random.default_rng(0)
    framing = Framing(max_body_bytes=4 << 20)
    for name, body in (("random", rng.bytes(4 << 20)), ("zeros", bytes(4 << 20)), ("small", b"\x01\0\0\0" * (1 << 20))):
        log = FramedLog(tmp_path / name, framing)
        log.put(body)
        log.commit()
        log.close()
        os.truncate(tmp_path / name, (4 << 20) - 10)
        with (tmp_path / name).open("rb") as file:
            reader, began = FrameReader(file, framing), time.process_time()
            assert not list(reader) and reader.tail is Tail.TORN
            assert time.process_time() - began < 5
