"""The journals behind a checkpoint, given to a collector again."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import struct
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latentwatch import storage
from latentwatch.collector.durability import events
from latentwatch.collector.durability.folder import StateFolder
from latentwatch.errors import Refusal, RefusalReason, StateRefused
from latentwatch.transport.hello import Hello

if TYPE_CHECKING:
    from latentwatch.collector.core import Core

log = logging.getLogger(__name__)

EVIDENCE_SECONDS: Final = 30.0
"""How long somebody waits for evidence to be written before going on without."""
_REPLAYED_AT_ONCE: Final = 512
"""Events that are taken again before what they gave is written: more would not fit into the queue of evidence."""


def replay(core: Core, folder: StateFolder, first: int, evidence_written: Callable[[], Future[None]] | None) -> int:
    """Hand a collector the events of the journals from this number on, as far as they lead; how many those were.

    Raises: OSError; StateRefused "state_journal".
    """
    newest = folder.newest()
    given = 0
    for number in range(first, newest + 1):
        path = folder.file("journal", number)
        records, damage = _records(path)
        # A journal that was begun after a failure has events missing before it; only its checkpoint leads to it.
        if not records or not (events.EVENT.unpack_from(records[0])[2] or number == first):
            if damage:
                folder.set_aside(path, damage)
            break
        given += _replay(core, path, records[1:], evidence_written)
        if damage:
            for later in range(number, newest + 1):
                if folder.file("journal", later).exists():
                    folder.set_aside(folder.file("journal", later), damage)
            break
    return given


def _replay(core: Core, path: Path, records: list[bytes], evidence_written: Callable[[], Future[None]] | None) -> int:
    names: dict[int, Hello] = {}
    try:
        for i, record in enumerate(records, start=1):
            if i % _REPLAYED_AT_ONCE == 0 and evidence_written is not None:
                concurrent.futures.wait((evidence_written(),), EVIDENCE_SECONDS)
            kind, now, name = events.EVENT.unpack_from(record)
            text = record[events.EVENT.size :]
            if kind == events.NAME:
                names[name] = Hello(**json.loads(text))
            else:
                events.repeat(core.ingest, kind, now, names.get(name), text)
    except (Refusal, KeyError, ValueError, TypeError, struct.error) as error:
        raise StateRefused(
            f"state {path}",
            found=f"an event in it is not taken again: {error}",
            instead="Start the version that wrote it, or remove its folder to begin again at zero.",
            reason=RefusalReason.STATE_JOURNAL,
        ) from error
    return len(records) - len(names)


def _records(path: Path) -> tuple[list[bytes], str]:
    """Every event of a journal up to the first that is torn or damaged; and the damage, empty where there is none.

    Raises OSError.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return [], ""
    with file:
        frames = storage.FrameReader(file, events.FRAMING)
        records = [frame.body for frame in frames]
        damaged = frames.tail is storage.Tail.DAMAGED
        left_out = path.stat().st_size - frames.at
        return records, f"its last {left_out} bytes, behind byte {frames.at}, are no whole event" if damaged else ""
