"""Tables of the documents that are made of the code: the keys of watchlist.yaml, the variables of the environment."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentwatch.collector.config import ENVIRONMENT, CollectorConfig, flag
from latentwatch.export import otlp_environment
from latentwatch.watchlist.document import schema

from tests.support.engines import ROOT

SCHEMA = schema()
PACKAGE = ROOT / "monitor/latentwatch"
READ_BY = {"engines/vllm": "plugin", "exporter": "exporter", "transport": "exporter"}
"""Who reads the variables that a folder of the package defines."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


# -- watchlist.yaml


def watchlist_keys() -> str:
    """A table for each object of the schema, in the order in which they contain each other."""
    parts = []
    for path, node in _objects(SCHEMA, ""):
        required = set(node.get("required", ()))
        rows = [
            [
                f"`{key}`",
                _kind(below),
                "yes" if key in required else _default(below),
                _cell(_resolved(below)["description"]),
            ]
            for key, below in node["properties"].items()
        ]
        either = (
            [" or ".join(f"`{key}`" for one in node["oneOf"] for key in one["required"])] if "oneOf" in node else []
        )
        note = "".join(f"\n\nOne of {keys} is needed." for keys in either)
        title = f"### `{path}`" if path else "### The file"
        keys = table(["key", "value", "needed, or default", "what it says"], rows)
        parts.append(f"{title}\n\n{node['description']}{note}\n\n{keys}")
    return "\n\n".join(parts)


def _objects(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects with named keys, each once, where it is met first."""
    seen: set[str] = set()

    def walk(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if (reference := node.get("$ref")) in seen:
            return
        seen.update([reference] if reference else [])
        node = _resolved(node)
        if "items" in node:
            yield from walk(node["items"], f"{path}[]")
        if "properties" in node:
            yield path, node
            for key, below in node["properties"].items():
                yield from walk(below, f"{path}.{key}".lstrip("."))

    return walk(node, path)


def _resolved(node: dict[str, Any]) -> dict[str, Any]:
    if reference := node.get("$ref"):
        found: dict[str, Any] = SCHEMA["$defs"][reference.rpartition("/")[2]]
        return found
    return node


def _kind(node: dict[str, Any]) -> str:
    node = _resolved(node)
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if node["type"] == "array":
        return f"list: {_kind(node['items'])}"
    text = {"string": "text", "object": "see below" if "properties" in node else "map"}.get(node["type"], node["type"])
    low, high = node.get("minimum", node.get("exclusiveMinimum")), node.get("maximum")
    if low is not None and high is not None:
        return f"{text}, {low:,} to {high:,}"
    return f"{text}, above {low}" if "exclusiveMinimum" in node else f"{text}, from {low}" if low is not None else text


def _default(node: dict[str, Any]) -> str:
    default = _resolved(node).get("default")
    return "" if default in (None, "") else f"`{json.dumps(default).strip(chr(34))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# -- the environment


def variables() -> dict[str, tuple[str, str]]:
    """Every variable of ours and of OpenTelemetry that anything reads: who reads it, and what it says."""
    found = {name: (of, text) for name, of, text in _constants()}
    for name, field in CollectorConfig.model_fields.items():
        text = " ".join((field.description or "").split())
        found[f"{ENVIRONMENT}{name.upper()}"] = ("collector", f"`--{flag(name)}`: {text}")
    for part, text in otlp_environment.VARIABLES.items():
        found[f"OTEL_EXPORTER_OTLP_{part}"] = ("collector", text)
    return found | {name: ("collector", text) for name, text in otlp_environment.RESOURCE.items()}


def environment() -> str:
    """The table of all of them."""
    rows = [[f"`{name}`", of, _cell(text)] for name, (of, text) in variables().items()]
    return table(["variable", "read by", "what it says"], rows)


def literals() -> set[str]:
    """Names of variables that stand anywhere in the package's code as a value, texts for people aside."""
    return {
        node.value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(r"LATENTWATCH_[A-Z_]+[A-Z]", str(node.value))
    }


def _constants() -> Iterator[tuple[str, str, str]]:
    """Name, reader and text of each `NAME: Final = "LATENTWATCH_..."` with a text under it."""
    for folder, of in READ_BY.items():
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            yield from ((name, of, text) for name, text in _documented(path))


def _documented(path: Path) -> Iterator[tuple[str, str]]:
    body = ast.parse(path.read_text()).body
    for node, after in itertools.pairwise(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Constant):
            continue
        name = node.value.value
        if isinstance(name, str) and re.fullmatch(r"LATENTWATCH_[A-Z_]+[A-Z]", name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield name, " ".join(str(text).split())
