"""Other people's files, changed: every container that sources come in, read whole, edited and written again.

Used to ask each reader what it does with a file that it was not written for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
import yaml
from latentwatch.names import HookPoint
from latentwatch.watchlist import agreement, build, canonical
from latentwatch.watchlist.file import ModelCard
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.selection import SourceChoice
from latentwatch.watchlist.sources import Source, SourceOptions, open_source

from tests.support.parity import GOLDEN, cases
from tests.support.sources import probe

Tensors = dict[str, np.ndarray]
CONTAINERS = (".safetensors", ".pt", ".pth", ".npz", ".gguf")
CONFIGS = (".json", ".yaml")


@dataclass(frozen=True)
class Fixture:
    """A valid source in a folder of its own, and how a watchlist names it."""

    format: str
    folder: Path
    path: str
    layer: int
    options: Mapping[str, Any]

    @property
    def files(self) -> list[Path]:
        """The source's own files."""
        extra = ("case.json", "expected.safetensors")
        return sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name not in extra)

    def opened(self, layer: int | None = None, path: str | None = None, **options: Any) -> Source:
        """Open it as `watchlist build` does, sizes of the model included."""
        choice = self.choice(path, **options)
        point = HookPoint(self.layer if layer is None else layer)
        source = open_source(choice.format, choice.location, point, choice.options)
        # Six layers, as the golden persona vectors have, unless the source is of a later one.
        layers = 6 if self.layer < 5 else self.layer + 2
        build._check_model(source, choice, ModelCard("tiny", "T", 16, layers, 100, ("float32",)), point)
        return source

    def choice(self, path: str | None = None, **options: Any) -> SourceChoice:
        """What a watchlist.yaml would say of it."""
        location = Location(self.path if path is None else path, self.folder)
        given = SourceOptions(**{**self.options, **options})
        return SourceChoice("here", self.format, location, given, None, None, (), ())

    def encoded(self) -> np.ndarray:
        """Every row's activations on random tokens, before any TopK."""
        source = self.opened()
        rows = source.rows(range(source.about.width))
        canonical.fold(rows)
        return canonical.authors(rows, agreement.tokens(source.about.d_in))

    def judged(self) -> str:
        """What its own library says of all its rows; raises WatchlistRefused if that is something else."""
        source = self.opened()
        return agreement.checked(self.choice(), source, range(source.about.width))


def names() -> list[str]:
    """The golden cases, and a probe of our own format."""
    return [*cases(), "linear_probe"]


def one_per_kind() -> list[str]:
    """Of the cases that differ in a norm or a flag alone, the first: for what is slow."""
    kept: dict[str, str] = {}
    for name in names():
        kind = name.split("_none_")[0].split("_constant_norm_")[0].split("_layer_norm_")[0]
        kept.setdefault(kind, name)
    return list(kept.values())


def fixture(name: str, folder: Path) -> Fixture:
    """A copy of a case that a test may damage."""
    if name == "linear_probe":
        given = {"mean": np.linspace(-1, 1, 16), "scale": np.linspace(1, 2, 16)}
        probe(folder / "p.safetensors", metadata={"hook_point": "resid_post.3"}, **given)
        return Fixture("linear_probe", folder, "p.safetensors", 3, {})
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    spec = json.loads((folder / "case.json").read_text())
    return Fixture(spec["format"], folder, spec["path"], spec["layer"], spec.get("options", {}))


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file and what stands beside them."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 not a mapping
    if path.suffix == ".npz":
        return dict(np.load(path)), {}
    if path.suffix == ".gguf":
        from latentwatch.watchlist.tensors_gguf import GgufFile

        file = GgufFile(path)
        beside = {name: value for name, value in file.pairs.items() if not name.startswith("GGUF.")}
        return {name: file.read(name, 0, entry.shape[0]) for name, entry in file.entries.items()}, beside
    loaded = torch.load(path, weights_only=True)
    if isinstance(loaded, torch.Tensor):
        return {"": loaded.numpy()}, {}
    tensors = {name: value.numpy() for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in loaded.items() if name not in tensors}


def write_tensors(path: Path, tensors: Tensors, beside: Mapping[str, Any]) -> None:
    """The reverse of `read_tensors`."""
    whole = {name: np.array(array, copy=True, order="C") for name, array in tensors.items()}
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(whole, path, {name: str(value) for name, value in beside.items()} or None)
    elif path.suffix == ".npz":
        np.savez(path, **whole)
    elif path.suffix == ".gguf":
        _write_gguf(path, whole, beside)
    else:
        state = {name: torch.from_numpy(array) for name, array in whole.items()} | dict(beside)
        torch.save(state[""] if list(state) == [""] else state, path)


def _write_gguf(path: Path, tensors: Tensors, beside: Mapping[str, Any]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, str(beside.get("general.architecture", "controlvector")))
    for name, value in beside.items():
        if name != "general.architecture":
            (writer.add_uint32 if isinstance(value, int) else writer.add_string)(name, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def edit_tensors(path: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> None:
    """Change a file's tensors, and what stands beside them, in place."""
    tensors, beside = read_tensors(path)
    change(tensors, beside)
    write_tensors(path, tensors, beside)


def read_config(path: Path) -> Any:
    """A JSON or YAML configuration."""
    return yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())


def write_config(path: Path, content: Any) -> None:
    """The reverse of `read_config`."""
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content))


def sections(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every object in a configuration, with the keys that lead to it."""
    if isinstance(content, dict):
        yield path, content
        for key, value in content.items():
            yield from sections(value, (*path, key))
