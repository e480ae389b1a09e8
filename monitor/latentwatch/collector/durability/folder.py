"""The folder of one collector's state: who has it, its numbered files, and what of them was set aside.

A file that could not be read, or not to its end, is never removed for a newer one: it is renamed, so that nothing here
reads it again, and stays until somebody looks at it.
"""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path
from typing import Final, Literal, TypeAlias

from filelock import BaseFileLock

from latentwatch import storage
from latentwatch.errors import RefusalReason, StateRefused

log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["checkpoint", "journal"]
_KINDS: Final[tuple[Kind, ...]] = ("checkpoint", "journal")
_ENDINGS: Final = {"checkpoint": "npz", "journal": "log"}
_ASIDE: Final = ".aside"


class StateFolder:
    """The files of one watchlist and format within a folder that one process has."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        self._root = root
        self._lock: BaseFileLock | None = None

    def open(self) -> None:
        """Make it, and have it until `release`. Raises OSError; StateRefused "state_in_use"."""
        if self._lock is not None:
            return
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = storage.lock_folder(self._root)
        if self._lock is None:
            raise StateRefused(
                f"state folder {self._root}",
                found="another collector uses it",
                instead="Give each collector a --state folder of its own.",
                reason=RefusalReason.STATE_IN_USE,
            )

    def release(self) -> None:
        """Let another process have it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def file(self, kind: Kind, number: int) -> Path:
        """One of its files, there or not."""
        return self.path / f"{kind}-{number:012d}.{_ENDINGS[kind]}"

    def numbers(self, kind: Kind) -> list[int]:
        """Numbers of the files of one kind, ascending. Raises OSError."""
        shape = re.compile(rf"{kind}-(\d+)\.{_ENDINGS[kind]}")
        return sorted(int(match[1]) for path in self.path.iterdir() if (match := shape.fullmatch(path.name)))

    def newest(self) -> int:
        """The highest number of any file; 0 for none. Raises OSError."""
        return max((number for kind in _KINDS for number in self.numbers(kind)), default=0)

    def journal_bytes(self) -> int:
        """Of all journals together. Raises OSError."""
        return sum(self.file("journal", number).stat().st_size for number in self.numbers("journal"))

    def remove_before(self, number: int) -> None:
        """Remove what a checkpoint of this number replaces, for good. Raises OSError."""
        older = [self.file(kind, n) for kind in _KINDS for n in self.numbers(kind) if n < number]
        for path in older:
            path.unlink(missing_ok=True)
        if older:
            storage.sync_folder(self.path)

    def set_aside(self, path: Path, why: str) -> None:
        """Have a file stay as it is under a name that nothing here reads or removes. Raises OSError."""
        aside, number = path.with_name(path.name + _ASIDE), 1
        while aside.exists():
            aside = path.with_name(f"{path.name}.{number}{_ASIDE}")
            number += 1
        path.rename(aside)
        storage.sync_folder(self.path)
        log.error("%s is set aside as %s and counts for nothing: %s", path, aside.name, why)

    def set_all_aside(self, why: str) -> None:
        """Set aside every checkpoint and journal. Raises OSError."""
        for kind in _KINDS:
            for number in self.numbers(kind):
                self.set_aside(self.file(kind, number), why)

    def aside(self) -> list[Path]:
        """What was set aside, in this life or an earlier one; none where the folder cannot be read."""
        with contextlib.suppress(OSError):
            return sorted(self.path.glob(f"*{_ASIDE}"))
        return []

    def name_other_formats(self, mine: int) -> None:
        """Say what of this watchlist another version left beside it, where this one begins at zero. Raises OSError."""
        name, _, _ = self.path.name.rpartition("-")
        for other in sorted(self.path.parent.glob(f"{name}-*")):
            if other != self.path and any(other.glob("checkpoint-*.npz")):
                log.warning(
                    "the state in %s is of another version of latentwatch (this one writes format %d) and is not read: "
                    "the counters begin at zero. Start the version that wrote it to go on from there, or remove it.",
                    other,
                    mine,
                )
