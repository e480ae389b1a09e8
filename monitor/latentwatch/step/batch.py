"""StepBatch: what one engine step showed, as numpy columns. The contract between exporter, wire and collector.

Shape legend: S segments, R rows (tokens that carry scores), N fired activations, P dense features (probes),
H hook points, F features of the watchlist (sparse and dense together, in watchlist order).

Rows are not stored with positions. Segments whose state is SCORED or INHERITED own rows, in order: the first such
segment owns rows 0..count-1, the next one those after it, and row `start_row + i` is position `start + i`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from latentwatch.arrays import Array
from latentwatch.names import Outcome, Phase, Reason, TokenState

SEGMENT_DTYPE = np.dtype(
    [
        ("handle", "<i8"),  # the request, unique within one engine boot
        ("start", "<i4"),  # position of the first token, 0 is the first prompt token
        ("count", "<i4"),  # tokens, >= 1
        ("state", "u1"),  # TokenState
        ("reason", "u1"),  # Reason; NONE for scored and inherited
        ("phase", "u1"),  # Phase; a segment never crosses from prompt to output
    ]
)
FIRE_DTYPE = np.dtype(
    [
        ("row", "<u4"),  # 0..R-1
        ("feature", "<u2"),  # 0..F-1, never a dense one
        ("act", "<f4"),  # activation, in the feature's own units; > 0 unless the feature's gate says otherwise
    ]
)


UNANNOUNCED: Final = 0
"""The handle of tokens that are of no request in particular: of those that EngineCounters.unannounced_requests counts.
Requests have handles from 1 on."""


@dataclass(frozen=True)
class RequestOpened:
    """A request that the engine began; everything known of it at that time."""

    handle: int
    request_id: str
    """The engine's own id."""
    prompt_tokens: int
    adapter: str = ""
    """LoRA adapter name, empty for the base model."""
    traceparent: str = ""
    """W3C trace context of the client's request, empty where it sent none."""
    response_id: str = ""
    """The id that the client was answered with, see client_ids; empty where no server told."""


@dataclass(frozen=True)
class RequestClosed:
    """A request that ended, with the sum that its segments must add up to (invariant I1)."""

    handle: int
    request_id: str
    prompt_tokens: int
    output_tokens: int
    total_tokens: int
    """prompt_tokens + output_tokens - 1 for a finished request; where the engine stopped for an aborted one."""
    outcome: Outcome
    response_id: str = ""


@dataclass(frozen=True)
class EngineCounters:
    """Cumulative counts since the engine booted; the collector shows them as they are, per replica."""

    steps: int = 0
    ring_dropped_steps: int = 0
    op_silent_steps: int = 0
    recomputed_tokens: int = 0
    """Rows computed again after a preemption; the first scores stand."""
    surplus_tokens: int = 0
    """Rows that turned out not to be tokens of a request: async scheduling's row past the end, rejected drafts."""
    exporter_restarts: int = 0
    shed_batches: int = 0
    reconnects: int = 0
    unattributed_rows: int = 0
    """Rows whose request the exporter did not know; always 0 unless the exporter was restarted."""
    unannounced_requests: int = 0
    """Requests that began and ended while the exporter read nothing for so long that the engine only kept sums of them;
    their tokens are dropped{ring_full}, under the handle UNANNOUNCED."""
    untraced_requests: int = 0
    """Requests served without their client's trace context, because it could not be carried to the worker."""
    shed_critical_tokens: int = 0
    """Of the tokens whose scores were shed, those above a limit of a critical feature."""
    shed_warning_tokens: int = 0
    """The same of a warning, and of none that is critical."""
    lost_tokens: int = 0
    """Tokens whose books were given up as well: no collector hears of them before their request ends, if then."""
    spool_bytes: int = 0
    """On the disk now, over all boots of the replica."""
    spool_failures: int = 0
    """Times that the spool's disk could not be written or read."""
    spool_refused: int = 0
    """Files in the spool that are none of its own or damaged, and boots that no collector takes."""


@dataclass(frozen=True)
class StepBatch:
    """One engine step. Every array is owned by the batch and is not written again."""

    step: int
    """The engine's step number since boot, rising, with gaps where steps held nothing for us."""
    time_unix_nano: int
    """Wall clock of the engine's host when the step's scores were handed over."""
    segments_S: Array = field(default_factory=lambda: np.empty(0, SEGMENT_DTYPE))
    fires_N: Array = field(default_factory=lambda: np.empty(0, FIRE_DTYPE))
    """Sorted by row, then feature."""
    dense_RP: Array = field(default_factory=lambda: np.empty((0, 0), np.float16))
    """Scores of the dense features (probes), float16, columns in watchlist order."""
    norm_RH: Array = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """Euclidean norm of the residual stream at each hook point, float32, in the model's own units."""
    opened: tuple[RequestOpened, ...] = ()
    closed: tuple[RequestClosed, ...] = ()
    counters: EngineCounters = field(default_factory=EngineCounters)

    @property
    def rows(self) -> int:
        """R: the number of tokens that carry scores."""
        return int(self.segments_S["count"][owns_rows(self.segments_S)].sum())


# Looked up by a column's u1 values: some ten times as fast as np.isin on the few segments of a step.
_OWNS_ROWS: Final = np.isin(np.arange(256), (TokenState.SCORED, TokenState.INHERITED))


def owns_rows(segments_S: Array) -> Array:
    """bool [S]: which segments carry scores (state SCORED or INHERITED)."""
    owners_S: Array = _OWNS_ROWS[segments_S["state"]]
    return owners_S


def tokens_by_state(segments_S: Array) -> Mapping[tuple[TokenState, Reason, Phase], int]:
    """Tokens per (state, reason, phase); the terms of invariant I1."""
    if not len(segments_S):
        return {}
    key = (
        (segments_S["state"].astype(np.int32) << 16)
        | (segments_S["reason"].astype(np.int32) << 8)
        | segments_S["phase"]
    )
    keys, inverse = np.unique(key, return_inverse=True)
    tokens = np.bincount(inverse, weights=segments_S["count"]).astype(np.int64)
    return {
        (TokenState(k >> 16), Reason((k >> 8) & 0xFF), Phase(k & 0xFF)): int(t)
        for k, t in zip(keys.tolist(), tokens.tolist(), strict=True)
    }
