"""Batches cut, joined and shed: other batches that say the same of every token.

Shape legend: as in step.batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from latentwatch.arrays import I64, Array
from latentwatch.names import Reason, TokenState
from latentwatch.step.batch import SEGMENT_DTYPE, StepBatch, owns_rows


def runs(handle: I64, start: I64, count: I64, state: Array, reason: Array, phase: Array) -> Array:
    """Spans of tokens as segments, with neighbours made one where the second goes on as the first ends."""
    begins_S = np.ones(len(handle), bool)
    begins_S[1:] = start[:-1] + count[:-1] != start[1:]
    for column in (handle, state, reason, phase):
        begins_S[1:] |= column[:-1] != column[1:]
    first = np.flatnonzero(begins_S)
    segments_S = np.empty(len(first), SEGMENT_DTYPE)
    if len(first):
        segments_S["count"] = np.add.reduceat(count, first)
    columns = {"handle": handle, "start": start, "state": state, "reason": reason, "phase": phase}
    for name, column in columns.items():
        segments_S[name] = column[first]
    return segments_S


def without_scores(batch: StepBatch, reason: Reason) -> StepBatch:
    """The same books with the scores shed: scored and inherited tokens become dropped{reason}.

    A batch without scores is some tens of bytes a segment, so that the accounting survives long after the scores do not
    fit.
    """
    return with_rows(batch, np.zeros(batch.rows, bool), reason)


def with_rows(batch: StepBatch, chosen_R: Array, reason: Reason) -> StepBatch:
    """The same books with the scores of these rows only; the tokens of the others become dropped{reason}.

    Args: chosen_R: bool [R].
    """
    segments, R = batch.segments_S, len(chosen_R)
    owners = np.flatnonzero(owns_rows(segments))
    segment_R = np.repeat(owners, segments["count"][owners])
    starts_R = np.ones(R, bool)
    starts_R[1:] = (segment_R[1:] != segment_R[:-1]) | (chosen_R[1:] != chosen_R[:-1])
    first = np.flatnonzero(starts_R)
    parts = segments[segment_R[first]]
    row_of_S = np.zeros(len(segments), np.int64)
    row_of_S[owners] = np.cumsum(segments["count"][owners]) - segments["count"][owners]
    parts["start"] += (first - row_of_S[segment_R[first]]).astype("i4")
    parts["count"] = np.diff(first, append=R)
    shed = ~chosen_R[first]
    parts["state"][shed], parts["reason"][shed] = TokenState.DROPPED, reason
    others = np.setdiff1d(np.arange(len(segments)), owners)
    order = np.argsort(np.concatenate([others, segment_R[first]]), kind="stable")
    fires = batch.fires_N[chosen_R[batch.fires_N["row"]]]
    fires["row"] = (np.cumsum(chosen_R) - 1)[fires["row"]]
    return replace(
        batch,
        segments_S=_in_runs(np.concatenate([segments[others], parts])[order]),
        fires_N=fires,
        dense_RP=batch.dense_RP[chosen_R],
        norm_RH=batch.norm_RH[chosen_R],
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


def pieces(batch: StepBatch, fits: Callable[[StepBatch], bool]) -> tuple[StepBatch, ...]:
    """The batch cut so that each piece fits; almost always the batch itself.

    A long prompt that inherits its scores from the prefix cache arrives in one step and can outgrow a message. The
    pieces have the step, time and counters of the whole; rows stay in order, segments are cut between two tokens,
    requests open in the earliest piece and close in the last. What cannot be cut further is returned as it is.
    """
    whole, fitting = [batch], []
    while whole:
        piece = whole.pop()
        halves = (piece,) if fits(piece) else _halves(piece)
        if len(halves) == 1:
            fitting.append(piece)
        else:
            whole.extend(reversed(halves))
    return tuple(fitting)


def column_bytes(batch: StepBatch) -> int:
    """Length of the four columns, bytes, in memory and on the wire."""
    return batch.segments_S.nbytes + batch.fires_N.nbytes + batch.dense_RP.nbytes + batch.norm_RH.nbytes


def event_bytes(batch: StepBatch) -> int:
    """The most that its requests which open and close take on the wire, bytes."""
    # A character takes at most 4 bytes of UTF-8; 64 bytes hold the numbers, tags and lengths.
    events = (*batch.opened, *batch.closed)
    texts = sum(len(value) for event in events for value in vars(event).values() if isinstance(value, str))
    return 64 * len(events) + 4 * texts


def _halves(batch: StepBatch) -> tuple[StepBatch, ...]:
    """Two batches that say the same, the larger part cut in half; the batch alone where it cannot be cut."""
    opened, closed = batch.opened, batch.closed
    if batch.rows > 1 and column_bytes(batch) >= event_bytes(batch):
        return _row_halves(batch)
    books = replace(without_scores(batch, Reason.NONE), segments_S=np.empty(0, SEGMENT_DTYPE), opened=(), closed=())
    if len(opened) > 1:
        half = len(opened) // 2
        return replace(books, opened=opened[:half]), replace(batch, opened=opened[half:])
    if len(closed) > 1:
        half = len(closed) // 2
        return replace(batch, closed=closed[:half]), replace(books, closed=closed[half:])
    return (batch,)


def _row_halves(batch: StepBatch) -> tuple[StepBatch, StepBatch]:
    """The batch cut between two rows; the segment that owns both is cut there as well."""
    cut = batch.rows // 2
    segments_S, fires_N = batch.segments_S, batch.fires_N
    end_row_S = np.cumsum(np.where(owns_rows(segments_S), segments_S["count"], 0))
    # The first segment that reaches the cut owns row cut - 1: those without rows do not move the end.
    across = int(np.searchsorted(end_row_S, cut))
    beyond = int(end_row_S[across]) - cut
    first_S, second_S = segments_S[: across + 1].copy(), segments_S[across:].copy()
    first_S["count"][-1] -= beyond
    second_S["start"][0] += second_S["count"][0] - beyond
    second_S["count"][0] = beyond
    fire = int(np.searchsorted(fires_N["row"], cut))
    second_N = fires_N[fire:].copy()
    second_N["row"] -= cut
    return (
        replace(
            batch,
            segments_S=first_S,
            fires_N=fires_N[:fire],
            dense_RP=batch.dense_RP[:cut],
            norm_RH=batch.norm_RH[:cut],
            closed=(),
        ),
        replace(
            batch,
            segments_S=second_S if beyond else second_S[1:],
            fires_N=second_N,
            dense_RP=batch.dense_RP[cut:],
            norm_RH=batch.norm_RH[cut:],
            opened=(),
        ),
    )


def _in_runs(segments_S: Array) -> Array:
    """The segments with neighbours made one."""
    columns: tuple[Any, ...] = tuple(
        segments_S[name] for name in ("handle", "start", "count", "state", "reason", "phase")
    )
    return runs(*columns)
