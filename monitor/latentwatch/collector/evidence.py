"""Evidence in a running collector: a thread that writes, a thread that reads, and every reading in the audit log."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sqlite3
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from latentwatch.collector.evidence_buffer import EvidenceScope, watched
from latentwatch.collector.pseudonyms import Pseudonyms
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.evidence import sealed_files, store
from latentwatch.evidence.archive import Archive, StoredRequest, Wanted
from latentwatch.evidence.audit import Audit
from latentwatch.evidence.encryption import Content, Vault
from latentwatch.evidence.segment import Erased
from latentwatch.evidence.store import Retention, Store
from latentwatch.evidence.writer import NOTHING_WRITTEN, Writer, WriterTotals
from latentwatch.facts import ShownExceedance
from latentwatch.transport.credentials import Tokens
from latentwatch.watchlist.file import Watchlist

T = TypeVar("T")

Forget = Callable[[str], Awaitable[bool]]
"""Has the rest of the collector forget a request; returns whether nothing of it is left there."""


@dataclass(frozen=True)
class EvidenceSettings:
    """What is written down, where, and how long it stays."""

    folder: Path
    retention: Retention = field(default_factory=Retention)
    scope: EvidenceScope = "exceeded"
    token_file: Path | None = None
    """Holds the bearer token for deleting, and for what was said, over HTTP; None allows neither."""
    open_to_all: bool = False
    """Whether HTTP tells it to strangers beyond loopback, where readers need no token."""
    key_file: Path | None = None
    """Holds the key of what was said; None keeps none of it. See encryption.Vault."""


@dataclass(frozen=True)
class EvidenceFacts:
    """What became of the evidence; as it stands, for a collector that writes none down."""

    writer: WriterTotals = NOTHING_WRITTEN
    folder_bytes: int = 0
    damaged: tuple[str, ...] = ()
    """Names of files in the folder that cannot be used."""


class Evidence:
    """The evidence of one collector. Its coroutines run in the collector's loop, its work in two threads."""

    def __init__(
        self,
        settings: EvidenceSettings,
        watchlist: Watchlist,
        clock: Callable[[], float],
        pseudonyms: Pseudonyms | None = None,
    ) -> None:
        """
        Args:   watchlist: with every limit that counts.   pseudonyms: those of the ids that are written down.
        Raises: ConfigRefused: the folder or the token file cannot be used.
        """
        self._folder = settings.folder
        self._pseudonyms = pseudonyms
        self._clock = clock
        files = [settings.token_file] if settings.token_file else []
        self.tokens = Tokens(files, "--evidence-token", RefusalReason.EVIDENCE_TOKEN) if files else None
        """Who may delete, and put and get what was said, over HTTP; None: nobody."""
        self.vault = Vault.read(settings.key_file) if settings.key_file else None
        self._store = Store(settings.folder, watched(watchlist), settings.retention)
        try:
            self._audit = Audit(settings.folder, self._store.damaged)
        except sqlite3.Error as error:
            self._store.close()
            raise ConfigRefused(
                f"evidence folder {settings.folder}",
                found=str(error),
                instead="Give a folder that the collector may write to, on a disk with room.",
                reason=RefusalReason.EVIDENCE_FOLDER,
            ) from error
        with contextlib.suppress(sqlite3.Error):
            # On a full disk the old entries stay until the next start.
            self._audit.prune(clock())
        self._archive = Archive(settings.folder, self._store.damaged)
        self._reading = ThreadPoolExecutor(1, "evidence-read")
        self._writer = Writer(self._store, clock=clock)
        self.put = self._writer.put

    async def find(self, name: str, actor: str) -> list[StoredRequest]:
        """See Archive.find."""

        def work() -> list[StoredRequest]:
            held = self._held(name)
            found = self._archive.find(held)
            self._audit.add(self._clock(), actor, "show", len(found), request=held)
            return found

        return await self._read(work)

    async def exceedances(self, wanted: Wanted, limit: int, actor: str) -> list[ShownExceedance]:
        """See Archive.exceedances."""
        subject = " ".join(f"{name}={value}" for name, value in vars(wanted).items() if value is not None)

        def work() -> list[ShownExceedance]:
            found = self._archive.exceedances(wanted, limit)
            self._audit.add(self._clock(), actor, "query", len(found), subject=subject)
            return found

        return await self._read(work)

    async def erase(self, name: str, actor: str, forget: Forget) -> Erased:
        """See store.erase, after everything that was recorded before; and the collector itself forgets the request."""
        held = await asyncio.wrap_future(self._writer.run(lambda: self._held(name)))
        erased = await asyncio.wrap_future(
            self._writer.run(lambda: store.erase(self._folder, held, self._store.damaged))
        )
        if not await forget(held):
            erased = dataclasses.replace(erased, clean=False)
        await self._read(lambda: self._audit.add(self._clock(), actor, "delete", erased.requests, request=held))
        return erased

    async def attach(self, name: str, vault: Vault, content: Content, actor: str) -> int:
        """See Store.attach; after everything that was recorded before."""

        def work() -> int:
            return self._store.attach(held, lambda key: vault.seal(key, content), self._clock())

        held = await asyncio.wrap_future(self._writer.run(lambda: self._held(name)))
        found = await asyncio.wrap_future(self._writer.run(work))
        await self._read(lambda: self._audit.add(self._clock(), actor, "attach", found, request=held))
        return found

    async def content(self, name: str, vault: Vault, actor: str) -> Content | None:
        """What was said in the request with this id, the latest where it is several. Raises: ConfigRefused."""

        def work() -> Content | None:
            held = self._held(name)
            found = [
                (key, sealed)
                for key in store.find(self._folder, held, self._store.damaged)
                if (sealed := sealed_files.get(self._folder, key, self._store.damaged))
            ]
            self._audit.add(self._clock(), actor, "content", len(found), request=held)
            return vault.open(*found[-1]) if found else None

        return await self._read(work)

    def written(self) -> Future[None]:
        """Done once every record that was put before is on the disk, or counted as dropped."""
        return self._writer.run(self._store.sync)

    def facts(self) -> EvidenceFacts:
        """Counts for /metrics."""
        return EvidenceFacts(self._writer.totals(), store.folder_bytes(self._folder), self._store.damaged.names)

    def close(self) -> None:
        """Write what is queued and close the files; waits for the disk."""
        self._writer.close()
        self._reading.submit(self._archive.close).result()
        self._reading.submit(self._audit.close).result()
        self._reading.shutdown()

    def _held(self, name: str) -> str:
        """What a request is kept under that somebody asks for by this name."""
        if self._pseudonyms is None:
            return name
        hashed, *others = self._pseudonyms.candidates(name)
        return next((held for held in (hashed, *others) if store.find(self._folder, held, self._store.damaged)), hashed)

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)
