"""A collector's state as plain values and arrays, and the file that one is kept in.

A state is a tree of dicts (string keys), lists, numbers, strings, None and numpy arrays. The file is numpy's `.npz`
without compression: every array a member of its own, the rest one JSON member with references to them. Nothing in it
is executed on reading, and the zip's checksums tell a damaged file from a whole one.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from latentwatch import storage
from latentwatch.errors import RefusalReason, StateRefused

FORMAT: Final = 2
"""Raised with every change of what a state holds, or of how a journal is replayed."""

State: TypeAlias = dict[str, Any]

_TREE: Final = "tree"
_ARRAY: Final = "$array"


def write(path: Path, header: Mapping[str, Any], state: State) -> None:
    """Put a state on the disk, whole or not at all; the file that was there stays until the new one is safe.

    Raises: OSError.
    """
    arrays: dict[str, np.ndarray] = {}

    def reference(value: Any) -> dict[str, str]:
        if not isinstance(value, np.ndarray):
            raise TypeError(f"a state holds {type(value).__name__}, which is no plain value")
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}

    tree = json.dumps({"header": dict(header), "state": state}, default=reference).encode()
    with storage.atomic_write(path) as file:
        # numpy's stubs take every further keyword for its option `allow_pickle`.
        np.savez(file, **{_TREE: np.frombuffer(tree, np.uint8)}, **arrays)  # type: ignore[arg-type]


def read(path: Path, header: Mapping[str, Any]) -> State:
    """The state in a file that was written under an equal header.

    Raises: StateRefused, "state_header" for another header, "state_damaged" for a file that is not whole.
    """
    try:
        with np.load(path, allow_pickle=False) as members:
            arrays = {name: members[name] for name in members.files}
        tree = json.loads(
            arrays[_TREE].tobytes(), object_hook=lambda value: arrays[value[_ARRAY]] if _ARRAY in value else value
        )
        found, state = tree["header"], tree["state"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StateRefused(
            f"state {path}",
            found=f"it cannot be read: {error}",
            instead="Restore the file, or remove its folder to begin again at zero.",
            reason=RefusalReason.STATE_DAMAGED,
        ) from error
    for name, value in header.items():
        if found.get(name) != value:
            raise StateRefused(
                f"state {path}",
                found=f"its {name} is {found.get(name)!r}, this collector's is {value!r}",
                instead="Start with what the state was made by, or give another --state folder.",
                reason=RefusalReason.STATE_HEADER,
            )
    return dict(state)
