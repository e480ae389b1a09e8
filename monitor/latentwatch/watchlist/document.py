"""A YAML file that a person writes: parsed, checked against schema.json, and what is wrong named with its line.

Nothing in the file is executed: plain YAML scalars, lists and mappings only; no tags, no aliases, no key twice.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any, Final

import jsonschema
import yaml

from latentwatch.errors import ConfigRefused, RefusalReason, WatchlistRefused

_YAML_TYPES: Final = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", type(None): "empty"}

Place = tuple[str | int, ...]
"""Keys and indices from the root of the file."""


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of watchlist.yaml."""
    text = resources.files("latentwatch.watchlist").joinpath("schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


class Document:
    """A parsed YAML file that knows on which line each of its values stands."""

    def __init__(self, name: str, data: bytes) -> None:
        self._name = name
        self._lines: dict[Place, int] = {}
        try:
            loader = yaml.SafeLoader(data)
            node = loader.get_single_node()
            if node is not None:
                self._visit(node, (), set())
            self.value: object = loader.construct_document(node) if node is not None else None
        except yaml.YAMLError as error:
            raise refuse(
                name, f"not YAML: {' '.join(str(error).split())[:300]}", "Correct the line.", RefusalReason.YAML_SYNTAX
            ) from error
        except (ValueError, OverflowError, RecursionError) as error:
            raise refuse(
                name, f"a value cannot be read ({str(error)[:200]})", "Correct it.", RefusalReason.YAML_SYNTAX
            ) from error
        self._check_scalars(self.value, ())

    def where(self, path: Place) -> str:
        """`hook_points[0].sources[1].path, line 12`"""
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        line = next((self._lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self._lines), 1)
        return f"{self._name}: {text or 'the file'}, line {line}"

    def refuse(
        self, path: Place, found: str, instead: str, reason: str = RefusalReason.YAML_SCHEMA
    ) -> WatchlistRefused:
        """The error of one place in the file."""
        return refuse(self.where(path), found, instead, reason)

    @contextmanager
    def at(self, path: Place) -> Iterator[None]:
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

    def check(self, part: str | None = None) -> None:
        """Raise the most telling error against the schema, or against one of its definitions, if there is one."""
        whole = schema()
        validator = jsonschema.Draft202012Validator(whole if part is None else whole["$defs"][part])
        error = jsonschema.exceptions.best_match(validator.iter_errors(self.value))
        if error is not None:
            raise self.refuse(tuple(error.absolute_path), *_explain(error))

    def _visit(self, node: yaml.Node, path: Place, seen: set[int]) -> None:
        """Note lines; refuse aliases (a few bytes can stand for millions of values) and keys that stand twice."""
        self._lines[path] = node.start_mark.line + 1
        if id(node) in seen:
            raise self.refuse(
                path, "it is an alias (*name)", "Write the value out, or use 'defaults'.", RefusalReason.YAML_SYNTAX
            )
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for i, child in enumerate(node.value):
                self._visit(child, (*path, i), seen)
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, child in node.value:
                if key.tag != "tag:yaml.org,2002:str":
                    raise self.refuse(
                        path,
                        f"a key on line {key.start_mark.line + 1} is not text",
                        "Quote it.",
                        RefusalReason.YAML_SYNTAX,
                    )
                self._lines[(*path, key.value)] = key.start_mark.line + 1
                if key.value in keys:
                    raise self.refuse(
                        (*path, key.value), "this key stands twice", "Keep one of them.", RefusalReason.YAML_SYNTAX
                    )
                keys.add(key.value)
                self._visit(child, (*path, key.value), seen)

    def _check_scalars(self, value: object, path: Place) -> None:
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


def _kind(value: object) -> str:
    return _YAML_TYPES.get(type(value), "a number" if isinstance(value, int | float) else "a date")


def _plain(type_name: str) -> str:
    return {"object": "a mapping", "array": "a list", "string": "text", "integer": "a whole number"}.get(
        type_name, f"a {type_name}"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse(what: str, found: str, instead: str, reason: str = RefusalReason.YAML_SCHEMA) -> WatchlistRefused:
    """The error of a watchlist.yaml."""
    return WatchlistRefused(what, found=found, instead=instead, reason=reason)
