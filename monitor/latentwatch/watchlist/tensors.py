"""Read rows of large tensor files without loading them: the files that sources are published in.

A 65k-wide encoder takes 1 GiB; a watchlist needs some dozens of its rows. Every reader here yields the selected rows
or columns as float64, decoded exactly from whatever the file stores, and holds at most `BLOCK_BYTES` at a time.
No reader runs code from a file.
"""

from __future__ import annotations

import json
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypedDict

import numpy as np
import safetensors

from latentwatch.arrays import F64, Array, Dtype
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.watchlist.declared import Known, Unread
from latentwatch.watchlist.file import f32_from_bf16
from latentwatch.watchlist.location import Config, Location

BLOCK_BYTES: Final = 32 << 20
"""Rows read at once when columns are picked out of them: large enough to stream, small beside any limit on memory."""

_BESIDE: Final = Known(unread={"format": "it names the library that wrote the file"})
_SAFETENSORS_DTYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its shape, and how its bytes become numbers."""

    shape: tuple[int, ...]
    dtype: Dtype
    bf16: bool = False
    offset: int = 0
    """Of the first byte in the file, where the format has one."""
    whole: bool = False
    """Whether whole numbers are stored: counts, or weights that were quantised."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one slice along the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def decode(self, raw: Array) -> F64:
        """The exact float64 values of stored ones."""
        return np.asarray(f32_from_bf16(raw) if self.bf16 else raw, np.float64)


class Tensors(ABC):
    """The named tensors of one file. Subclasses know one container format."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], unreadable: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.entries: Final = dict(entries)
        self._unreadable: Final = dict(unreadable or {})
        """Tensors of a dtype that cannot be read exactly, by name."""
        self._declared: frozenset[str] | None = None

    @property
    def metadata(self) -> Mapping[str, object]:
        """Free values that the container carries beside the tensors."""
        return {}

    def declare(
        self,
        location: Location,
        used: Mapping[str, tuple[int, ...]],
        unread: Mapping[str, Unread] | None = None,
        beside: Known = _BESIDE,
    ) -> Config:
        """Say what every tensor and value in the file is; from here on, only the used ones can be read.

        Args:    used: the tensors that are read and the shape that each must have.   unread: those that activations
                 do not depend on, which may be missing.   beside: what is known of the values beside the tensors.
        Returns: the values beside the tensors.
        Raises:  WatchlistRefused: a tensor or value that is not declared, one that is missing, or another shape.
        """
        unread = unread or {}
        present = [*self.entries, *self._unreadable]
        location.refuse_unknown(self.path.name, (name for name in present if name not in {*used, *unread}))
        for name, shape in used.items():
            self.expect(name, shape)
            if shape and self.entries[name].whole:
                raise self.refuse(
                    f"tensor {name!r} holds whole numbers: it may be quantised, and nothing says by what scale",
                    "Convert it to float32.",
                )
        for name, tensor in unread.items():
            if name in self.entries and tensor.shape is not None:
                self.expect(name, tensor.shape)
        self._declared = frozenset(used) | frozenset(unread)
        return Config(location, self.path.name, self.metadata, beside)

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Array:
        """Stored values of rows start..stop along the first axis (a scalar has one row). Called in ascending order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape. Raises WatchlistRefused when the file has no tensor of that name."""
        if name in self._unreadable:
            raise self.refuse(f"tensor {name!r} has dtype {self._unreadable[name]}", "Convert it to float32.")
        if name not in self.entries:
            raise self.refuse(
                f"tensor {name!r} is missing (the file has {', '.join(sorted(self.entries)[:12]) or 'none'})",
                "Check that the 'format' of this source is right.",
            )
        return self.entries[name].shape

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape, naming a transposed one as such."""
        found = self.shape(name)
        if found == shape:
            return
        if len(shape) == 2 and found == shape[::-1]:
            raise self.refuse(
                f"tensor {name!r} is stored transposed, {list(found)} where this format has {list(shape)}",
                "Check the 'format' of this source, or save the tensor the way the format defines it.",
            )
        raise self.refuse(
            f"tensor {name!r} has shape {list(found)} where the rest of the source says {list(shape)}",
            "Check that the configuration and the weights belong together.",
        )

    def matrix(self, name: str) -> tuple[int, int]:
        """The two sizes of a matrix that is not empty; anything else is refused."""
        shape = self.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise self.refuse(
                f"tensor {name!r} has shape {list(shape)}, not a matrix", "Check the 'format' of this source."
            )
        return shape[0], shape[1]

    def vector(self, name: str) -> int:
        """The size of a vector that is not empty; anything else is refused."""
        shape = self.shape(name)
        if len(shape) != 1 or 0 in shape:
            raise self.refuse(
                f"tensor {name!r} has shape {list(shape)}, not a vector", "Check the 'format' of this source."
            )
        return shape[0]

    def scalar(self, name: str) -> float:
        """A single number; anything else is refused."""
        shape = self.shape(name)
        if math.prod(shape) != 1:
            raise self.refuse(
                f"tensor {name!r} has shape {list(shape)}, not one number", "Check the 'format' of this source."
            )
        return float(self.whole(name).reshape(()))

    def rows(self, name: str, index_K: Sequence[int]) -> F64:
        """The chosen slices along the first axis, float64 [K, ...], in the order asked for."""
        entry = self._entry(name)
        if isinstance(index_K, range) and index_K.step == 1 and len(index_K) > 0:
            return self._finite(name, entry.decode(self.read(name, index_K.start, index_K.stop)))
        by_row = {row: self.read(name, row, row + 1)[0] for row in sorted(set(index_K))}
        return self._finite(name, entry.decode(np.stack([by_row[row] for row in index_K])))

    def columns(self, name: str, index_K: Sequence[int]) -> F64:
        """The chosen slices along the second axis as rows, float64 [K, D]."""
        entry = self._entry(name)
        step = max(1, BLOCK_BYTES // max(1, entry.row_bytes))
        index = np.asarray(index_K)
        parts = [
            np.ascontiguousarray(self.read(name, start, min(start + step, entry.shape[0]))[:, index].T)
            for start in range(0, entry.shape[0], step)
        ]
        return self._finite(name, entry.decode(np.concatenate(parts, axis=1)))

    def whole(self, name: str) -> F64:
        """A small tensor, all of it, as float64."""
        self.shape(name)
        entry = self._entry(name)
        raw = self.read(name, 0, entry.shape[0] if entry.shape else 1)
        return self._finite(name, entry.decode(raw).reshape(entry.shape))

    def refuse(self, found: str, instead: str) -> WatchlistRefused:
        """The error of this file."""
        return refuse_file(self.path, found, instead)

    def _entry(self, name: str) -> Entry:
        assert self._declared is None or name in self._declared, f"{name} is read and not declared"
        return self.entries[name]

    def _finite(self, name: str, values: F64) -> F64:
        if not np.isfinite(values).all():
            raise self.refuse(
                f"tensor {name!r} holds NaN or infinity in what the watchlist selects",
                "Leave these features out, or fetch the file again if it is damaged.",
            )
        return values


class SafetensorsFile(Tensors):
    """A .safetensors file, read slice by slice with the header checked by the safetensors library."""

    def __init__(self, path: Path) -> None:
        header = _safetensors_header(path)
        self._metadata = header.metadata
        entries, unreadable = {}, {}
        for name, fields in header.tensors.items():
            code = fields["dtype"]
            if code not in _SAFETENSORS_DTYPES:
                unreadable[name] = code
                continue
            shape = tuple(int(size) for size in fields["shape"])
            entries[name] = Entry(
                shape,
                np.dtype(_SAFETENSORS_DTYPES[code]),
                code == "BF16",
                header.data_start + fields["data_offsets"][0],
                code.startswith("I"),
            )
        super().__init__(path, entries, unreadable)

    @property
    def metadata(self) -> Mapping[str, object]:
        return self._metadata

    def read(self, name: str, start: int, stop: int) -> Array:
        entry = self.entries[name]
        row_items = entry.row_bytes // entry.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(entry.offset + start * entry.row_bytes)
            raw = np.fromfile(file, entry.dtype, (stop - start) * row_items)
        if raw.size != (stop - start) * row_items:
            raise self.refuse(f"it ends inside tensor {name!r}", "Fetch the file again.")
        return raw.reshape(stop - start, *entry.shape[1:])


class _TensorFields(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


class _Header(NamedTuple):
    tensors: Mapping[str, _TensorFields]
    metadata: Mapping[str, str]
    data_start: int
    """Offset in the file."""


def _safetensors_header(path: Path) -> _Header:
    """The header, checked by the library."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except Exception as error:
        # safetensors raises its own SafetensorError, which is not a ValueError; all mean a damaged or foreign file.
        raise refuse_file(path, f"not a whole .safetensors file ({str(error)[:160]})", "Fetch it again.") from error
    metadata = header.pop("__metadata__", {})
    return _Header(header, metadata, 8 + length)


def refuse_file(path: Path, found: str, instead: str) -> WatchlistRefused:
    """The error of a file of a source."""
    return WatchlistRefused(f"source file {path.name}", found=found, instead=instead, reason=RefusalReason.SOURCE_FILE)
