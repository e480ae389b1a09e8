"""NumPy .npz files, streamed: an array of some gigabytes inside the archive is read block by block."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from latentwatch.arrays import Array, Dtype
from latentwatch.watchlist.tensors import Entry, Tensors, refuse_file


class NpzFile(Tensors):
    """A .npz archive of numeric arrays in C order."""

    def __init__(self, path: Path) -> None:
        entries, unreadable = {}, {}
        try:
            self._archive = zipfile.ZipFile(path)
            for member in self._archive.namelist():
                name = member.removesuffix(".npy")
                with self._archive.open(member) as stream:
                    shape, fortran, dtype = _header(stream)
                if min(shape, default=0) < 0:
                    raise ValueError(f"shape {shape}")
                if dtype.kind != "f" or fortran:
                    unreadable[name] = f"{dtype}{', stored by columns' if fortran else ''}"
                else:
                    entries[name] = Entry(shape, dtype)
        except Exception as error:
            # zipfile, zlib and NumPy's header parser raise a dozen kinds between them; all mean a damaged file.
            raise refuse_file(path, f"not a whole .npz file ({str(error)[:160]})", "Fetch it again.") from error
        self._open: dict[str, tuple[IO[bytes], int]] = {}
        super().__init__(path, entries, unreadable)

    def read(self, name: str, start: int, stop: int) -> Array:
        """A read at or after the last one goes on in the same stream; an earlier one starts the member again."""
        entry = self.entries[name]
        stream, row = self._open.get(name, (None, 0))
        if stream is None or start < row:
            stream, row = self._archive.open(f"{name}.npy"), 0
            _header(stream)
        try:
            _skip(stream, (start - row) * entry.row_bytes)
            data = stream.read((stop - start) * entry.row_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            raise self.refuse(f"array {name!r} is damaged ({error})", "Fetch the file again.") from error
        if len(data) != (stop - start) * entry.row_bytes:
            raise self.refuse(f"it ends inside array {name!r}", "Fetch the file again.")
        self._open[name] = (stream, stop)
        return np.frombuffer(data, entry.dtype).reshape(stop - start, *entry.shape[1:])


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, Dtype]:
    layout: Any = np.lib.format  # not typed by NumPy
    version = layout.read_magic(stream)
    read = layout.read_array_header_1_0 if version == (1, 0) else layout.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return tuple(shape), bool(fortran), dtype


def _skip(stream: IO[bytes], count: int) -> None:
    while count > 0:
        skipped = len(stream.read(min(count, 1 << 20)))
        if skipped == 0:
            return
        count -= skipped
