"""What a target is."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

from latentwatch import storage
from latentwatch.errors import Refusal

SEPARATOR = b"\n--8<--\n"
"""Between the files of an input that is several."""
SECONDS = 10.0
"""Most that one input may take, of CPU time."""
MIB = 512
"""Most memory that a target's process may have."""


@dataclass(frozen=True)
class Target:
    """One format."""

    name: str
    check: Callable[[bytes], None]
    """Reads an input. Raises Refusal where it is refused, AssertionError where it is not the same again."""
    seeds: Callable[[], Sequence[bytes]]
    """Inputs that are taken, from which others are made."""
    modules: tuple[str, ...]
    """Of the package, whose lines are counted."""
    words: tuple[bytes, ...] = ()
    """What stands in such a format, for whoever makes inputs."""

    def corpus(self) -> list[bytes]:
        """The seeds."""
        with unchecked():
            return list(self.seeds())

    def accepts(self, data: bytes) -> bool:
        """Whether an input is taken; False where it is refused. Raises whatever is neither."""
        try:
            with unchecked():
                self.check(data)
        except Refusal as refusal:
            assert refusal.reason and refusal.what and refusal.found and refusal.instead, refusal
            str(refusal).encode()  # what no log can hold is no refusal
            return False
        return True


@cache
def scratch() -> Path:
    """A folder in memory for files of this process."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=f"latentwatch-fuzz-{os.getpid()}-", dir=shared if shared.is_dir() else None))


def bundle(*files: bytes) -> bytes:
    """Several files as one input."""
    return SEPARATOR.join(files)


def files_of(data: bytes, count: int) -> list[bytes | None]:
    """The files of an input; None for one that is not there."""
    parts: list[bytes | None] = list(data.split(SEPARATOR, count - 1))
    return parts + [None] * (count - len(parts))


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Checksums are right whatever is written: what lies behind them is to be reached. They have tests of their own."""
    with (
        mock.patch.object(storage.Framing, "_crc", lambda *_: 0),
        mock.patch.object(storage.HashedArtifact, "_digest", lambda *_: "0" * 64),
        mock.patch.object(zipfile.ZipExtFile, "_update_crc", lambda *_: None),
    ):
        yield


def put(path: Path, content: bytes | None) -> None:
    """Write a file, or remove it."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)
