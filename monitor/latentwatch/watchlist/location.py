"""Where a source lies: a folder or file on disk, or `hf:owner/name[@revision]/path` in the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from latentwatch.errors import RefusalReason, WatchlistRefused

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

    def config(self, name: str) -> Config:
        """A JSON object from the source's folder, whose values are checked as they are asked for."""
        return Config(self, name, self.json(name))

    def json(self, name: str) -> dict[str, object]:
        """A JSON object from the source's folder."""
        path = self.file(name)
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise self.refuse(f"{path.name} has {path.stat().st_size} bytes", "This is not a configuration file.")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
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
        try:
            hub = importlib.import_module("huggingface_hub")
        except ImportError as error:
            raise self.refuse(
                "the package huggingface_hub is not installed", "Install latentwatch[convert], or give a local path."
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
    """The fields of a source's configuration. A value of another type than asked for is refused, never converted."""

    location: Location
    file: str
    fields: Mapping[str, object]

    def text(self, key: str) -> str | None:
        """A string; None where the key is missing or null."""
        return self._typed(key, "text", str)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._typed(key, "true or false", bool)
        return default if value is None else value

    def count(self, key: str) -> int | None:
        """A whole number above zero."""
        value = self._typed(key, "a whole number above zero", int)
        if value is not None and value < 1:
            raise self.refuse(key, "a whole number above zero")
        return value

    def number(self, key: str) -> float | None:
        """A finite number."""
        value = self._typed(key, "a number", int, float)
        if value is not None and not math.isfinite(value):
            raise self.refuse(key, "a finite number")
        return None if value is None else float(value)

    def section(self, key: str) -> Config:
        """An object; an empty one where the key is missing or null."""
        return Config(self.location, self.file, self._typed(key, "an object", dict) or {})

    def noted(self, *keys: str) -> dict[str, object]:
        """Those of the fields that are plain values, for a card."""
        return {key: self.fields[key] for key in keys if isinstance(self.fields.get(key), str | int | bool)}

    def refuse(self, key: str, expected: str) -> WatchlistRefused:
        """The error of one field."""
        found = f"{self.file} has {key} = {str(self.fields.get(key))[:80]!r}, not {expected}"
        return self.location.refuse(found, "Fetch the file again, or check the 'format' of this source.")

    def _typed(self, key: str, expected: str, *types: type[_T]) -> _T | None:
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.refuse(key, expected)
        return value


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
