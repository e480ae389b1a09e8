"""What a checkpoint holds is promised to the next start: a field that changes asks for a new FORMAT."""

from __future__ import annotations

import dataclasses
import typing
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
from latentwatch.arrays import Array, axes
from latentwatch.collector.core_state import CoreState
from latentwatch.collector.durability import schema
from latentwatch.names import Reason


def test_the_schema_is_the_one_that_the_format_stands_for():
    found = schema.fingerprint()
    assert found == schema.FINGERPRINT, (
        f"a field of a state has changed: raise schema.FORMAT to {schema.FORMAT + 1}, so that an older state is "
        f"left alone and named in the log, and set FINGERPRINT to {found!r}"
    )


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str


@dataclasses.dataclass(frozen=True)
class Before:
    count: int
    inner: list[Inner]
    fired_F: Array = dataclasses.field(metadata=axes("F", dtype=np.int64))


def changed(name: str, fields: list[tuple[str, Any, Any]]) -> type:
    """Before, with other fields."""
    return dataclasses.make_dataclass("Before", fields, frozen=True, namespace={"__doc__": name})


COUNT, INNER = ("count", int, dataclasses.field()), ("inner", list[Inner], dataclasses.field())
FIRED = ("fired_F", Array, dataclasses.field(metadata=axes("F", dtype=np.int64)))
OTHER_INNER = dataclasses.make_dataclass("Inner", [("name", str), ("more", int)], frozen=True)


@pytest.mark.parametrize(
    "made",
    [
        changed("a name", [("counted", int, dataclasses.field()), INNER, FIRED]),
        changed("a type", [("count", float, dataclasses.field()), INNER, FIRED]),
        changed("an order", [INNER, COUNT, FIRED]),
        changed("one more", [COUNT, INNER, FIRED, ("more", int, dataclasses.field())]),
        changed("a shape", [COUNT, INNER, ("fired_F", Array, dataclasses.field(metadata=axes("G", dtype=np.int64)))]),
        changed("a dtype", [COUNT, INNER, ("fired_F", Array, dataclasses.field(metadata=axes("F", dtype=np.int32)))]),
        changed("further in", [COUNT, ("inner", list[OTHER_INNER], dataclasses.field()), FIRED]),
    ],
    ids=lambda made: made.__doc__,
)
def test_whatever_changes_in_a_field_changes_the_fingerprint(made):
    same = changed("nothing", [COUNT, INNER, FIRED])
    assert schema.fingerprint(same) == schema.fingerprint(Before) != schema.fingerprint(made)


def test_another_reason_changes_the_fingerprint(monkeypatch):
    """A stored table has a column more then."""
    before = schema.fingerprint()
    other = IntEnum("Reason", [(reason.name, reason.value) for reason in Reason] + [("ANOTHER", 99)])
    monkeypatch.setattr(schema, "_INDEXES", tuple(other if axis is Reason else axis for axis in schema._INDEXES))
    assert schema.fingerprint() != before


def test_every_array_of_a_state_says_its_axes_and_type():
    """Without them a damaged one would come back as it is."""
    for made in reachable(CoreState, set()):
        hints = typing.get_type_hints(made)
        for field in dataclasses.fields(made):
            is_array = (typing.get_origin(hints[field.name]) or hints[field.name]) is np.ndarray
            assert is_array == ("axes" in field.metadata), f"{made.__name__}.{field.name}"


def reachable(made: type, seen: set[type]) -> set[type]:
    if made not in seen:
        seen.add(made)
        for hint in typing.get_type_hints(made).values():
            for inner in schema._dataclasses_in(hint):
                reachable(inner, seen)
    return seen
