"""What lies on disks between two lives of a process: spools, recordings, states, evidence."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sqlite3
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from latentwatch.collector.config import Bounds
from latentwatch.collector.core import Core
from latentwatch.collector.durability import checkpoint, schema
from latentwatch.collector.durability.journal import DurableSink
from latentwatch.evidence.archive import Archive, Wanted
from latentwatch.transport import codec, recording
from latentwatch.transport.recording import RecordingSink
from latentwatch.transport.spool import SpoolFolder, SpoolSettings

from tests.fuzz.targets.documents import FEATURES
from tests.fuzz.targets.target import Target, bundle, files_of, put, scratch
from tests.support.evidence import one_request, store
from tests.support.streams import Schedule, hello, received, tokens, watchlist
from tests.support.wire import batch, same

_HELLO = hello()
_OTHER_BOOT = "1" * 32
_BOUNDS = Bounds(open_requests=16, closed_requests=32, flagged_requests=16, exceedances=64, replicas=4, windows=4)


def _core() -> Core:
    return Core(watchlist(FEATURES), _BOUNDS)


def _spool(data: bytes) -> None:
    root = scratch() / "spool"
    folder = root / "pod-0%2F0" / _HELLO.boot_id
    shutil.rmtree(root, ignore_errors=True)
    folder.mkdir(parents=True)
    segment, second, mark = files_of(data, 3)
    for name, content in (("000000000001.spool", segment), ("000000000002.spool", second), ("acked", mark)):
        put(folder / name, content)
    reads = []
    for _ in range(2):
        shared = SpoolFolder(SpoolSettings(root), _HELLO.replica)
        found = []
        for spool in shared.earlier(_OTHER_BOOT):
            reader = spool.reader(spool.acked)
            found += list(iter(reader.read, None))
            reader.close()
            spool.close()
        reads.append((found, shared.refused))
    assert reads[0][0] == reads[1][0]


@cache
def _spool_seeds() -> Sequence[bytes]:
    root = scratch() / "spool-seed"
    spool = SpoolFolder(SpoolSettings(root), _HELLO.replica).open(_HELLO)
    for sequence in (1, 2, 3):
        spool.append(sequence, 9, codec.encode_batch(sequence, batch(sequence, rows=2, fires=1)))
    spool.close()
    (segment,) = root.rglob("*.spool")
    mark = b"\1\0\0\0\0\0\0\0"

    return [
        bundle(segment.read_bytes()),
        bundle(segment.read_bytes(), b"", mark + zlib.crc32(mark).to_bytes(4, "little")),
    ]


def _recording(data: bytes) -> None:
    path, again = scratch() / "r.recording", scratch() / "again.recording"
    path.write_bytes(data)
    found = list(recording.read(path))
    again.unlink(missing_ok=True)
    sink = RecordingSink(again)
    for one in found:
        sink.hello(one.hello, one.seconds)
        sink.observe(one.hello, one.received, one.seconds)
    sink.close()
    heard = list(recording.read(again))
    # One that came twice is written once.
    assert len(heard) <= len(found)
    if len(heard) == len(found):
        assert all(same(one.received.batch, other.received.batch) for one, other in zip(found, heard, strict=True))


@cache
def _recording_seeds() -> Sequence[bytes]:
    path = scratch() / "seed.recording"
    sink = RecordingSink(path)
    sink.hello(_HELLO, 1000.0)
    for sequence in (1, 2):
        made = batch(sequence, rows=2, fires=1)
        sink.observe(_HELLO, codec.decode_request(codec.encode_batch(sequence, made)), 1000.0)  # type: ignore[arg-type]  # a batch
    sink.close()
    return [path.read_bytes()]


@cache
def _lived() -> Core:
    """A core in which something happened."""
    core, rng = _core(), np.random.default_rng(0)
    requests = [tokens(rng, FEATURES, handle=i, total=12, prompt_tokens=4) for i in range(1, 4)]
    core.ingest.hello(_HELLO, 1000.0)
    for sequence, made in enumerate(Schedule.random(rng, requests, 9).batches(FEATURES), start=1):
        core.ingest.observe(_HELLO, received(sequence, made), 1000.0)
    return core


def _text(core: Core) -> str:
    tree, arrays = schema.to_tree(core.state())
    return json.dumps(tree) + repr({name: array.tobytes() for name, array in arrays.items()})


def _checkpoint(data: bytes) -> None:
    path = scratch() / "checkpoint.npz"
    path.write_bytes(data)
    state = checkpoint.read(path, {"a": 1})
    core = _core()
    with contextlib.suppress(ValueError, IndexError):  # which DurableSink names as damage
        core.restore(state)
        checkpoint.write(path, {"a": 1}, core.state())
        again = _core()
        again.restore(checkpoint.read(path, {"a": 1}))
        assert _text(again) == _text(core)


@cache
def _checkpoint_seeds() -> Sequence[bytes]:
    path = scratch() / "seed.npz"
    checkpoint.write(path, {"a": 1}, _lived().state())
    return [path.read_bytes()]


@cache
def _journal_folder() -> tuple[Path, str, bytes]:
    """A state's folder without its journal, that journal's name, and what stood in it."""
    root = scratch() / "state-seed"
    sink = DurableSink(_core(), root, 1000.0)
    sink.hello(_HELLO, 1000.0)
    rng = np.random.default_rng(0)
    requests = [tokens(rng, FEATURES, handle=i, total=6, prompt_tokens=2) for i in range(1, 3)]
    for sequence, made in enumerate(Schedule.random(rng, requests, 5).batches(FEATURES), start=1):
        sink.observe(_HELLO, received(sequence, made), 1000.0)
        sink.tick(1000.0 + sequence)
    sink.refused("http_slow")
    sink.goodbye(_HELLO, 1001.0)
    sink.commit()
    journal = max(root.rglob("journal-*.log"))
    content = journal.read_bytes()
    copied = scratch() / "state-base"
    shutil.copytree(root, copied)
    return copied, str(journal.relative_to(root)), content


def _journal(data: bytes) -> None:
    base, name, _ = _journal_folder()
    root = scratch() / "state"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    (root / name).write_bytes(data)
    core = _core()
    sink = DurableSink(core, root, 2000.0)
    sink.close(2000.0)
    again = _core()
    DurableSink(again, root, 2000.0).close(2000.0)
    assert _text(again) == _text(core)


def _evidence(data: bytes) -> None:
    folder = scratch() / "evidence"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _, name, _ = _evidence_seed()
    (folder / name).write_bytes(data)
    # As documented, an error of SQLite's is one of the answers.
    with contextlib.closing(Archive(folder)) as archive, contextlib.suppress(sqlite3.Error):
        json.dumps([*itertools.islice(archive.requests(), 8)], default=vars)
        archive.exceedances(Wanted("jailbreak", None, "toy", 0.0, None), 10)
        list(itertools.islice(archive.ended("toy"), 8))
        archive.watchlists()


@cache
def _evidence_seed() -> tuple[Path, str, bytes]:
    folder = scratch() / "evidence-seed"
    folder.mkdir()
    with store(folder) as written:
        for number in (1, 2):
            written.write(one_request(number, activations=5, exceedances=2), 1_763_800_000.0)
    (path,) = (path for path in folder.iterdir() if path.suffix == ".evidence" or path.name[:4] == "2025")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("VACUUM")
    return folder, path.name, path.read_bytes()


DISK = [
    Target("spool", _spool, _spool_seeds, ("transport/spool.py", "transport/spool_segments.py", "storage.py")),
    Target("recording", _recording, _recording_seeds, ("transport/recording.py", "storage.py")),
    Target(
        "checkpoint",
        _checkpoint,
        _checkpoint_seeds,
        ("collector/durability/checkpoint.py", "collector/durability/schema.py", "arrays.py"),
    ),
    Target(
        "journal",
        _journal,
        lambda: [_journal_folder()[2]],
        ("collector/durability/journal.py", "collector/ingest.py", "collector/replicas.py", "storage.py"),
    ),
    Target(
        "evidence segment",
        _evidence,
        lambda: [_evidence_seed()[2]],
        ("evidence/archive.py", "evidence/segment.py", "evidence/store.py"),
    ),
]
