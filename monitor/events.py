"""What the engine tells its exporter about requests, beside the rows: they begin, they end. JSON lines in the ring."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Opened:
    """The engine began a request and gave it a slot of the tables until it closes."""

    slot: int
    handle: int
    request_id: str
    prompt_tokens: int
    cached: int
    """Leading positions that the engine did not compute, because their KV was in the prefix cache."""
    resumed: bool
    """Announced again after this exporter was restarted: what came before is not this exporter's to account for."""
    adapter: str
    traceparent: str


@dataclass(frozen=True)
class Closed:
    """The engine ended a request."""

    slot: int
    output_tokens: int
    """-1 where the engine did not say."""
    aborted: bool


def encode_events(events: Sequence[Opened | Closed]) -> bytes:
    """JSON lines for the ring, as engine and exporter share them."""
    tags = {Opened: "o", Closed: "c"}
    return b"".join(json.dumps([tags[type(e)], *dataclasses.astuple(e)]).encode() + b"\n" for e in events)


def decode_events(data: bytes) -> list[Opened | Closed]:
    """The inverse of encode_events()."""
    kinds: dict[str, type[Opened] | type[Closed]] = {"o": Opened, "c": Closed}
    return [kinds[line[0]](*line[1:]) for line in map(json.loads, data.splitlines())]
