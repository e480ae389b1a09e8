"""GGUF files of float32 and float16 tensors: the control vectors of repeng and llama.cpp.

Layout (version 2 and 3, little endian): magic "GGUF", version, tensor count, pair count; key-value pairs; per tensor
its name, sizes (fastest first), type and offset; then, aligned, the data. Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, Final

import numpy as np

from latentwatch.watchlist.tensors import Entry, Raw, Tensors, refuse_file

MAX_BYTES: Final = 1 << 30
"""A control vector has one row per layer; a model in this format is refused before it is read."""
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS: Final = {0: "<f4", 1: "<f2", 28: "<f8"}
_ALIGNMENT: Final = 32


class GgufFile(Tensors):
    """The float tensors of a GGUF file and its key-value pairs."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise refuse_file(path, f"{size} bytes: a model, not a control vector", "Give the control vector's file.")
        self._data = path.read_bytes()
        try:
            self.pairs, entries, unreadable = _Reader(self._data).parse()
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError, RecursionError) as error:
            raise refuse_file(path, f"not a whole GGUF file ({error})", "Fetch it again.") from error
        for name, entry in entries.items():
            if entry.offset + math.prod(entry.shape) * entry.dtype.itemsize > size:
                raise refuse_file(path, f"it ends inside tensor {name!r}", "Fetch it again.")
        super().__init__(path, entries, unreadable)

    def read(self, name: str, start: int, stop: int) -> Raw:
        entry = self.entries[name]
        first = entry.offset + start * entry.row_bytes
        data = self._data[first : first + (stop - start) * entry.row_bytes]
        return np.frombuffer(data, entry.dtype).reshape(stop - start, *entry.shape[1:])


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, Entry], dict[str, str]]:
        if self._data[:4] != b"GGUF":
            raise ValueError("the magic is missing")
        self._at = 4
        version, tensors, pairs = self._take("IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        fields = {self._string(): self._value() for _ in range(self._bounded(pairs, 12))}
        infos = [self._info() for _ in range(self._bounded(tensors, 24))]
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}")
        start = -(-self._at // alignment) * alignment
        entries, unreadable = {}, {}
        for name, shape, code, offset in infos:
            if code in _FLOATS:
                entries[name] = Entry(shape, np.dtype(_FLOATS[code]), offset=start + offset)
            else:
                unreadable[name] = f"GGML type {code}"
        if len(entries) + len(unreadable) != len(infos):
            raise ValueError("two tensors have one name")
        return fields, entries, unreadable

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._data, self._at)
        self._at += struct.calcsize("<" + form)
        return values

    def _bounded(self, count: int, least_bytes: int) -> int:
        """A count that the rest of the file can hold: a damaged one must not start a loop of 2^60 steps."""
        if count * least_bytes > len(self._data) - self._at:
            raise ValueError(f"a count of {count}")
        return count

    def _string(self) -> str:
        (length,) = self._take("Q")
        self._bounded(length, 1)
        text = self._data[self._at : self._at + length].decode()
        self._at += length
        return text

    def _value(self, code: int | None = None) -> Any:
        if code is None:
            (code,) = self._take("I")
        if code == _STRING:
            return self._string()
        if code == _ARRAY:
            inner, count = self._take("IQ")
            return [self._value(inner) for _ in range(self._bounded(count, 1))]
        if code not in _SCALARS:
            raise ValueError(f"value type {code}")
        return self._take(_SCALARS[code])[0]

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._take("I")
        if dimensions > 4:
            raise ValueError(f"{dimensions} dimensions")
        sizes = self._take(f"{dimensions}Q")
        code, offset = self._take("IQ")
        return name, tuple(reversed(sizes)), code, offset
