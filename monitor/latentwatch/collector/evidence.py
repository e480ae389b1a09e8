"""Evidence in a running collector: a thread that writes, a thread that reads, and every reading in the audit log."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from latentwatch.client_ids import IdKind, meanings
from latentwatch.collector.evidence_buffer import EvidenceScope, watched
from latentwatch.collector.pseudonyms import Pseudonyms
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.evidence import sealed_files, store
from latentwatch.evidence.archive import Archive, StoredRequest, Wanted
from latentwatch.evidence.audit import Audit
from latentwatch.evidence.encryption import Content, Vault
from latentwatch.evidence.known_names import check_wanted
from latentwatch.evidence.segment import Erased, Match
from latentwatch.evidence.store import Retention, Store
from latentwatch.evidence.writer import NOTHING_WRITTEN, Writer, WriterTotals
from latentwatch.facts import ShownExceedance
from latentwatch.transport.credentials import Tokens
from latentwatch.watchlist.file import Watchlist

log = logging.getLogger(__name__)

T = TypeVar("T")

Meant = Mapping[IdKind, tuple[str, ...]]
"""See client_ids.meanings."""
Forget = Callable[[Meant], Awaitable[bool]]
"""Has the rest of the collector forget the requests with these ids; returns whether nothing of it is left there."""


_GIVEN: Final[tuple[IdKind, ...]] = (IdKind.RESPONSE, IdKind.REQUEST, IdKind.DIGEST)
"""Kinds of id that server and engine give."""


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
        self._audit: Audit | None = None
        self._archive: Archive | None = None
        try:
            self._opened()
        except (sqlite3.Error, OSError, ConfigRefused) as error:
            log.error("evidence in %s is not read until its audit log can be written: %s", settings.folder, error)
        self._reading = ThreadPoolExecutor(1, "evidence-read")
        self._writer = Writer(self._store, clock=clock)
        self.put = self._writer.put

    async def find(self, name: str, actor: str) -> list[StoredRequest]:
        """See Archive.find."""

        def work() -> list[StoredRequest]:
            archive, _ = self._opened()
            found = archive.find(self.meanings(name))
            self._note(actor, "show", len(found), name)
            return found

        return await self._read(work)

    async def exceedances(self, wanted: Wanted, limit: int, actor: str) -> list[ShownExceedance]:
        """See Archive.exceedances. Raises ConfigRefused "name_unknown"; see known_names."""
        subject = " ".join(f"{name}={value}" for name, value in vars(wanted).items() if value is not None)

        def work() -> list[ShownExceedance]:
            archive, audit = self._opened()
            check_wanted(archive, wanted)
            found = archive.exceedances(wanted, limit)
            audit.add(self._clock(), actor, "query", len(found), subject=subject)
            return found

        return await self._read(work)

    async def matches(self, name: str) -> list[Match]:
        """Requests that are kept and have this id, of whatever kind; after everything that was recorded before."""
        meant = self.meanings(name)
        return await asyncio.wrap_future(self._writer.run(lambda: store.find(self._folder, meant, self._store.damaged)))

    async def told(self, name: str, count: int, actor: str) -> None:
        """Note that whoever asked with this name was told of so many requests. Raises sqlite3.Error."""
        await self._read(lambda: self._note(actor, "show", count, name))

    async def erase(self, name: str, kind: IdKind, actor: str, forget: Forget) -> tuple[Erased, list[Match]]:
        """Delete the requests of which `name` is the id of this kind, and no other, after everything that was recorded
        before; and the collector itself forgets them. Returns what was done and which requests they were."""
        meant: Meant = {kind: self.meanings(name).get(kind, ())}

        def work() -> tuple[Erased, list[Match]]:
            found = store.find(self._folder, meant, self._store.damaged)
            return store.erase(self._folder, meant, self._store.damaged), found

        erased, found = await asyncio.wrap_future(self._writer.run(work))
        ids = (*meant.get(IdKind.REQUEST, ()), *(match.request_id for match in found))
        if not await forget({**meant, IdKind.REQUEST: ids}):
            erased = dataclasses.replace(erased, clean=False)
        await self._read(lambda: self._note(actor, "delete", erased.requests, name))
        return erased, found

    async def attach(self, name: str, vault: Vault, content: Content, actor: str) -> int:
        """See Store.attach; after everything that was recorded before.

        Args: name: of the response or the engine's, no other kind: what was said in a request that is not kept must not
              go to one that somebody else called so.
        """
        meant: Meant = {kind: ids for kind, ids in self.meanings(name).items() if kind in _GIVEN}

        def work() -> int:
            return self._store.attach(meant, lambda key: vault.seal(key, content), self._clock())

        found = await asyncio.wrap_future(self._writer.run(work))
        await self._read(lambda: self._note(actor, "attach", found, name))
        return found

    async def content(self, name: str, vault: Vault, actor: str) -> Content | None:
        """What was said in the request with this id, the latest where one called so came again.

        Raises: ConfigRefused: it cannot be opened, or is the id of different requests; see store.one_kind.
        """

        def work() -> Content | None:
            matches = store.find(self._folder, self.meanings(name), self._store.damaged)
            found = [
                (match.key, sealed)
                for match in matches
                if (sealed := sealed_files.get(self._folder, match.key, self._store.damaged))
            ]
            self._note(actor, "content", len(found), name)
            store.one_kind(matches, name)
            return vault.open(*found[-1]) if found else None

        return await self._read(work)

    def wait_for_release(self) -> None:
        """See Writer."""
        self._writer.wait_for_release()

    def release(self) -> None:
        """See Writer."""
        self._writer.release()

    def written(self) -> Future[None]:
        """Done once every record that was put before is on the disk, or counted as dropped."""
        return self._writer.run(self._store.sync)

    def facts(self) -> EvidenceFacts:
        """Counts for /metrics."""
        totals = self._writer.totals()
        with contextlib.suppress(OSError):
            return EvidenceFacts(totals, store.folder_bytes(self._folder), self._store.damaged.names)
        return EvidenceFacts(totals)  # of a folder that is away

    def close(self) -> None:
        """Write what is queued and close the files; waits for the disk."""
        self._writer.close()
        for part in (self._archive, self._audit):
            if part is not None:
                self._reading.submit(part.close).result()
        self._reading.shutdown()

    def _opened(self) -> tuple[Archive, Audit]:
        """For the thread that reads: the folder, and what notes it. Raises sqlite3.Error, OSError, ConfigRefused."""
        if self._audit is None:
            self._audit = Audit(self._folder, self._store.damaged)
            with contextlib.suppress(sqlite3.Error):
                # On a full disk the old entries stay until the next start.
                self._audit.prune(self._clock())
        if self._archive is None:
            self._archive = Archive(self._folder, self._store.damaged)
        return self._archive, self._audit

    def _note(self, actor: str, action: str, found: int, name: str) -> None:
        _, audit = self._opened()
        audit.add(self._clock(), actor, action, found, request=self._noted(name))

    def meanings(self, name: str) -> Meant:
        """The ids under which a request may be kept that somebody asks for by this one."""
        return self._pseudonyms.meanings(name) if self._pseudonyms else meanings(name)

    def _noted(self, name: str) -> str:
        """What the audit log has of a name: where ids are kept as keyed hashes, it has no clear one either."""
        if self._pseudonyms is None:
            return name
        return self._pseudonyms.hashed(name)

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)
