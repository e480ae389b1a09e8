"""A collector's state on a disk: what was acknowledged is still counted, once, after the process was killed.

Two kinds of files, each pair with a number. `checkpoint-N.npz` is the whole state at one moment. `journal-N.log` is
every event since then, with the time that the collector was given, in the order in which it took them. To resume is to
read the newest checkpoint and to hand the collector the events of the journals after it: its result depends on nothing
else. A new pair begins every minute or every 64 MiB, and the older one is removed once the new checkpoint is safe.

What survives. Events are written (not synced) before they are acknowledged, so the death of the process costs nothing;
they are synced once a second, so the death of the host costs the acknowledged events of about that second, which show
up as a gap in the sequence numbers. Of a journal whose end is torn or damaged everything before that place counts; one
that is damaged is set aside, see `folder`. So is a damaged checkpoint: the one before it counts where it is still
there, else the collector begins at zero, and says so. No file stops it.

The order in which files come and go: evidence is written once the journal has the events that gave it, so that a killed
collector finds none of a batch that it is sent again; a journal is removed only after the checkpoint behind it is on
the disk, and that is written only after the evidence is. So evidence that still waited in memory as a collector was
killed is made again from the journal.

A disk that is full or gone, now or as a collector starts, does not stop the monitoring: what is merged is acknowledged
as without a disk, `durable` turns false, and a new checkpoint is tried every few seconds until one succeeds and makes
up for it. A state that could not be read at the start is set aside then: the collector began at zero and says so.

A folder belongs to one process (a lock), and within it each watchlist and format has a folder of its own: a collector
that is started with another watchlist begins at zero and leaves the earlier state where it is. So does one of a version
with another format, which says in its log what it did not read.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from latentwatch import storage
from latentwatch.client_ids import IdKind
from latentwatch.collector.core import Core
from latentwatch.collector.core_state import CoreState
from latentwatch.collector.durability import checkpoint, events, schema
from latentwatch.collector.durability.folder import StateFolder
from latentwatch.collector.durability.resume import EVIDENCE_SECONDS, replay, restore
from latentwatch.collector.durability.state_facts import StateFacts
from latentwatch.errors import RefusalReason, StateRefused
from latentwatch.transport.hello import Hello
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport

log = logging.getLogger(__name__)

_CHECKPOINT_SECONDS: Final = 60.0
_JOURNAL_BYTES: Final = 64 << 20
"""Some ten seconds of 200,000 tokens/s, and about as long to read back."""
_RETRY_SECONDS: Final = 5.0
_SYNC_SECONDS: Final = 1.0
_WAIT_SECONDS: Final = 0.02
_JOURNALS_BYTES: Final = 8 * _JOURNAL_BYTES
"""Beyond it a checkpoint replaces them though the evidence is not written: the disk is for the state first."""


@dataclass(frozen=True)
class _Due:
    """A checkpoint that is to be written."""

    state: CoreState
    number: int
    seconds: float
    before: storage.FramedLog | None
    """The journal that ends where the state was taken."""
    journal: storage.FramedLog
    """The one that begins there, open once more."""
    evidence: Future[None] | None
    """Done when all evidence that was given until then is on its disk."""


class DurableSink:
    """A `transport.sink.Sink` in front of a collector's core, which writes down whatever changes it.

    Every method is called from one event loop; only the bytes of a checkpoint are written in another thread.
    """

    def __init__(
        self,
        core: Core,
        folder: Path,
        now: float,
        *,
        evidence_written: Callable[[], Future[None]] | None = None,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        """Resume from what the folder holds, or begin in it.

        Args:   core: has seen nothing yet.   now: seconds since the Unix epoch.   evidence_written: what is done once
                all evidence that the core gave until now is on a disk; None where it gives none.   committed: called
                whenever the journal has all that the core was given, or cannot have it.
        Raises: StateRefused: "state_in_use", "state_unusable" or "state_header".
        """
        self._core = core
        self._ingest = core.ingest
        self._header = {
            "format": schema.FORMAT,
            "schema": schema.fingerprint(),
            "watchlist_sha256": core.watchlist.sha256,
            "bounds": dataclasses.asdict(core.bounds),
        }
        self._folder = StateFolder(folder, f"{core.watchlist.sha256[:16]}-{schema.FORMAT}")
        self._evidence_written = evidence_written
        self._committed = committed
        self._names: dict[Hello, int] = {}
        self._journal: storage.FramedLog | None = None
        """None after a failure, until a checkpoint succeeds."""
        self._whole = False
        self._unread = False
        """Whether the folder may hold files that this collector did not go on from."""
        self._number, self._failures, self._resumed, self._last_error = 0, 0, 0, ""
        self._checkpoint_seconds = 0.0
        self._next_checkpoint = self._next_sync = now
        self._writing = False
        self._keeping = threading.Lock()
        try:
            self._start(folder, now)
        except BaseException:
            self._folder.release()
            raise

    def _start(self, folder: Path, now: float) -> None:
        try:
            self._folder.open()
            self._resume()
        except OSError as error:
            if storage.is_mistake(error):
                raise _unusable(folder, error) from error
            self._unread = True
            log.error(
                "the state in %s cannot be read: %s. This collector begins without what it did not read; it is set "
                "aside once the folder can be written.",
                self._folder.path,
                error.strerror or error,
            )
            self._fail(error)
        self._ingest.disconnect_all()
        if not self._unread:
            try:
                self._keep(self._begin(now))
            except OSError as error:
                self._fail(error)

    def _resume(self) -> None:
        """Put the collector where the files that can be used end. Raises OSError; StateRefused "state_header"."""
        self._number = self._folder.newest()
        number = restore(self._core, self._folder, lambda path: checkpoint.read(path, self._header))
        if number is None:
            self._folder.name_other_formats(schema.FORMAT)
            return
        self._resumed = replay(self._core, self._folder, number, self._evidence_written)
        path = self._folder.file("checkpoint", number)
        log.info("resumed from %s with %d events after it", path, self._resumed)

    # -- Sink

    def hello(self, hello: Hello, now: float) -> int:
        held = self._ingest.hello(hello, now)
        self._note(events.HELLO, now, hello)
        return held

    def observe(self, hello: Hello, received: ReceivedBatch, now: float) -> None:
        self._ingest.observe(hello, received, now)
        self._note(events.BATCH, now, hello, received.message)

    def merge(self, hello: Hello, received: ReceivedReport, now: float) -> None:
        self._ingest.merge(hello, received, now)
        self._note(events.BATCH, now, hello, received.message)

    def goodbye(self, hello: Hello, now: float) -> None:
        self._ingest.goodbye(hello, now)
        self._note(events.GOODBYE, now, hello)

    def commit(self) -> None:
        """Write what was noted; on failure the state is merged but not durable, which `facts` tells."""
        if self._journal is not None:
            try:
                self._journal.commit()
            except OSError as error:
                self._fail(error)
        self._committed()

    # -- the rest of what changes a collector

    def refused(self, reason: str) -> None:
        """See Ingest.refused."""
        self._ingest.refused(reason)
        self._note(events.REFUSED, 0.0, text=reason.encode())

    def tick(self, now: float) -> None:
        """See Ingest.tick; and what was noted is written, acknowledged or not."""
        self._ingest.tick(now)
        self._note(events.TICK, now)
        self.commit()

    def acknowledged(self, number: int) -> None:
        """See Ingest.acknowledged."""
        self._ingest.acknowledged(number)
        self._note(events.ACKNOWLEDGED, 0.0, text=struct.pack("<Q", number))

    def shift_clock(self, seconds: float) -> None:
        """See Ingest.shift_clock. Due times here move along."""
        self._ingest.shift_clock(seconds)
        self._next_checkpoint += seconds
        self._next_sync += seconds
        self._note(events.SHIFT, 0.0, text=struct.pack("<d", seconds))

    # -- files

    @property
    def facts(self) -> StateFacts:
        """How well the state is kept."""
        return StateFacts(
            durable=self._whole,
            checkpoint_seconds=self._checkpoint_seconds,
            journal_bytes=self._journal.size if self._journal is not None else 0,
            write_failures=self._failures,
            resumed_events=self._resumed,
            last_error=self._last_error,
            files_aside=len(self._folder.aside()),
        )

    async def maintain(self, now: float) -> None:
        """Sync the journal, and begin a new one behind a new checkpoint when it is time. Call it once a second."""
        if self._writing:
            return
        journal = self._journal
        if now >= self._next_checkpoint or (journal is not None and journal.size > _JOURNAL_BYTES):
            await self._checkpoint(now)
        elif journal is not None and now >= self._next_sync:
            self._next_sync = now + _SYNC_SECONDS
            try:
                with contextlib.closing(journal.duplicate()) as same:
                    await asyncio.to_thread(same.sync)
            except OSError as error:
                self._fail(error)

    async def forget(self, meant: Mapping[IdKind, Sequence[str]], now: float) -> bool:
        """See Core.forget; and have the files say nothing of it any more. Returns whether they do.

        A new checkpoint takes the place of the files that tell of it. Killed before that, it is all there again. Files
        that were set aside may tell of it for ever.
        """
        while self._writing:
            await asyncio.sleep(_WAIT_SECONDS)
        self._core.forget(meant)
        return await self._checkpoint(now) and not self._folder.aside()

    def close(self, now: float) -> None:
        """Leave one checkpoint behind, so that the next start reads no journal."""
        self.commit()
        try:
            self._keep(self._begin(now))
        except OSError as error:
            self._fail(error)
        if self._journal is not None:
            self._journal.close()
        self._folder.release()

    async def _checkpoint(self, now: float) -> bool:
        """Whether it took the place of everything before it."""
        self._writing = True
        self.commit()
        try:
            return await asyncio.to_thread(self._keep, self._begin(now))
        except OSError as error:
            self._fail(error)
            self._next_checkpoint = now + _RETRY_SECONDS
            return False
        finally:
            self._writing = False

    def _begin(self, now: float) -> _Due:
        """Begin the next journal; what `_keep` is to be given. Raises OSError."""
        if self._unread:
            self._folder.open()
            self._number = max(self._number, self._folder.newest())
            self._folder.set_all_aside("it could not be read as this collector started")
            self._unread = False
        first = events.FRAMING.pack(events.EVENT.pack(events.HEADER, now, self._whole))
        path = self._folder.file("journal", self._number + 1)
        journal = storage.FramedLog(path, events.FRAMING, first, replace=True)
        before, self._journal = self._journal, journal
        self._number += 1
        self._names.clear()
        self._next_checkpoint = now + _CHECKPOINT_SECONDS
        evidence = self._evidence_written() if self._evidence_written is not None else None
        return _Due(self._core.state(), self._number, now, before, journal.duplicate(), evidence)

    def _keep(self, due: _Due) -> bool:
        """Write a checkpoint, then remove what it replaces. Raises OSError.

        False where the evidence before it is not on its disk: then it is not written, and the journals stay.
        """
        with self._keeping, contextlib.closing(due.journal):
            if due.before is not None:
                with contextlib.closing(due.before):
                    due.before.sync()
            storage.sync_folder(self._folder.path)
            if due.evidence is not None and not self._may_replace(due.journal, due.evidence):
                return False
            checkpoint.write(self._folder.file("checkpoint", due.number), self._header, due.state)
            self._checkpoint_seconds = due.seconds
            self._whole = True
            self._folder.remove_before(due.number)
            return True

    def _may_replace(self, journal: storage.FramedLog, evidence: Future[None]) -> bool:
        """Wait until the evidence is written; whether the journals that it came from may go. Raises OSError."""
        waited = 0.0
        while waited < EVIDENCE_SECONDS and not evidence.done():
            concurrent.futures.wait((evidence,), _SYNC_SECONDS)
            journal.sync()
            waited += _SYNC_SECONDS
        if evidence.done() and evidence.exception() is None:
            return True
        if not self._whole or self._folder.journal_bytes() > _JOURNALS_BYTES:
            log.error("evidence is not written; if this collector is killed now, what waits of it is lost")
            return True
        log.warning("evidence is not written yet: the journals that it can be made of again stay")
        return False

    def _fail(self, error: OSError) -> None:
        """Go on in memory until a checkpoint succeeds."""
        self._failures += 1
        self._last_error = error.strerror or str(error)
        if self._whole or self._failures == 1:
            log.error(
                "the state in %s cannot be written: %s. Until it can, a collector that dies loses what it counted "
                "since; free space there or restore the disk.",
                self._folder.path,
                error.strerror or error,
            )
        if self._journal is not None:
            self._journal.close()
        self._journal = None
        self._whole = False
        self._next_checkpoint = 0.0

    def _note(self, kind: bytes, now: float, hello: Hello | None = None, text: bytes = b"") -> None:
        if self._journal is None:
            return
        name = 0
        if hello is not None:
            if hello not in self._names:
                self._names[hello] = len(self._names) + 1
                words = json.dumps(dataclasses.asdict(hello)).encode()
                self._journal.put(events.EVENT.pack(events.NAME, now, self._names[hello]) + words)
            name = self._names[hello]
        self._journal.put(events.EVENT.pack(kind, now, name) + text)


def _unusable(folder: Path, error: OSError) -> StateRefused:
    return StateRefused(
        f"state folder {folder}",
        found=error.strerror or str(error),
        instead="Give --state a folder that this user can write to.",
        reason=RefusalReason.STATE_UNUSABLE,
    )
