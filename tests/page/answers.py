"""Types of the answers that the live page reads, from the collector's OpenAPI document: `python -m tests.page.answers`.

The result, answers.d.ts beside the page's modules, is what `make page` checks the page's reading against.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from latentwatch.collector.core import Core
from latentwatch.collector.http import app
from starlette.testclient import TestClient

from tests.support.collectors import app_of
from tests.support.streams import sparse, watchlist

STATIC: Final = Path(app.__file__).parent / "static"
FILE: Final = STATIC / "answers.d.ts"
PATHS: Final = (
    "/v1/overview",
    "/v1/features",
    "/v1/exceedances",
    "/v1/drift",
    "/v1/requests/{request_id}",
    "/v1/evidence/requests/{request_id}",
)
_HEAD: Final = "// Generated from the collector's OpenAPI document by `python -m tests.page.answers`; do not edit."
_SCALARS: Final = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}


def document() -> dict[str, Any]:
    """The collector's OpenAPI document."""
    core = Core(watchlist([sparse("feature")]))
    made = app_of(core, 0.0)
    return dict(TestClient(made).get("/openapi.json").json())


def declarations(openapi: dict[str, Any]) -> str:
    """A TypeScript declaration file: what each of PATHS answers, and every type that is part of it.

    An answer has all fields of its schema, those with a default too.
    """
    answers = {path: openapi["paths"][path]["get"]["responses"]["200"]["content"] for path in PATHS}
    schemas = {path: content["application/json"]["schema"] for path, content in answers.items()}
    parts = [_HEAD, "export interface Answers {", *(f'  "{path}": {_type(s)};' for path, s in schemas.items()), "}"]
    for name in sorted(_reachable(list(schemas.values()), openapi["components"]["schemas"])):
        parts += ["", *_declaration(name, openapi["components"]["schemas"][name])]
    return "\n".join(parts) + "\n"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " | ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(map(json.dumps, schema["enum"]))
    match schema.get("type"):
        case "array":
            item = _type(schema["items"])
            return f"({item})[]" if " " in item else f"{item}[]"
        case "object":
            values = schema["additionalProperties"]
            return f"Record<string, {'unknown' if values is True else _type(values)}>"
        case scalar:
            return _SCALARS[scalar]


def _declaration(name: str, schema: dict[str, Any]) -> Iterator[str]:
    if text := schema.get("description", "").partition("\n\n")[0]:
        yield f"/** {' '.join(text.split())} */"
    if "properties" not in schema:
        yield f"export type {name} = {_type(schema)};"
        return
    yield f"export interface {name} {{"
    for field, found in schema["properties"].items():
        yield f"  {field}: {_type(found)};"
    yield "}"


def _reachable(wanted: list[Any], schemas: dict[str, Any]) -> set[str]:
    names = set[str]()
    while wanted:
        match wanted.pop():
            case {"$ref": str(ref)} if (name := ref.rpartition("/")[2]) not in names:
                names.add(name)
                wanted.append(schemas[name])
            case dict(inner):
                wanted.extend(inner.values())
            case list(inner):
                wanted.extend(inner)
    return names


if __name__ == "__main__":
    FILE.write_text(declarations(document()))
