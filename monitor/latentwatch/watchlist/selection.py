"""Read watchlist.yaml, the file that a person writes: parse, check against schema.json, name what is wrong and where.

Nothing in the file is executed: plain YAML scalars, lists and mappings only; no tags, no aliases, no key twice.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jsonschema
import yaml

from latentwatch.errors import ConfigRefused, WatchlistRefused
from latentwatch.names import HookPoint, Severity
from latentwatch.watchlist.file import Limit, ModelCard
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import SourceOptions

MAX_YAML_BYTES: Final = 8 << 20
_DEFAULT_SKIP: Final = 1
_YAML_TYPES: Final = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", type(None): "empty"}

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class FeatureChoice:
    """One feature that the YAML asks for."""

    where: str
    """Its place in the YAML, for errors."""
    index: int | None
    """Row of the source; None where `name` is given instead."""
    name: str | None
    id: str
    label: str | None
    """None where the source's label lists must know it."""
    severity: Severity
    skip_first_positions: int
    limit: Limit | None
    evidence: Mapping[str, Any]


@dataclass(frozen=True)
class Calibration:
    """On what, and how, the gates of a TopK source are matched."""

    activations: Location
    match: str
    """"rate" or "l0"."""


@dataclass(frozen=True)
class LabelList:
    """A published list of labels."""

    format: str
    location: Location


@dataclass(frozen=True)
class SourceChoice:
    """One source and what is wanted of it."""

    where: str
    format: str
    location: Location
    options: SourceOptions
    licence: str | None
    calibration: Calibration | None
    labels: tuple[LabelList, ...]
    features: tuple[FeatureChoice, ...]


@dataclass(frozen=True)
class HookChoice:
    """One hook point and its sources."""

    where: str
    hook_point: HookPoint
    sources: tuple[SourceChoice, ...]


@dataclass(frozen=True)
class Selection:
    """A checked watchlist.yaml."""

    name: str
    notes: str
    model: ModelCard
    hooks: tuple[HookChoice, ...]
    """In layer order."""


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of watchlist.yaml."""
    text = resources.files("latentwatch.watchlist").joinpath("schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def load(path: Path) -> Selection:
    """Read and check a watchlist.yaml.

    Raises: WatchlistRefused: with the place in the file (`hook_points[0].sources[1].features[2].severity, line 31`),
            what was found there and what to write instead. `reason` is "yaml_missing", "yaml_syntax" or "yaml_schema".
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise _refuse(path.name, f"{path.stat().st_size} bytes", f"A watchlist has at most {MAX_YAML_BYTES}.")
        data = path.read_bytes()
    except OSError as error:
        raise _refuse(
            str(path), f"it cannot be read ({error.strerror})", "Give a watchlist.yaml.", "yaml_missing"
        ) from error
    return parse(data, path.name, path.parent)


def parse(data: bytes, name: str, base: Path) -> Selection:
    """Check the bytes of a watchlist.yaml; paths in it start from `base`. Raises as `load`."""
    document = _Document(name, data)
    document.check()
    root = document.value
    model = _model(document, root["model"], base)
    hooks = [_hook(document, i, fields, model, base) for i, fields in enumerate(root["hook_points"])]
    points = [hook.hook_point for hook in hooks]
    for i, point in enumerate(points):
        if point in points[:i]:
            raise document.refuse(("hook_points", i), f"{point} stands twice", "Put all its sources under one entry.")
    return Selection(root["name"], root.get("notes", ""), model, tuple(sorted(hooks, key=lambda hook: hook.hook_point)))


class _Document:
    """A parsed YAML file that knows on which line each of its values stands."""

    def __init__(self, name: str, data: bytes) -> None:
        self._name = name
        self._lines: dict[Path_, int] = {}
        try:
            loader = yaml.SafeLoader(data)
            node = loader.get_single_node()
            if node is not None:
                self._visit(node, (), set())
            self.value: Any = loader.construct_document(node) if node is not None else None
        except yaml.YAMLError as error:
            raise _refuse(
                name, f"not YAML: {' '.join(str(error).split())[:300]}", "Correct the line.", "yaml_syntax"
            ) from error
        except (ValueError, OverflowError, RecursionError) as error:
            raise _refuse(name, f"a value cannot be read ({str(error)[:200]})", "Correct it.", "yaml_syntax") from error
        self._check_scalars(self.value, ())

    def where(self, path: Path_) -> str:
        """`hook_points[0].sources[1].path, line 12`"""
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        line = next((self._lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self._lines), 1)
        return f"{self._name}: {text or 'the file'}, line {line}"

    def refuse(self, path: Path_, found: str, instead: str, reason: str = "yaml_schema") -> WatchlistRefused:
        """The error of one place in the file."""
        return _refuse(self.where(path), found, instead, reason)

    @contextmanager
    def at(self, path: Path_) -> Iterator[None]:
        """Add the place in the file to refusals of what stands there."""
        try:
            yield
        except (WatchlistRefused, ConfigRefused) as refusal:
            raise WatchlistRefused(
                f"{self.where(path)}: {refusal.what}",
                found=refusal.found,
                instead=refusal.instead,
                reason=refusal.reason,
            ) from refusal

    def check(self) -> None:
        """Raise the most telling error against the schema, if there is one."""
        validator = jsonschema.Draft202012Validator(schema())
        error = jsonschema.exceptions.best_match(validator.iter_errors(self.value))
        if error is not None:
            raise self.refuse(tuple(error.absolute_path), *_explain(error))

    def _visit(self, node: yaml.Node, path: Path_, seen: set[int]) -> None:
        """Note lines; refuse aliases (a few bytes can stand for millions of values) and keys that stand twice."""
        self._lines[path] = node.start_mark.line + 1
        if id(node) in seen:
            raise self.refuse(path, "it is an alias (*name)", "Write the value out, or use 'defaults'.", "yaml_syntax")
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for i, child in enumerate(node.value):
                self._visit(child, (*path, i), seen)
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, child in node.value:
                if key.tag != "tag:yaml.org,2002:str":
                    raise self.refuse(
                        path, f"a key on line {key.start_mark.line + 1} is not text", "Quote it.", "yaml_syntax"
                    )
                self._lines[(*path, key.value)] = key.start_mark.line + 1
                if key.value in keys:
                    raise self.refuse((*path, key.value), "this key stands twice", "Keep one of them.", "yaml_syntax")
                keys.add(key.value)
                self._visit(child, (*path, key.value), seen)

    def _check_scalars(self, value: Any, path: Path_) -> None:
        """What the schema lets through and JSON cannot hold: NaN, infinity, half a surrogate pair."""
        if isinstance(value, dict):
            for key, child in value.items():
                self._check_scalars(key, path)
                self._check_scalars(child, (*path, key))
        elif isinstance(value, list):
            for i, child in enumerate(value):
                self._check_scalars(child, (*path, i))
        elif isinstance(value, float) and not math.isfinite(value):
            raise self.refuse(path, f"{value} is not a finite number", "Give a finite number.")
        elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise self.refuse(path, "the text holds half a surrogate pair", "Write the character itself.")


def _explain(error: jsonschema.ValidationError) -> tuple[str, str]:
    """found and instead of a schema error."""
    fields: Mapping[str, Any] = error.schema if isinstance(error.schema, dict) else {}
    value: Any = error.instance
    rule: Any = error.validator_value
    described = str(fields.get("description", ""))
    if error.validator == "additionalProperties" and "properties" in fields:
        return _explain_unknown_key(sorted(set(value) - set(fields["properties"]))[0], sorted(fields["properties"]))
    if error.validator == "required":
        missing = next(name for name in rule if name not in value)
        meaning = fields.get("properties", {}).get(missing, {}).get("description", "")
        return f"key {missing!r} is missing", f"Add it. {meaning}".strip()
    if error.validator == "oneOf":
        choices = [alternative["required"][0] for alternative in rule]
        given = [name for name in choices if name in value]
        found = f"it gives both {' and '.join(given)}" if given else f"it gives neither {' nor '.join(choices)}"
        return found, f"Give exactly one of {', '.join(choices)}."
    if error.validator == "type":
        quote = " Quote it if it is meant as text." if rule == "string" else ""
        return f"{_short(value)} is {_kind(value)}, not {_plain(rule)}", f"{described}{quote}".strip()
    return " ".join(error.message.split())[:200], described


def _explain_unknown_key(unknown: str, known: Sequence[str]) -> tuple[str, str]:
    close = difflib.get_close_matches(unknown, known, 1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"unknown key {unknown!r}", f"{hint}Known here: {', '.join(known)}."


def _kind(value: Any) -> str:
    return _YAML_TYPES.get(type(value), "a number" if isinstance(value, int | float) else "a date")


def _plain(type_name: str) -> str:
    return {"object": "a mapping", "array": "a list", "string": "text", "integer": "a whole number"}.get(
        type_name, f"a {type_name}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _model(document: _Document, fields: Mapping[str, Any], base: Path) -> ModelCard:
    sizes = ("architecture", "d_model", "layers", "vocab_size")
    given = {key: fields[key] for key in sizes if key in fields}
    if "config" in fields:
        if given:
            raise document.refuse(
                ("model",), f"it gives config and also {', '.join(given)}", "Give config alone, or the four sizes."
            )
        with document.at(("model", "config")):
            given = _model_config(Location(fields["config"], base))
    elif missing := [key for key in sizes if key not in given]:
        raise document.refuse(("model",), f"{', '.join(missing)} missing", "Add them, or give 'config' instead.")
    return ModelCard(name=fields["name"], dtypes=tuple(fields["dtypes"]), **given)


def _model_config(location: Location) -> dict[str, Any]:
    """Architecture and sizes out of a Hugging Face config.json."""
    config = location.json("" if location.text.endswith(".json") else "config.json")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    architectures = config.get("architectures")
    values = {
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
        "d_model": _first(text, "hidden_size", "n_embd", "d_model"),
        "layers": _first(text, "num_hidden_layers", "n_layer"),
        "vocab_size": _first(text, "vocab_size") or _first(config, "vocab_size"),
    }
    for key, value in values.items():
        if not isinstance(value, str if key == "architecture" else int) or isinstance(value, bool) or not value:
            raise location.refuse(f"it gives no {key}", "Give architecture, d_model, layers and vocab_size instead.")
    return values


def _first(fields: Any, *names: str) -> Any:
    return next((fields[name] for name in names if name in fields), None)


def _hook(document: _Document, i: int, fields: Mapping[str, Any], model: ModelCard, base: Path) -> HookChoice:
    path: Path_ = ("hook_points", i)
    with document.at((*path, "hook_point")):
        point = HookPoint.parse(fields["hook_point"])
    if point.layer >= model.layers:
        raise document.refuse(
            (*path, "hook_point"),
            f"{point} in a model of {model.layers} layers",
            f"Use resid_post.0 to resid_post.{model.layers - 1}.",
            "hook_point_unknown",
        )
    sources = tuple(_source(document, (*path, "sources", j), s, base) for j, s in enumerate(fields["sources"]))
    return HookChoice(document.where(path), point, sources)


def _source(document: _Document, path: Path_, fields: Mapping[str, Any], base: Path) -> SourceChoice:
    defaults = fields.get("defaults", {})
    features = [
        _feature(document, (*path, "features", i), {**defaults, **feature}, needs_label="labels" not in fields)
        for i, feature in enumerate(fields["features"])
    ]
    return SourceChoice(
        where=document.where(path),
        format=fields["format"],
        location=Location(fields["path"], base),
        options=SourceOptions(**fields.get("options", {})),
        licence=fields.get("licence"),
        calibration=_calibration(fields.get("calibration"), base),
        labels=tuple(LabelList(item["format"], Location(item["path"], base)) for item in fields.get("labels", ())),
        features=tuple(features),
    )


def _calibration(fields: Mapping[str, Any] | None, base: Path) -> Calibration | None:
    if fields is None:
        return None
    return Calibration(Location(fields["activations"], base), fields.get("match", "rate"))


def _feature(document: _Document, path: Path_, fields: Mapping[str, Any], *, needs_label: bool) -> FeatureChoice:
    if "severity" not in fields:
        raise document.refuse(path, "key 'severity' is missing", "Give it here or in the source's 'defaults'.")
    if needs_label and "label" not in fields:
        raise document.refuse(path, "key 'label' is missing", "Add it, or give the source a list under 'labels'.")
    with document.at((*path, "limit")):
        limit = Limit(**fields["limit"]) if "limit" in fields else None
    return FeatureChoice(
        where=document.where(path),
        index=fields.get("index"),
        name=fields.get("name"),
        id=fields["id"],
        label=fields.get("label"),
        severity=Severity(fields["severity"]),
        skip_first_positions=fields.get("skip_first_positions", _DEFAULT_SKIP),
        limit=limit,
        evidence=fields.get("evidence", {}),
    )


def _refuse(what: str, found: str, instead: str, reason: str = "yaml_schema") -> WatchlistRefused:
    return WatchlistRefused(what, found=found, instead=instead, reason=reason)
