"""GGUF files of float tensors: the control vectors of repeng and llama.cpp, read with gguf, llama.cpp's own package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader

from latentwatch.arrays import Array
from latentwatch.watchlist.tensors import Entry, Tensors, refuse_file

MAX_BYTES: Final = 1 << 30
"""A control vector has one row per layer; a model in this format is refused before it is read."""
MAX_PARTS: Final = 1 << 14
"""Numbers, names and arrays that the header may be made of: six for each layer of a control vector."""
_FLOATS: Final = (GGMLQuantizationType.F64, GGMLQuantizationType.F32, GGMLQuantizationType.F16)


_Order = Literal["I", "S", "<"] | None


class GgufFile(Tensors):
    """The float tensors of a GGUF file and its key-value pairs."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise refuse_file(path, f"{size} bytes: a model, not a control vector", "Give the control vector's file.")
        try:
            reader = _BoundedReader(path)
            self.pairs: Final = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:
            # gguf and NumPy raise a dozen kinds between them; all mean a damaged or foreign file.
            raise refuse_file(path, f"not a whole GGUF file ({str(error)[:160]})", "Fetch it again.") from error
        self._data: Final = {tensor.name: tensor.data for tensor in reader.tensors if tensor.tensor_type in _FLOATS}
        super().__init__(
            path,
            {name: Entry(data.shape, data.dtype) for name, data in self._data.items()},
            {
                tensor.name: f"{tensor.tensor_type.name} of GGML"
                for tensor in reader.tensors
                if tensor.name not in self._data
            },
        )

    @property
    def metadata(self) -> Mapping[str, object]:
        return self.pairs

    def read(self, name: str, start: int, stop: int) -> Array:
        return self._data[name][start:stop]


class _BoundedReader(GGUFReader):
    """gguf takes what a damaged header says at its word: it returns less than it was asked for at the file's end, and
    builds one object a number for as many numbers as an array claims to have. This one stops at either."""

    _parts = 0

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: _Order = None) -> Array:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise ValueError(f"a header of more than {MAX_PARTS} parts")
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"a count of {count} at byte {offset}, beyond its end")
        return super()._get(offset, dtype, count, override_order)
