"""Names for NumPy arrays by what they hold, and what a dataclass's field says of its axes.

The shape of a variable stands in its suffix: act_TF, count_F.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Dtype = np.dtype[Any]
"""Of numbers or of records."""
Array = npt.NDArray[Any]
"""Records, or numbers of a dtype that the code beside it names or that does not matter to it."""
Bool = npt.NDArray[np.bool_]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def axes(*names: str, dtype: npt.DTypeLike = np.float64) -> dict[str, Any]:
    """Metadata of a field that is an array: a name for each axis; those of equal name are of equal length."""
    return {"axes": names, "dtype": np.dtype(dtype)}


def described(made: type) -> Iterator[tuple[str, tuple[str, ...], Dtype]]:
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
