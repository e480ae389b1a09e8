"""A file in memory, which an engine and its exporter share by its descriptor."""

from __future__ import annotations

import os
import tempfile
from typing import Final

_STANDARD: Final = 3
"""Descriptors below are those of the standard streams, which a child has opened anew."""
_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108, the file loses its name at once


def memory_file(name: str) -> int:
    """Descriptor of an empty file without a name in any folder, and none of the standard streams.

    Raises OSError: there is neither memfd_create nor a folder to put it in.
    """
    made = _made(name)
    low = []
    while made < _STANDARD:  # in a process that was started without standard streams
        low.append(made)
        made = os.dup(made)
    for descriptor in low:
        os.close(descriptor)
    return made


def _made(name: str) -> int:
    try:
        return os.memfd_create(name)
    except OSError:  # a sandbox that does not know it
        place = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
        with tempfile.TemporaryFile(dir=place) as file:
            return os.dup(file.fileno())
