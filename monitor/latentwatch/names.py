"""Names shared by every part: hook points, token states, phases, request ids.

One module owns these spellings. Metrics labels, the wire, files and pages import them from here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final

from latentwatch.errors import ConfigRefused, RefusalReason

HOOK_KINDS: Final = ("resid_post",)
"""Places in a decoder layer that the engine can tap. Others are refused by name until the engine taps them."""

_HOOK_POINT = re.compile(r"([a-z_]+)\.(0|[1-9][0-9]*)")


@dataclass(frozen=True, order=True)
class HookPoint:
    """A tensor of the model by the field's name for it: `resid_post.12` is the residual stream after layer 12.

    Layers count from 0. `resid_post.L` equals Hugging Face's `hidden_states[L + 1]`, except after the last
    layer, where Hugging Face returns the stream behind the final norm.
    """

    layer: int
    kind: str = "resid_post"

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> HookPoint:
        """Read `resid_post.12`. Raises ConfigRefused for another spelling or a kind that the engine cannot tap."""
        match = _HOOK_POINT.fullmatch(text)
        if match is None or match[1] not in HOOK_KINDS:
            raise ConfigRefused(
                f"hook point {text!r}",
                found="it is not one of " + ", ".join(f"{kind}.<layer>" for kind in HOOK_KINDS),
                instead="Name the layer as resid_post.<layer>, layers counted from 0.",
                reason=RefusalReason.HOOK_POINT_UNKNOWN,
            )
        return cls(layer=int(match[2]), kind=match[1])


class TokenState(IntEnum):
    """What became of a token that the engine computed or skipped (invariant I1). Values are on the wire."""

    SCORED = 1
    INHERITED = 2
    UNSEEN = 3
    DROPPED = 4


class Phase(IntEnum):
    """Whether a token belongs to the prompt or to the output. Values are on the wire."""

    PROMPT = 1
    OUTPUT = 2


class Reason(IntEnum):
    """Why a token was not scored; NONE for scored and inherited tokens. Values are on the wire; append only."""

    NONE = 0
    PREFIX_CACHE = 1
    """unseen: its KV came from the prefix cache, and no score of its computation is kept (else it is inherited)."""
    NOT_ARMED = 2
    """unseen: the plugin runs without scoring, because the watchlist or the engine mode was refused."""
    OP_SILENT = 3
    """unseen: the step ran, but the score op left no trace in it: the graph is without it, or it cannot read such a
    stream."""
    RING_FULL = 4
    """dropped: the exporter was too slow and the shared-memory ring had no free slot."""
    BUFFER_FULL = 5
    """dropped: the sender's buffer was full because the collector was away or slow; scores were shed."""
    LOST = 6
    """dropped: known only from the request's end, since no message or step accounted for the token."""
    TRIPLES_FULL = 7
    """dropped: more non-zero activations in one step than the slot holds; the rows past the bound."""
    NON_FINITE = 8
    """dropped: the residual stream of this token held NaN or infinity."""
    KV_CONNECTOR = 9
    """unseen: the engine may load KV from elsewhere, so whether this token's was computed here is not known."""


BY_DESIGN: Final = frozenset({Reason.KV_CONNECTOR})
"""Reasons that follow from how an engine is deployed, and say nothing of its health: the objective of coverage is of
the other tokens, and these have one of their own."""


class Outcome(IntEnum):
    """How a request ended. Values are on the wire."""

    FINISHED = 1
    ABORTED = 2
    LOST = 3
    """Its engine went away before it said how the request ended."""


class Severity(StrEnum):
    """How much a person should care when a feature exceeds its limit. `none` features are context only."""

    CRITICAL = "critical"
    WARNING = "warning"
    INFO = "info"
    NONE = "none"


class ModelMatch(StrEnum):
    """Whether an engine serves the model that its watchlist was built for, by more than its sizes."""

    SAME = "same"
    DIFFERS = "differs"
    UNKNOWN = "unknown"
    """What could be compared is the same; of the weights nothing could, or not all."""
    NOT_STATED = "not_stated"
    """The watchlist says nothing of its model but the sizes."""


def trace_id(traceparent: str) -> str:
    """The trace id of a W3C traceparent, empty if it is not one."""
    parts = traceparent.split("-")
    if len(parts) < 4 or len(parts[1]) != 32 or not set(parts[1]) <= set("0123456789abcdef") or not parts[1].strip("0"):
        return ""
    return parts[1]
