"""What the engine tells its exporter about requests, beside the rows: they begin, they end. JSON lines in the ring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from latentwatch.errors import ConfigRefused, RefusalReason


@dataclass(frozen=True)
class Opened:
    """The engine began a request and gave it a slot of the tables until it closes."""

    slot: int
    handle: int
    request_id: str
    prompt_tokens: int
    cached: int
    """Leading positions that the engine did not compute, because their KV was in the prefix cache."""
    adapter: str
    traceparent: str
    untraced: int = 0
    """Requests before it whose trace context and response id could not be carried, since this was last said."""
    response_id: str = ""
    """What the client was answered with; see client_ids."""


@dataclass(frozen=True)
class Closed:
    """The engine ended a request."""

    slot: int
    output_tokens: int
    """-1 where the engine did not say."""
    aborted: bool
    reached: int = 0
    """The first position past those that steps computed which found no slot in the ring; 0 where there were none."""
    prompt_tokens: int = -1
    """As the engine has them at the end: a session's grow. -1 where it did not say."""


@dataclass(frozen=True)
class TurnEnded:
    """A session that takes more input ended its output. It stays open; what it computed past here is no token of it."""

    slot: int
    end: int
    """The first position past what counts: it goes on there."""


@dataclass(frozen=True)
class Grown:
    """A session was given more input: what it computes from here on is prompt up to the new length."""

    slot: int
    prompt_tokens: int


@dataclass(frozen=True)
class Blocks:
    """KV blocks that requests were given, in the order of their positions."""

    given: list[list[int]]
    """One list per request: its slot, the place of the first of these blocks in its table (which ends there until
    then), how many of them hold KV that was computed before (hits of the prefix cache), the blocks' numbers."""


@dataclass(frozen=True)
class Unannounced:
    """Requests that began and ended while the exporter read nothing for so long that the engine folded them into sums;
    what became of the KV blocks meanwhile is not known. The tables of the live requests follow.
    """

    requests: int
    prompt_tokens: int
    """Of all of them together, computed or found in the prefix cache."""
    output_tokens: int
    untraced: int = 0
    """As in Opened."""


Event = Opened | Closed | TurnEnded | Grown | Blocks | Unannounced
_TAGS: Final[dict[type[Event], str]] = {
    Opened: "o",
    Closed: "c",
    TurnEnded: "t",
    Grown: "g",
    Blocks: "b",
    Unannounced: "u",
}


def encode_events(events: Sequence[Event]) -> bytes:
    """JSON lines for the ring, as engine and exporter share them."""
    # Not astuple(), which copies deeply and costs ten times as much; fields stand in __dict__ in their order.
    return b"".join(json.dumps([_TAGS[type(e)], *vars(e).values()]).encode() + b"\n" for e in events)


def decode_events(data: bytes) -> list[Event]:
    """The inverse of encode_events(). Raises ConfigRefused, "ring_events", for what it did not write."""
    kinds = {tag: kind for kind, tag in _TAGS.items()}
    try:
        return [kinds[line[0]](*line[1:]) for line in map(json.loads, data.splitlines())]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ConfigRefused(
            "events in the shared-memory ring",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            instead="Start engine and exporter from the same latentwatch version.",
            reason=RefusalReason.RING_EVENTS,
        ) from error


def positions_computed(prompt_tokens: int, closed: Closed, reached: int) -> int:
    """Positions of a request that ended: as many as its tokens but the last, which nothing was computed from; where
    the engine did not say how many it had, or it had none yet, those that are known to be `reached`.
    """
    prompt_tokens = prompt_tokens if closed.prompt_tokens < 0 else closed.prompt_tokens
    if closed.output_tokens > 0:
        return prompt_tokens + closed.output_tokens - 1
    reached = max(reached, closed.reached)
    return reached if closed.output_tokens < 0 else min(reached, prompt_tokens)
