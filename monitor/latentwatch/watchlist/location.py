"""Where a source lies: a folder or file on disk, or `hf:owner/name[@revision]/path` in the Hugging Face hub.

Every configuration is read against what its reader declares: a name that the reader does not know is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.watchlist.declared import Known

MAX_CONFIG_BYTES: Final = 16 << 20
_T = TypeVar("_T")
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.*))?", re.ASCII)


@dataclass(frozen=True)
class Location:
    """A source as the YAML names it. Files are fetched only when a reader asks for them."""

    text: str
    """As written; this is what errors and cards show, never a path of the machine that built the watchlist."""
    base: Path
    """The folder that a relative path starts from: the one that the YAML lies in."""
    ignored: frozenset[str] = frozenset()
    """Unknown names in its files of which a person says that activations do not depend on them."""
    met: set[str] = field(default_factory=set, compare=False, repr=False)
    """Those of them that a file has."""

    def file(self, name: str = "") -> Path:
        """The path of a file in the source's folder, or of the source itself.

        Raises: WatchlistRefused: there is no such file, or the hub cannot be reached.
        """
        path = self._hub(name) if self.text.startswith("hf:") else self._local(name)
        if not path.is_file():
            shown = f"file {name!r}" if name else "file"
            folder = path if path.is_dir() else path.parent
            found = f"no {shown} there" if not folder.is_dir() else f"no {shown} there, only {_listing(folder)}"
            raise self.refuse(found, "Give the path that the format expects, relative to the YAML file.")
        return path

    def has(self, name: str) -> bool:
        """Whether the source's folder holds a file of this name."""
        try:
            return self.file(name).is_file()
        except WatchlistRefused:
            return False

    def folder(self) -> Path:
        """The source's folder on disk. Raises WatchlistRefused when it is none, or in the hub."""
        path = self._local("")
        if self.text.startswith("hf:") or not path.is_dir():
            raise self.refuse("it is not a folder on disk", "Give the path of the downloaded folder.")
        return path

    @property
    def is_file(self) -> bool:
        """Whether the source is one file and not a folder."""
        return self.has("")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names on the way to where the source really lies, its own last: `..` and links are followed.

        A file's own name is taken as written, since a hub's cache links it to one that says nothing.
        """
        if match := _HUB.fullmatch(self.text):
            return (*match["repo"].split("/"), *(part for part in (match["path"] or "").split("/") if part))
        path = self._local("")
        return path.resolve().parts if path.is_dir() else (*path.parent.resolve().parts, path.name)

    def passes_over(self, name: str) -> bool:
        """Whether a person says that activations do not depend on this unknown name."""
        if name in self.ignored:
            self.met.add(name)
        return name in self.ignored

    def refuse_unmet(self) -> None:
        """Refuse a name to be ignored that no file of the source has, or that its reader knows."""
        if unmet := sorted(self.ignored - self.met):
            raise self.refuse(
                f"option ignore names {', '.join(unmet)}, which is no unknown name of its files",
                "Remove it.",
                RefusalReason.SOURCE_OPTION,
            )

    def refuse_unknown(self, place: str, names: Iterable[str]) -> None:
        """Refuse names that the reader of this source does not know; `place` says where they stand."""
        if unknown := [name for name in names if not self.passes_over(name)]:
            shown = ", ".join(repr(name) for name in unknown[:6]) + (", ..." if len(unknown) > 6 else "")
            raise self.refuse(
                f"{place} has {shown}, which the reader of this format does not know and which may change the numbers",
                "Check the 'format' of this source. If you know that activations do not depend on it, name it under "
                "option ignore.",
                RefusalReason.SOURCE_UNKNOWN,
            )

    def config(self, name: str, known: Known) -> Config:
        """A JSON object from the source's folder, of which the reader knows these names."""
        return Config(self, name, self.json(name), known)

    def json(self, name: str) -> dict[str, object]:
        """A JSON object from the source's folder."""
        path = self.file(name)
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise self.refuse(f"{path.name} has {path.stat().st_size} bytes", "This is not a configuration file.")
        try:
            value = strict_json(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise self.refuse(f"{path.name} is not JSON ({error})", "Fetch the file again.") from error
        if not isinstance(value, dict):
            raise self.refuse(f"{path.name} holds {type(value).__name__}, not an object", "Fetch the file again.")
        return value

    def refuse(self, found: str, instead: str, reason: str = RefusalReason.SOURCE_FILE) -> WatchlistRefused:
        """The error of this source."""
        return WatchlistRefused(f"source {self.text!r}", found=found, instead=instead, reason=reason)

    def _local(self, name: str) -> Path:
        path = self.base / self.text
        # Where the user has no home, `~` is a name like any other.
        with contextlib.suppress(RuntimeError):
            path = path.expanduser()
        return path / name if name else path

    def _hub(self, name: str) -> Path:
        match = _HUB.fullmatch(self.text)
        if match is None:
            raise self.refuse("it is not hf:owner/name[@revision]/path", "Write it like hf:google/gemma-scope/layer_1.")
        if {".", ".."} & set((match["path"] or "").split("/")):
            raise self.refuse("its path in the hub has '.' or '..'", "Write the path out.")
        try:
            hub = importlib.import_module("huggingface_hub")
        except ImportError as error:
            raise self.refuse(
                "the package huggingface_hub is not installed",
                "In a clone: pip install '.[convert]', or give a local path.",
            ) from error
        path = "/".join(part for part in ((match["path"] or "").strip("/"), name) if part)
        if not path:
            return Path("/nonexistent")
        try:
            return Path(hub.hf_hub_download(match["repo"], path, revision=match["revision"]))
        except Exception as error:
            # The hub client raises its own, requests' and OS errors; each means that the file cannot be had.
            raise self.refuse(
                f"the hub gives no {path!r} ({type(error).__name__}: {str(error).splitlines()[0][:160]})",
                "Check the name and revision, or download the files and give a local path.",
            ) from error


@dataclass(frozen=True)
class Config:
    """The fields of a source's configuration, all of which its reader knows.

    A value of another type than asked for is refused, never converted. Only declared names can be asked for.

    Raises: WatchlistRefused: a name that the reader does not know, or a value that it does not implement.
    """

    location: Location
    file: str
    fields: Mapping[str, object]
    known: Known
    prefix: str = ""
    """Of the names in errors: the section that these fields are of."""

    def __post_init__(self) -> None:
        unknown = [self.prefix + name for name in self.known.unknown(self.fields)]
        self.location.refuse_unknown(self.file, unknown)
        for name, values in self.known.unimplemented(self.fields):
            raise self.location.refuse(
                f"{self.file} has {self.prefix}{name} = {str(self.fields[name])[:80]!r}; only "
                f"{' and '.join(map(repr, values))} can be read exactly",
                "Use another source, or one of another architecture.",
                RefusalReason.SOURCE_ARCHITECTURE,
            )

    def text(self, key: str) -> str | None:
        """A string; None where the key is missing or null."""
        return self._typed(key, "text", str)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; the default only where the key is missing."""
        if key in self.fields and self.fields[key] is None:
            raise self.refuse(key, "true or false")
        value = self._typed(key, "true or false", bool)
        return default if value is None else value

    def count(self, key: str) -> int | None:
        """A whole number above zero."""
        value = self._typed(key, "a whole number above zero", int)
        if value is not None and value < 1:
            raise self.refuse(key, "a whole number above zero")
        return value

    def index(self, key: str) -> int | None:
        """A whole number from zero on: a layer."""
        value = self._typed(key, "a whole number", int)
        if value is not None and value < 0:
            raise self.refuse(key, "a whole number from 0 on")
        return value

    def number(self, key: str) -> float | None:
        """A finite number."""
        value = self._typed(key, "a number", int, float)
        if value is not None and not math.isfinite(value):
            raise self.refuse(key, "a finite number")
        return None if value is None else float(value)

    def section(self, key: str, known: Known) -> Config:
        """An object, of which the reader knows these names; an empty one where the key is missing or null."""
        fields = self._typed(key, "an object", dict) or {}
        return Config(self.location, self.file, fields, known, f"{self.prefix}{key}.")

    def agrees(self, key: str, size: int) -> None:
        """Refuse a whole number, where one stands there, that is not what the tensors or other fields say."""
        stated = self.index(key)
        if stated is not None and stated != size:
            raise self.location.refuse(
                f"{self.file} has {self.prefix}{key} = {stated} where the rest of the source says {size}",
                "Check that the configuration and the weights belong together.",
                RefusalReason.SOURCE_NUMBERS,
            )

    def noted(self, *keys: str) -> dict[str, object]:
        """Those of the fields that are plain values, for a card."""
        return {key: self.fields[key] for key in keys if isinstance(self.fields.get(key), str | int | bool)}

    def refuse(self, key: str, expected: str) -> WatchlistRefused:
        """The error of one field."""
        found = f"{self.file} has {key} = {str(self.fields.get(key))[:80]!r}, not {expected}"
        return self.location.refuse(found, "Fetch the file again, or check the 'format' of this source.")

    def _typed(self, key: str, expected: str, *types: type[_T]) -> _T | None:
        assert key in self.known.used, f"{key} is read and not declared as used"
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.refuse(key, expected)
        return value


def strict_json(text: str | bytes) -> object:
    """JSON in which no key of an object stands twice. Raises ValueError or RecursionError."""
    parsed: object = json.loads(text, object_pairs_hook=_once)
    return parsed


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return fields


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"
