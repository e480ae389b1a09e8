"""The newest checkpoint that can be used, and the journals behind it, given to a collector again.

A file that cannot be used costs what only it has: it is set aside by name, and the rest counts.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latentwatch import storage
from latentwatch.collector.durability import events
from latentwatch.collector.durability.folder import StateFolder
from latentwatch.errors import RefusalReason, StateRefused
from latentwatch.transport.hello import Hello

if TYPE_CHECKING:
    from latentwatch.collector.core import Core
    from latentwatch.collector.core_state import CoreState

log = logging.getLogger(__name__)

EVIDENCE_SECONDS: Final = 30.0
"""How long somebody waits for evidence to be written before going on without."""
_REPLAYED_AT_ONCE: Final = 512
"""Events that are taken again before what they gave is written: more would not fit into the queue of evidence."""


def restore(core: Core, folder: StateFolder, read: Callable[[Path], CoreState]) -> int | None:
    """Put a collector where the newest checkpoint is that can be used; its number, None where there is none.

    Args:   read: checkpoint.read, for the header of today's.
    Raises: OSError; StateRefused "state_header".
    """
    for number in reversed(folder.numbers("checkpoint")):
        path = folder.file("checkpoint", number)
        try:
            core.restore(read(path))
        except StateRefused as refused:
            if refused.reason != RefusalReason.STATE_DAMAGED:
                raise
            folder.set_aside(path, refused.found)
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            folder.set_aside(path, f"it does not hold together: {error}")
        else:
            return number
    # What they tell is of a collector that had counted what came before; without that it would be a wrong number.
    for number in folder.numbers("journal"):
        path = folder.file("journal", number)
        records, damage = _records(path)
        if damage or len(records) > 1:
            folder.set_aside(path, "there is no checkpoint that leads to it")
    return None


def replay(core: Core, folder: StateFolder, first: int, evidence_written: Callable[[], Future[None]] | None) -> int:
    """Hand a collector the events of the journals from this number on, as far as they lead; how many those were.

    Raises: OSError.
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
        taken, wrong = _replay(core, records[1:], evidence_written)
        given += taken
        if damage := wrong or damage:
            for later in range(number, newest + 1):
                if folder.file("journal", later).exists():
                    folder.set_aside(folder.file("journal", later), damage)
            break
    return given


def _replay(core: Core, records: list[bytes], evidence_written: Callable[[], Future[None]] | None) -> tuple[int, str]:
    """How many events were taken, and what is wrong with the one behind them; empty where there is none."""
    names: dict[int, Hello] = {}
    for i, record in enumerate(records, start=1):
        if i % _REPLAYED_AT_ONCE == 0 and evidence_written is not None:
            concurrent.futures.wait((evidence_written(),), EVIDENCE_SECONDS)
        try:
            kind, now, name = events.EVENT.unpack_from(record)
            text = record[events.EVENT.size :]
            if kind == events.NAME:
                names[name] = Hello(**json.loads(text))
            else:
                events.repeat(core.ingest, kind, now, names.get(name), text)
        except Exception as error:
            # A core that meets such an event while it serves refuses it too, whatever it raises, and goes on.
            return i - 1 - len(names), f"its event {i} is not taken again: {type(error).__name__}: {error}"
    return len(records) - len(names), ""


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
