"""Files of evidence that cannot be used: told from what passes, named, and set aside so that the rest serves on.

One bad file costs what is in it. It is noted once, in the log and on /metrics; whoever reads or deletes goes on without
it and says so. The one collector that writes to the folder renames it, with its log:

    2026-11-22.0000.evidence.damaged       `latentwatch evidence repair` saves what can be read of it
    2026-11-22.0000.evidence.salvaged      what could be read of it is in a segment of its own

It may hold anybody's rows until retention takes it, as it would have taken the file itself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import stat
import threading
import zlib
from pathlib import Path
from typing import Final

from latentwatch import storage
from latentwatch.errors import ConfigRefused

log = logging.getLogger(__name__)

DAMAGED: Final = ".damaged"
SALVAGED: Final = ".salvaged"
SIDE_FILES: Final = ("-wal", "-shm")
_OF_THE_FILE: Final = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH}
)
_OF_THE_DISK_OR_THE_FILE: Final = frozenset(
    {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY}
)
_PASSING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS, errno.EINTR, errno.ENOSPC})
"""What opening a file says of the process or of the whole disk."""


def found(path: Path, error: Exception) -> str:
    """What is wrong with this file where the error is the file's own; empty for what passes, or is the whole disk's."""
    if isinstance(error, ConfigRefused):
        return error.found
    if isinstance(error, zlib.error | ValueError | IndexError | KeyError | TypeError | OverflowError):
        return f"a row of it is none ({type(error).__name__}: {error})"
    if not isinstance(error, sqlite3.Error):
        return ""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    if code in _OF_THE_FILE:
        return str(error)
    return _unusable(path) if code in _OF_THE_DISK_OR_THE_FILE else ""


def _unusable(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return "it is no plain file"
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return ""
    except OSError as error:
        return "" if error.errno in _PASSING else error.strerror or str(error)
    return ""


def aside(folder: Path) -> list[Path]:
    """Files that were set aside, whatever they held, oldest name first."""
    return sorted(path for path in folder.iterdir() if path.suffix in (DAMAGED, SALVAGED))


def set_aside(path: Path, ending: str = DAMAGED) -> Path:
    """Give a file and its log a name that nothing takes for evidence. Raises OSError."""
    to = path.with_name(path.name + ending)
    number = 1
    while to.exists():
        to = path.with_name(f"{path.name}.{number}{ending}")
        number += 1
    for side in SIDE_FILES:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + side).rename(to.with_name(to.name + side))
    path.rename(to)
    storage.sync_folder(path.parent)
    return to


class Damaged:
    """The files of one folder that cannot be used, as far as its readers and its writer found out. For any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._noted: dict[Path, bool] = {}
        """Whether it is another version's, and stays where it is."""

    def __contains__(self, path: Path) -> bool:
        return path in self._noted

    def record(self, path: Path, error: Exception) -> bool:
        """Whether this error says that the file cannot be used. From then on nobody uses it."""
        why = found(path, error)
        if not why:
            return False
        with self._lock:
            if path not in self._noted:
                self._noted[path] = isinstance(error, ConfigRefused)
                log.error(
                    "evidence file %s cannot be used: %s. The rest of the evidence is read and written on; what is in "
                    "this file is not found, and may be of anybody. 'latentwatch evidence repair' saves what it can.",
                    path,
                    why,
                )
        return True

    def settle(self) -> None:
        """Set aside what was noted: for the one writer, once it has closed it. Raises OSError.

        A file of another format is left where it is, for the version that wrote it.
        """
        with self._lock:
            noted = list(self._noted.items())
        for path, foreign in noted:
            if path.exists() and not foreign:
                set_aside(path)
            if not path.exists():
                with self._lock:
                    self._noted.pop(path, None)

    @property
    def names(self) -> tuple[str, ...]:
        """Every file that cannot be used, set aside or not yet."""
        with self._lock:
            noted = {path.name for path in self._noted if path.exists()}
        return tuple(sorted(noted | {path.name for path in aside(self._folder)}))
