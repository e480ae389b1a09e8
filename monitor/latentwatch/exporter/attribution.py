"""Rows of one engine step to segments of requests. Pure numpy: arrays in, arrays out.

Legend: Q requests in the step, T computed rows, R rows that carry scores, S segments, N fired activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from latentwatch.arrays import I64, U8, Array
from latentwatch.names import Phase, Reason, TokenState
from latentwatch.step.batch import FIRE_DTYPE, SEGMENT_DTYPE
from latentwatch.step.reshape import runs

UNSEEN_REASONS: Final = (Reason.NOT_ARMED, Reason.OP_SILENT, Reason.PREFIX_CACHE, Reason.KV_CONNECTOR)
"""Reasons for which a token was never there to be scored; the others mean that a score was lost."""

_STATE_OF: Final = np.full(256, TokenState.DROPPED, np.uint8)
"""By reason. Looked up: some thirty times as fast as np.isin on the few rows of a step."""
_STATE_OF[list(UNSEEN_REASONS)] = TokenState.UNSEEN
_STATE_OF[Reason.NONE] = TokenState.SCORED


@dataclass(frozen=True)
class StepRows:
    """One step's rows with everything that decides what becomes of them."""

    handle_Q: I64
    prompt_Q: I64
    """Prompt tokens of each request: positions below are prompt, the others output."""
    start_Q: I64
    count_Q: I64
    from_Q: I64
    """First position not accounted for yet; rows below it were computed before (recompute after preemption)."""
    to_Q: I64
    """First position that is not true: past the request's end, or past what the next step confirmed."""
    reason_T: U8
    """Why a row carries no score, Reason.NONE where it does."""
    fires_N: Array
    dense_TP: Array
    norm_TH: Array


@dataclass(frozen=True)
class ScoredRows:
    """What R rows showed, as the columns of StepBatch (step/batch.py)."""

    fires_N: Array
    """Sorted by row, then feature."""
    dense_RP: Array
    norm_RH: Array


@dataclass(frozen=True)
class Attributed:
    """Segments and the scores of their rows, in the order that StepBatch (step/batch.py) wants."""

    segments_S: Array
    scored: ScoredRows
    scored_T: npt.NDArray[np.intp]
    """Which of the step's rows those are."""
    again_T: npt.NDArray[np.intp]
    """Rows below `from_Q` that carry scores, computed again into other places of the KV cache."""
    recomputed: int
    """Rows below `from_Q`."""
    beyond: int
    """Rows at or above `to_Q`."""


def attribute(rows: StepRows) -> Attributed:
    """Keep each position once and cut the rows into segments of one request, state, reason and phase.

    Rows whose reason is one of UNSEEN_REASONS become unseen, of another dropped, NONE scored.
    """
    request_T, position_T = positions(rows.start_Q, rows.count_Q)
    again_T = position_T < rows.from_Q[request_T]
    beyond_T = ~again_T & (position_T >= rows.to_Q[request_T])
    kept = np.flatnonzero(~again_T & ~beyond_T)
    reason_K = rows.reason_T[kept]
    state_K = state_of(reason_K)
    phase_K = np.where(position_T[kept] < rows.prompt_Q[request_T[kept]], Phase.PROMPT, Phase.OUTPUT).astype(np.uint8)
    ones_K = np.ones(len(kept), np.int64)
    segments = runs(rows.handle_Q[request_T[kept]], position_T[kept], ones_K, state_K, reason_K, phase_K)
    scored = kept[state_K == TokenState.SCORED]
    return Attributed(
        segments_S=segments,
        scored=scores_of(rows, scored),
        scored_T=scored,
        again_T=np.flatnonzero(again_T & (rows.reason_T == Reason.NONE)),
        recomputed=int(again_T.sum()),
        beyond=int(beyond_T.sum()),
    )


def positions(start_Q: I64, count_Q: I64) -> tuple[I64, I64]:
    """For each row of a step, int64 [T]: the place of its request in the step, and its position in that request."""
    request_T = np.repeat(np.arange(len(count_Q)), count_Q)
    first_T = np.repeat(np.cumsum(count_Q) - count_Q, count_Q)
    return request_T, start_Q[request_T] + np.arange(len(request_T)) - first_T


def scores_of(rows: StepRows, chosen: npt.NDArray[np.intp]) -> ScoredRows:
    """The scores of some of a step's rows, in their order."""
    return ScoredRows(_renumber(rows.fires_N, chosen, len(rows.reason_T)), rows.dense_TP[chosen], rows.norm_TH[chosen])


def joined(parts: Sequence[ScoredRows]) -> ScoredRows:
    """The rows of all parts, one part behind the other. At least one part."""
    fires_N = np.concatenate([part.fires_N for part in parts])
    rows_before = np.cumsum([0, *(len(part.norm_RH) for part in parts[:-1])])
    fires_N["row"] += np.repeat(rows_before, [len(part.fires_N) for part in parts]).astype(np.uint32)
    return ScoredRows(
        fires_N, np.concatenate([part.dense_RP for part in parts]), np.concatenate([part.norm_RH for part in parts])
    )


def state_of(reason: U8) -> U8:
    """The state that a row's reason means."""
    state: U8 = _STATE_OF[reason]
    return state


def span(handle: int, start: int, stop: int, prompt_tokens: int, reason: Reason) -> Array:
    """Segments [0..2] for the positions start..stop-1 of one request, none of which was scored."""
    pieces = ((start, min(stop, prompt_tokens), Phase.PROMPT), (max(start, prompt_tokens), stop, Phase.OUTPUT))
    state = state_of(np.array([reason], np.uint8))[0]
    return np.array(
        [(handle, first, last - first, state, reason, phase) for first, last, phase in pieces if last > first],
        SEGMENT_DTYPE,
    )


def _renumber(fires_N: Array, scored: npt.NDArray[np.intp], rows: int) -> Array:
    """The activations of the scored rows, numbered as those rows and sorted by (row, feature)."""
    number_T = np.full(rows, -1, np.int64)
    number_T[scored] = np.arange(len(scored))
    row = number_T[fires_N["row"]]
    kept = np.flatnonzero(row >= 0)
    order = kept[np.lexsort((fires_N["feature"][kept], row[kept]))]
    out = np.empty(len(order), FIRE_DTYPE)
    out["row"] = row[order]
    out["feature"] = fires_N["feature"][order]
    out["act"] = fires_N["act"][order]
    return out
