"""A collector that dies at any operation on its disk: the process, or the host with what was not synced.

One run is repeated with a death before each of its operations. What comes back is compared with a run without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch.collector.config import Bounds
from latentwatch.collector.core import Core
from latentwatch.collector.durability.journal import DurableSink
from latentwatch.evidence.records import Ended, Exceeded, Record
from latentwatch.watchlist.file import Limit

from tests.support.streams import Schedule, hello, probe, received, sparse, tokens, watchlist

FEATURES = (sparse("jailbreak", limit=Limit("max", 0.5)), sparse("weather"), probe("mood", limit=Limit("max", 0.5)))
_RNG = np.random.default_rng(7)
BATCHES = Schedule.random(
    _RNG, [tokens(_RNG, FEATURES, handle=i, total=60, prompt_tokens=2) for i in range(1, 13)], 9
).batches(FEATURES)


class Killed(BaseException):
    """No handler of ours is run by a SIGKILL, so none must catch it."""


class Disk:
    """Counts what is done to files under a folder, dies before the operation `dies_at`, and knows what is synced."""

    def __init__(self, folder: Path, dies_at: int, failure: Callable[[], BaseException] = Killed) -> None:
        self.folder = folder
        self._failure = failure
        self.dies_at = dies_at
        self.done = 0
        self._content: dict[int, bytes] = {}
        """Synced bytes by inode."""
        self._names: dict[Path, dict[str, int]] = {}
        """Synced names of each folder: the inode of each."""

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patched:
            for owner, name in (
                (os, "write"),
                (os, "fsync"),
                (os, "fdatasync"),
                (os, "ftruncate"),
                (Path, "unlink"),
                (Path, "rename"),
                (Path, "replace"),
            ):
                patched.setattr(owner, name, self._counted(name, getattr(owner, name)))
            yield

    def _counted(self, name: str, done: Callable[..., Any]) -> Callable[..., Any]:
        def operation(where: Any, *rest: Any, **options: Any) -> Any:
            if not self._is_here(where):
                return done(where, *rest, **options)
            if self.done == self.dies_at:
                if name == "write":
                    done(where, rest[0][: len(rest[0]) // 2])
                raise self._failure()
            self.done += 1
            found = done(where, *rest, **options)
            if name in ("fsync", "fdatasync"):
                self._synced(where)
            return found

        return operation

    def _is_here(self, where: Any) -> bool:
        path = where if isinstance(where, Path) else Path(f"/proc/self/fd/{where}").readlink()
        return self.folder in (path, *path.parents)

    def _synced(self, descriptor: int) -> None:
        path, inode = Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_ino
        if path.is_dir():
            self._names[path] = {one.name: one.stat().st_ino for one in path.iterdir()}
        else:
            self._content[inode] = path.read_bytes()

    def lose_power(self) -> None:
        """Leave what was synced: names as their folder had them then, files with what they held then."""
        for folder in [path for path in self.folder.iterdir() if path.is_dir()]:
            shutil.rmtree(folder)
            folder.mkdir()
            for name, inode in self._names.get(folder, {}).items():
                (folder / name).write_bytes(self._content.get(inode, b""))


class Evidence:
    """The queue before a disk: what waits dies with the process, what is written stays."""

    def __init__(self, stored: list[Record]) -> None:
        self.stored = stored
        self._waiting: list[Record] = []

    def put(self, records: Any) -> None:
        self._waiting += records

    def written(self) -> Future[None]:
        self.stored += self._waiting
        self._waiting.clear()
        done: Future[None] = Future()
        done.set_result(None)
        return done


class Life:
    """A collector with its disk, from a start to its death or its stop."""

    def __init__(self, folder: Path, stored: list[Record]) -> None:
        self.evidence = Evidence(stored)
        self.core = Core(watchlist(FEATURES), Bounds(open_requests=16), evidence=[self.evidence.put])
        known = "evidence_written" in inspect.signature(DurableSink.__init__).parameters
        self.sink = DurableSink(
            self.core, folder, 1000.0, **({"evidence_written": self.evidence.written} if known else {})
        )
        self.acknowledged = self.safe = 0

    def run(self) -> None:
        held = self.sink.hello(hello(), 1000.0)
        self.sink.commit()
        for sequence, batch in enumerate(BATCHES[held:], start=held + 1):
            now = 1000.0 + sequence
            self.sink.observe(hello(), received(sequence, batch), now)
            self.sink.commit()
            self.acknowledged = sequence
            if sequence % 3 == 0:
                self.sink.tick(now)
            if sequence % 4 == 0:
                # Every second one is due for a checkpoint, the others sync.
                asyncio.run(self.sink.maintain(now + 100.0 * (sequence % 8 == 0)))
                self.safe = sequence
        self.sink.close(2000.0)
        self.evidence.written()


def counted(core: Core) -> Any:
    shown = core.lookup.snapshot(0.0)
    return (
        [(engine.tokens.tolist(), engine.requests) for engine in shown.engines],
        [(m.fired_F.tolist(), m.exceedances_F.tolist(), m.requests_F.tolist()) for m in shown.models],
        shown.collector.lost_sequences,
        shown.collector.duplicates,
    )


def exceeded(stored: list[Record]) -> set[tuple[str, int]]:
    return {(one.request.info.request_id, one.exceedance.feature) for one in stored if isinstance(one, Exceeded)}


def ended(stored: list[Record]) -> set[str]:
    return {one.request.info.request_id for one in stored if isinstance(one, Ended)}


def died(disk: Disk, folder: Path, stored: list[Record]) -> Life | None:
    """A life with a death in it; None where it came to its end before."""
    life = None
    with disk.watched():
        try:
            life = Life(folder, stored)
            life.run()
            return None
        except Killed:
            pass
    if life is not None:
        if life.sink._journal is not None:
            life.sink._journal.close()
        (life.sink._folder.release if hasattr(life.sink._folder, "release") else life.sink._lock.release)()
        return life
    return Life.__new__(Life)


def test_a_process_that_is_killed_before_any_operation_on_its_disk_loses_neither_counts_nor_evidence(tmp_path):
    whole: list[Record] = []
    (tmp_path / "whole").mkdir()
    reference = Life(tmp_path / "whole", whole)
    reference.run()
    assert len(exceeded(whole)) >= 10 and len(ended(whole)) >= 5, "else this shows nothing"
    for at in range(1000):
        folder, stored = tmp_path / f"{at}", list[Record]()
        folder.mkdir()
        life = died(Disk(folder, at), folder, stored)
        if life is None:
            break
        again = Life(folder, stored)
        again.run()
        assert counted(again.core) == counted(reference.core), f"death before operation {at}"
        assert exceeded(stored) == exceeded(whole), f"death before operation {at}"
        assert ended(stored) == ended(whole), f"death before operation {at}"
    assert at > 40, "every operation was tried"


def test_a_host_that_loses_power_before_any_operation_loses_what_came_since_the_last_sync_and_no_more(tmp_path):
    for at in range(1000):
        folder, stored = tmp_path / f"{at}", list[Record]()
        folder.mkdir()
        disk = Disk(folder, at)
        life = died(disk, folder, stored)
        if life is None:
            break
        disk.lose_power()
        again = Life(folder, stored)
        held = again.sink.hello(hello(), 3000.0)
        assert getattr(life, "safe", 0) <= held <= len(BATCHES), f"death before operation {at}"
        again.sink.close(3001.0)
    assert at > 40, "every operation was tried"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_operation_and_works_again_costs_nothing_once_it_does(tmp_path, code):
    """The same places, with an error instead of a death: what was acknowledged is in memory, and then on the disk."""
    for at in range(1000):
        folder, stored = tmp_path / f"{at}", list[Record]()
        folder.mkdir()
        disk = Disk(folder, at, lambda: OSError(code, os.strerror(code)))
        with disk.watched():
            life = Life(folder, stored)
            held = life.sink.hello(hello(), 1000.0)
            for sequence, batch in enumerate(BATCHES[held:], start=held + 1):
                life.sink.observe(hello(), received(sequence, batch), 1000.0 + sequence)
                life.sink.commit()
                if sequence % 4 == 0:
                    asyncio.run(life.sink.maintain(1000.0 + sequence + 100.0))
        asyncio.run(life.sink.maintain(9e9))
        assert life.sink.facts.durable
        life.sink._journal.close()
        life.sink._folder.release()
        again = Life(folder, stored)
        assert again.sink.hello(hello(), 3000.0) == len(BATCHES), f"an error at operation {at}"
        again.sink.close(3001.0)
        if disk.done < at:
            break
    assert at > 25, "every operation was tried"
