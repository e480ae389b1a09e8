"""What is said of an array beside its name: the axes and the type of a dataclass's field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def axes(*names: str, dtype: npt.DTypeLike = np.float64) -> dict[str, Any]:
    """Metadata of a field that is an array: a name for each axis; those of equal name are of equal length."""
    return {"axes": names, "dtype": np.dtype(dtype)}


def described(made: type) -> Iterator[tuple[str, tuple[str, ...], np.dtype[Any]]]:
    """Every array among a dataclass's fields: its name, axes and type."""
    for field in dataclasses.fields(made):
        if "axes" in field.metadata:
            yield field.name, field.metadata["axes"], field.metadata["dtype"]


def check(value: Any, **lengths: int) -> None:
    """Raise ValueError naming the array of a dataclass whose type or shape is not what its field says.

    Args: lengths: of axes, where they are known beforehand.
    """
    for name, names, dtype in described(type(value)):
        array = getattr(value, name)
        if array.dtype != dtype or array.ndim != len(names):
            raise ValueError(f"{type(value).__name__}.{name} is {array.dtype} {array.shape}, not {dtype} {names}")
        for axis, length in zip(names, array.shape, strict=True):
            if lengths.setdefault(axis, length) != length:
                raise ValueError(f"{type(value).__name__}.{name} has {length} along {axis}, not {lengths[axis]}")
