"""StepBatch: what one engine step showed, as numpy columns. The contract between exporter, wire and collector.

Shape legend: S segments, R rows (tokens that carry scores), N fired activations, P dense features (probes),
H hook points, F features of the watchlist (sparse and dense together, in watchlist order).

Rows are not stored with positions. Segments whose state is SCORED or INHERITED own rows, in order: the first such
segment owns rows 0..count-1, the next one those after it, and row `start_row + i` is position `start + i`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from latentwatch.errors import StreamRefused
from latentwatch.names import Outcome, Phase, Reason, TokenState

Array = npt.NDArray[Any]

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


@dataclass(frozen=True)
class RequestOpened:
    """A request that the engine began; everything known of it at that time."""

    handle: int
    request_id: str
    """The engine's own id; names.response_id() gives the id that the client saw."""
    prompt_tokens: int
    adapter: str = ""
    """LoRA adapter name, empty for the base model."""
    traceparent: str = ""
    """W3C trace context of the client's request, empty where it sent none."""


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
    """Requests that began and ended while the exporter read nothing for so long that the engine forgot them."""
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

    def without_scores(self, reason: Reason) -> StepBatch:
        """The same books with the scores shed: scored and inherited tokens become dropped{reason}.

        What the sender keeps when it must give something up: a batch without scores is some tens of bytes a
        segment, so that the accounting survives long after the scores do not fit.
        """
        return self.with_rows(np.zeros(self.rows, bool), reason)

    def with_rows(self, keep_R: Array, reason: Reason) -> StepBatch:
        """The same books with the scores of these rows only; the tokens of the others become dropped{reason}.

        Args: keep_R: bool [R].
        """
        segments, R = self.segments_S, len(keep_R)
        owners = np.flatnonzero(owns_rows(segments))
        segment_R = np.repeat(owners, segments["count"][owners])
        starts_R = np.ones(R, bool)
        starts_R[1:] = (segment_R[1:] != segment_R[:-1]) | (keep_R[1:] != keep_R[:-1])
        first = np.flatnonzero(starts_R)
        pieces = segments[segment_R[first]]
        row_of_S = np.zeros(len(segments), np.int64)
        row_of_S[owners] = np.cumsum(segments["count"][owners]) - segments["count"][owners]
        pieces["start"] += (first - row_of_S[segment_R[first]]).astype("i4")
        pieces["count"] = np.diff(first, append=R)
        shed = ~keep_R[first]
        pieces["state"][shed], pieces["reason"][shed] = TokenState.DROPPED, reason
        others = np.setdiff1d(np.arange(len(segments)), owners)
        order = np.argsort(np.concatenate([others, segment_R[first]]), kind="stable")
        fires = self.fires_N[keep_R[self.fires_N["row"]]]
        fires["row"] = (np.cumsum(keep_R) - 1)[fires["row"]]
        return replace(
            self,
            segments_S=_in_runs(np.concatenate([segments[others], pieces])[order]),
            fires_N=fires,
            dense_RP=self.dense_RP[keep_R],
            norm_RH=self.norm_RH[keep_R],
        )


def joined_books(batches: Sequence[StepBatch]) -> StepBatch:
    """Consecutive batches without rows as one that says the same of every token and request.

    Runs of a request's tokens become one segment; step, time and counters are those of the last batch.
    """
    segments = np.concatenate([batch.segments_S for batch in batches])
    return replace(
        batches[-1],
        segments_S=_in_runs(segments[np.lexsort((segments["start"], segments["handle"]))]),
        opened=tuple(event for batch in batches for event in batch.opened),
        closed=tuple(event for batch in batches for event in batch.closed),
    )


def _in_runs(segments_S: Array) -> Array:
    """The segments with neighbours made one where the second goes on as the first ends."""
    begins_S = np.ones(len(segments_S), bool)
    before, after = segments_S[:-1], segments_S[1:]
    begins_S[1:] = before["start"] + before["count"] != after["start"]
    for name in ("handle", "state", "reason", "phase"):
        begins_S[1:] |= before[name] != after[name]
    first = np.flatnonzero(begins_S)
    runs: Array = segments_S[first]
    if len(first):
        runs["count"] = np.add.reduceat(segments_S["count"], first)
    return runs


# Looked up by a column's u1 values: some ten times as fast as np.isin on the few segments of a step.
_OWNS_ROWS: Final = np.isin(np.arange(256), (TokenState.SCORED, TokenState.INHERITED))
_UNKNOWN: Final = {
    name: ~np.isin(np.arange(256), [int(member) for member in allowed])
    for name, allowed in (("state", TokenState), ("reason", Reason), ("phase", Phase))
}


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


def validate(batch: StepBatch, *, sparse_F: Array, hook_points: int) -> None:
    """Refuse a batch that does not keep this module's contract, so that nothing behind it has to look again.

    Args:   sparse_F: bool [F], which features of the watchlist may appear in `fires_N`; the others are dense.
    Raises: StreamRefused, reason "malformed_batch", naming the column and the offending value.
    """
    segments, fires = batch.segments_S, batch.fires_N
    for name, unknown in _UNKNOWN.items():
        foreign = unknown[segments[name]]
        if foreign.any():
            _malformed(batch, f"segment {name} {int(segments[name][foreign][0])} is not one this version knows")
    if (segments["count"] < 1).any() or (segments["start"] < 0).any():
        _malformed(batch, "a segment has count < 1 or start < 0")
    named = segments["reason"] != Reason.NONE
    if (named == owns_rows(segments)).any():
        _malformed(batch, "a reason must stand on unseen and dropped segments, and only there")
    rows = batch.rows
    for name, array, columns in (
        ("dense scores", batch.dense_RP, int((~sparse_F).sum())),
        ("norms", batch.norm_RH, hook_points),
    ):
        # A batch without rows (openings, a heartbeat, an engine that is not armed) need not know the widths.
        if len(array) != rows or (rows and array.shape[1] != columns):
            _malformed(batch, f"{name} have shape {array.shape}, expected {(rows, columns)}")
    if len(fires):
        if int(fires["row"].max()) >= rows:
            _malformed(batch, f"an activation names row {int(fires['row'].max())} of {rows}")
        if int(fires["feature"].max()) >= len(sparse_F) or not sparse_F[fires["feature"]].all():
            _malformed(batch, "an activation names a feature that is dense or beyond the watchlist")
        key = fires["row"].astype(np.int64) * len(sparse_F) + fires["feature"]
        if (np.diff(key) <= 0).any():
            _malformed(batch, "activations are not sorted by row and feature, or one stands twice")
    for name, values in (("act", fires["act"]), ("dense", batch.dense_RP), ("norm", batch.norm_RH)):
        if not np.isfinite(values).all():
            _malformed(batch, f"column {name} holds NaN or infinity")


def _malformed(batch: StepBatch, found: str) -> None:
    raise StreamRefused(
        f"step {batch.step}",
        found=found,
        instead="The exporter and the collector must run the same latentwatch version; upgrade the older one.",
        reason="malformed_batch",
    )
