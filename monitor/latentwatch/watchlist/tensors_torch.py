"""PyTorch .pt and .pth files, read with `weights_only=True`: a pickle that names any other code is refused."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch

from latentwatch.arrays import Array
from latentwatch.watchlist.tensors import Entry, Tensors, refuse_file

_DTYPES: Final = {torch.float64: "<f8", torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<u2"}
_INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)
ROOT: Final = ""
"""Name of the tensor in a file that holds one tensor and no mapping."""


class TorchFile(Tensors):
    """The tensors of a state dict, mapped from disk and not loaded."""

    def __init__(self, path: Path, key: str | None = None) -> None:
        """`key`: the entry of the file that holds the state dict, where it is not the file's whole content."""
        loaded = _load(path)
        if key is not None:
            if not isinstance(loaded, dict) or key not in loaded:
                raise refuse_file(path, f"it has no entry {key!r}", "Check the 'format' of this source.")
            loaded = loaded[key]
        values: Mapping[object, object] = loaded if isinstance(loaded, Mapping) else {ROOT: loaded}
        self._tensors = {str(name): value for name, value in values.items() if isinstance(value, torch.Tensor)}
        self.other: Final = {str(name): value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        """Entries that are not tensors: names, numbers."""
        entries, unreadable = {}, {}
        for name, tensor in self._tensors.items():
            if tensor.layout != torch.strided or tensor.dtype not in (*_DTYPES, *_INTEGERS):
                unreadable[name] = f"{tensor.dtype}, layout {tensor.layout}"
            else:
                dtype = np.dtype(_DTYPES.get(tensor.dtype, "<f8"))
                whole = tensor.dtype in _INTEGERS
                entries[name] = Entry(tuple(tensor.shape), dtype, tensor.dtype == torch.bfloat16, whole=whole)
        super().__init__(path, entries, unreadable)

    @property
    def metadata(self) -> Mapping[str, object]:
        return self.other

    def read(self, name: str, start: int, stop: int) -> Array:
        tensor = self._tensors[name].detach()
        rows = (tensor.reshape(1) if tensor.ndim == 0 else tensor[start:stop]).contiguous()
        if rows.dtype == torch.bfloat16:
            rows = rows.view(torch.uint16)
        elif rows.dtype in _INTEGERS:
            rows = rows.double()
        return np.asarray(rows.numpy())


def _load(path: Path) -> object:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of torch < 1.6 are no zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = f"a pickle that asks for code or is damaged ({' '.join(str(error).split())[:160]})"
        raise refuse_file(
            path, found, "Ask its authors for a .safetensors file, or save its state dict alone."
        ) from error
    except Exception as error:
        # A damaged archive or pickle can raise nearly anything out of torch; none of it may escape as a traceback.
        found = f"not a whole PyTorch file ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        raise refuse_file(path, found, "Fetch it again.") from error
