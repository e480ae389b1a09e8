"""Standard output and error that take every line: what they cannot pass on is given up, and the end of a verb says so.

A verb's work is not undone because nobody reads what it says of it: a full disk under a log, a pipe whose reader has
gone, a terminal that knows no more than ASCII, a stream that was closed before the start.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, Final, TextIO

_WAIT_SECONDS: Final = 10.0
"""For a reader that does not take more just now, where the stream was made not to wait by whoever started us."""


class Descriptor(io.RawIOBase):
    """A descriptor to write to; what it does not take is given up from the first failure on."""

    def __init__(self, descriptor: int, error: OSError | None = None) -> None:
        self._descriptor = descriptor
        self.error = error
        """Why what was written did not arrive; None where all of it did."""
        self.lost = False
        """Whether there was something to write after that."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return self.error is None and os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        while self.error is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError as error:
                if not select.select([], [self._descriptor], [], _WAIT_SECONDS)[1]:
                    self.error = error
            except OSError as error:
                self.error = error
        self.lost = True
        return len(data)


@contextlib.contextmanager
def lenient_streams() -> Iterator[Descriptor]:
    """sys.stdout and sys.stderr as such streams until the end; gives the one below sys.stdout.

    A stream that somebody else put in their place, such as a test, is left alone.
    """
    before = sys.stdout, sys.stderr
    out, err = (_below(stream, number) for stream, number in ((before[0], 1), (before[1], 2)))
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(before[0], out)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(before[1], err)
    mine = sys.stdout, sys.stderr
    try:
        yield out
    finally:
        for stream, original in zip(mine, before, strict=True):
            if stream is not original:
                stream.flush()
        sys.stdout, sys.stderr = before


def _below(stream: TextIO | None, number: int) -> Descriptor:
    """Python makes no stream of a descriptor that was closed."""
    return Descriptor(number, OSError(errno.EBADF, os.strerror(errno.EBADF)) if stream is None else None)


def _text(original: TextIO | None, below: Descriptor) -> io.TextIOWrapper:
    if original is not None:
        with contextlib.suppress(OSError):
            original.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(below),
        encoding=original.encoding if original is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=below.isatty() or below.fileno() == 2,
        write_through=bool(getattr(original, "write_through", False)),
    )
