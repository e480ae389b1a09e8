"""Published encoders in every format, from the golden fixtures: config and weights as one input."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import FORMATS, SourceOptions, open_source

from tests.fuzz.targets.target import Target, bundle, files_of, put, scratch
from tests.support import sources
from tests.support.parity import GOLDEN

_OURS = ("case.json", "expected.safetensors")
_ROWS = 4
LAYER = 3
_SHARED = ("watchlist/tensors.py", "watchlist/location.py", "watchlist/canonical.py", "watchlist/sources/__init__.py")
_DECLARED = ("watchlist/declared.py", "watchlist/places.py")
_CONTAINERS = ("watchlist/tensors_torch.py", "watchlist/tensors_npz.py", "watchlist/tensors_gguf.py")


@dataclass(frozen=True)
class Case:
    """One golden source."""

    name: str
    folder: Path
    spec: dict[str, Any]
    files: tuple[str, ...]

    def seed(self, number: int) -> bytes:
        return bytes([number]) + bundle(*((self.folder / file).read_bytes() for file in self.files))


@functools.cache
def cases(format_name: str) -> tuple[Case, ...]:
    """Of a format, in the order of their names."""
    return tuple(case for case in _golden() if case.spec["format"] == format_name)


def _golden() -> Iterator[Case]:
    probe = sources.probe(scratch() / "golden-probe" / "p.safetensors", metadata={"hook_point": f"resid_post.{LAYER}"})
    spec = {"format": "linear_probe", "path": "p.safetensors", "layer": LAYER}
    yield Case("linear_probe", probe.parent, spec, (probe.name,))
    for about in sorted(GOLDEN.glob("*/case.json")):
        folder = about.parent
        paths = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        yield Case(
            folder.name,
            folder,
            json.loads(about.read_text()),
            tuple(sorted(path for path in paths if path not in _OURS)),
        )


def check(format_name: str, data: bytes) -> None:
    """Read a source as a watchlist would, twice."""
    known = cases(format_name)
    case = known[(data[0] if data else 0) % len(known)]
    base = scratch() / case.name
    for name, content in zip(case.files, files_of(data[1:], len(case.files)), strict=True):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        put(base / name, content)
    point = HookPoint(case.spec["layer"])
    location, options = Location(case.spec["path"], base), SourceOptions(**case.spec.get("options", {}))
    source = open_source(format_name, location, point, options)
    assert source.about.width >= 1 and source.about.d_in >= 1
    index = range(min(_ROWS, source.about.width))
    folded, again = (canonical.fold(source.rows(index)) for _ in range(2))
    assert all(np.array_equal(one, other, equal_nan=True) for one, other in zip(folded, again, strict=True))
    assert folded[0].shape == (len(index), source.about.d_in)
    if source.decoder is not None:
        assert np.isfinite(source.decoder.rows(index)).all() and np.isfinite(source.decoder.bias()).all()
    for row in index:
        json.dumps(source.row_notes(row), allow_nan=False)
    json.dumps(source.about.notes, allow_nan=False)


SOURCES = [
    Target(
        f"source {name}",
        functools.partial(check, name),
        lambda name=name: [case.seed(number) for number, case in enumerate(cases(name))],
        (f"watchlist/sources/{name}.py", *_SHARED, *_DECLARED, *_CONTAINERS),
        (
            b'"dtype":"F32"',
            b'"dtype":"BF16"',
            b'"shape":[',
            b'"data_offsets":[',
            b"null",
            b"true",
            b"-1",
            b"1e999",
            b"NaN",
        ),
    )
    for name in FORMATS
]
