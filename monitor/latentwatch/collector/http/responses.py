"""Dataclasses of plain values as JSON answers."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Response


def as_json(value: Any) -> Response:
    """A dataclass of plain values as a response."""
    return Response(encoded(value), media_type="application/json")


def encoded(value: Any) -> bytes:
    """A dataclass of plain values as JSON. Not by asdict, which copies everything first."""
    text = json.dumps(value, default=vars, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "replace")
