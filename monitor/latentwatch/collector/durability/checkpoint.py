"""The file of a collector's state.

It is numpy's `.npz` without compression: every array a member of its own, the rest one JSON member with references to
them; see `schema`. Nothing in it is executed on reading, and the zip's checksums tell a damaged file from a whole one.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from latentwatch import storage
from latentwatch.collector.core_state import CoreState
from latentwatch.collector.durability import schema
from latentwatch.errors import RefusalReason, StateRefused

_TREE: Final = "tree"


def write(path: Path, header: Mapping[str, Any], state: CoreState) -> None:
    """Put a state on the disk, whole or not at all; the file that was there stays until the new one is safe.

    Raises: OSError.
    """
    plain, arrays = schema.to_tree(state)
    tree = json.dumps({"header": dict(header), "state": plain}).encode()
    with storage.atomic_write(path) as file:
        # numpy's stubs take every further keyword for its option `allow_pickle`.
        np.savez(file, **{_TREE: np.frombuffer(tree, np.uint8)}, **arrays)  # type: ignore[arg-type]


def read(path: Path, header: Mapping[str, Any]) -> CoreState:
    """The state in a file that was written under an equal header.

    Raises: StateRefused, "state_header" for another header, "state_damaged" for a file that is not whole; OSError where
            the disk does not give it out.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            arrays = {name: members[name] for name in members.files}
        tree = json.loads(arrays[_TREE].tobytes())
        found, plain = dict(tree["header"]), tree["state"]
    except OSError as error:
        # With a number it is the system's; a file that is cut off within a member has none.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise damaged(path, f"it cannot be read: {error}") from error
    except Exception as error:
        # numpy, zipfile, zlib and tokenize, with which numpy reads a header, raise a dozen kinds; all mean damage.
        raise damaged(path, f"it cannot be read: {error}") from error
    for name, value in header.items():
        if found.get(name) != value:
            raise _other_header(path, name, found.get(name), value)
    try:
        return schema.from_tree(plain, arrays)
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(path, f"it does not hold together: {error}") from error


def damaged(path: Path, found: str) -> StateRefused:
    """The refusal of a file that is not what was written."""
    return StateRefused(
        f"state {path}",
        found=found,
        instead="Restore the file, or remove its folder to begin again at zero.",
        reason=RefusalReason.STATE_DAMAGED,
    )


def _other_header(path: Path, name: str, found: Any, value: Any) -> StateRefused:
    """Of bounds only those that differ are named."""
    instead = "Start with what the state was made by, or give another --state folder."
    if isinstance(found, dict) and isinstance(value, dict):
        names = sorted(key for key in found.keys() | value.keys() if found.get(key) != value.get(key))
        found, value = ({key: part.get(key) for key in names} for part in (found, value))
    what = f"its {name} is {found!r}, this collector's is {value!r}"
    return StateRefused(f"state {path}", found=what, instead=instead, reason=RefusalReason.STATE_HEADER)
