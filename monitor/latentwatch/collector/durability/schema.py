"""What a checkpoint holds, as a tree of plain values with its arrays beside it, and which schema that is.

A state is a tree of frozen dataclasses, from core_state.CoreState down; no name of a field is written a second time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Final, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from latentwatch.arrays import Array, check, described
from latentwatch.collector.core_state import CoreState
from latentwatch.names import Outcome, Phase, Reason, TokenState

FORMAT: Final = 4
"""Raised with every change of what a state holds, or of how a journal is replayed."""
FINGERPRINT: Final = "60df4fcdcc368d7b"
"""Of the schema that FORMAT stands for. A contract test compares them: who changes a field changes both."""

_INDEXES: Final = (TokenState, Reason, Phase, Outcome)
"""What axes and whole numbers of a state stand for: each has as many places as members."""
_ARRAY: Final = "$array"


def to_tree(state: CoreState) -> tuple[Any, dict[str, Array]]:
    """Plain values for JSON, and the arrays that they refer to by name."""
    arrays: dict[str, Array] = {}

    def reference(value: Any) -> dict[str, str]:
        if not isinstance(value, np.ndarray):
            raise TypeError(f"a state holds {type(value).__name__}, which is no plain value")
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}

    return msgspec.to_builtins(state, enc_hook=reference, str_keys=True), arrays


def from_tree(tree: Any, arrays: Mapping[str, Array]) -> CoreState:
    """The state that `to_tree` made this of. Raises ValueError naming what in it is of another type or shape."""

    def referred(wanted: type, value: Any) -> Any:
        if (get_origin(wanted) or wanted) is not np.ndarray:
            raise TypeError(f"no array was expected where {wanted} is")
        name = str(value.get(_ARRAY)) if isinstance(value, dict) else ""
        if name not in arrays:
            raise ValueError(f"it refers to array {name!r}, which is not in it")
        return arrays[name]

    state = msgspec.convert(tree, CoreState, dec_hook=referred, str_keys=True)
    for part in _parts(state):
        if isinstance(part, int):
            # Each counts something, or is the number of something. Sums have no upper bound: they are written as they
            # are, and a state must come back from whatever it added up.
            if part < 0:
                raise ValueError(f"it counts {part}")
        else:
            check(part)
    return state


def _parts(value: Any) -> Iterator[Any]:
    """Every dataclass and whole number in a state."""
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, dict):
        for of_key in value.values():
            yield from _parts(of_key)
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _parts(element)
    elif isinstance(value, int):
        yield value


def fingerprint(made: type = CoreState) -> str:
    """A hash of every name, type, order, axis and array type in a schema, and of what its axes stand for."""
    members = (f"{axis.__name__}: {[(member.name, member.value) for member in axis]}" for axis in _INDEXES)
    return hashlib.sha256("\n".join((*_lines(made, set()), *members)).encode()).hexdigest()[:16]


def _lines(made: type, seen: set[type]) -> Iterator[str]:
    if made in seen:
        return
    seen.add(made)
    arrays = {name: f"{axes} {dtype.descr if dtype.names else dtype.str}" for name, axes, dtype in described(made)}
    hints = get_type_hints(made)
    yield made.__name__
    for field in dataclasses.fields(made):
        yield f"  {field.name}: {arrays.get(field.name) or _spelled(hints[field.name])}"
    for field in dataclasses.fields(made):
        for inner in _dataclasses_in(hints[field.name]):
            yield from _lines(inner, seen)


def _spelled(hint: Any) -> str:
    inner = get_args(hint)
    name = "|" if isinstance(hint, types.UnionType) else getattr(get_origin(hint) or hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(_spelled, inner))}]" if inner else name


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for inner in get_args(hint):
        yield from _dataclasses_in(inner)
