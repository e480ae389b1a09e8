"""Steps that are held back until a later one says which of their rows are true.

Without drafts a step waits for the next one only, which says what requests had ended before it: async scheduling
computes a row past the end. With drafts (speculative decoding) a request's rows wait until it goes on or ends: it goes
on behind the last draft that was accepted. Of a request's rows in a step the first is always true, and so are those of
its prompt; where no step says more, nothing beyond these is.

Legend: Q requests of a step, T its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from latentwatch.arrays import I64, Bool
from latentwatch.handover.ring import RawStep

NO_BOUND: Final = np.int64(1) << 40
_WAITS: Final = np.int64(-1)


class DecidedStep(NamedTuple):
    """A step, or part of one, that is decided."""

    raw: RawStep
    to_Q: I64
    """The first position of each request that is not true."""
    newest: bool
    """No step came between: the requests' KV lies where it lay in this step."""


def steps_were_lost(newest: int, raw: RawStep) -> bool:
    """Whether steps between `newest`, the last that was read, and this one found no slot in the ring.

    One without rows stands between two steps and has the number of the one before it: where that is not the newest,
    that one was lost.
    """
    return raw.step > newest + (raw.rows > 0)


class PendingSteps:
    """The steps that wait, oldest first. A request waits in one of them at most, but for the newest step."""

    def __init__(self, *, drafts: bool) -> None:
        self._drafts = drafts
        self._steps: list[RawStep] = []
        self._newest = 0
        self._newest_waits = False

    @property
    def parts(self) -> list[RawStep]:
        """What waits of steps before the newest. The newest waits whole, where it has rows."""
        return self._steps[:-1] if self._newest_waits else self._steps

    def add(self, raw: RawStep) -> None:
        """Keep a copy: the engine will write over the step's slot in the ring."""
        self._newest = raw.step
        self._newest_waits = len(raw.requests_Q) > 0
        if self._newest_waits:
            self._steps.append(_copied(raw))

    def restore(self, newest: int, parts: Sequence[RawStep], last: RawStep | None) -> None:
        """Go on from here. Args: last: the newest step, where it waits."""
        self._newest, self._steps, self._newest_waits = newest, list(parts), False
        if last is not None:
            self.add(last)

    def settled(self, raw: RawStep | None, prompt: I64, end: I64) -> list[DecidedStep]:
        """The steps, or parts of them, that are decided now, oldest first.

        Args:
            raw: the step that follows the newest one held; None where none will follow.
            prompt, end: by slot: prompt tokens, and the first position past what a request that ended had computed,
                NO_BOUND where it has not ended.
        """
        goes_on = np.full(len(prompt), -1, np.int64)
        lost = raw is None or steps_were_lost(self._newest, raw)
        if raw is not None:
            known = raw.requests_Q["slot"] < len(prompt)
            goes_on[raw.requests_Q["slot"][known]] = raw.requests_Q["start"][known]
        steps, self._steps = self._steps, []
        decided = []
        for step in steps:
            to_Q = self._bounds(step, prompt, end, goes_on, lost=lost)
            waits_Q = to_Q == _WAITS
            if waits_Q.any():
                self._steps.append(_part(step, waits_Q))
                step, to_Q = _part(step, ~waits_Q), to_Q[~waits_Q]
            if len(to_Q):
                decided.append(DecidedStep(step, to_Q, newest=step.step == self._newest))
        return decided

    def _bounds(self, step: RawStep, prompt: I64, end: I64, goes_on: I64, *, lost: bool) -> I64:
        slot_Q = step.requests_Q["slot"].astype(np.int64)
        known_Q = slot_Q < len(end)
        slot_Q = np.where(known_Q, slot_Q, 0)
        end_Q = np.where(known_Q, end[slot_Q], NO_BOUND)
        if not self._drafts:
            return end_Q
        start_Q = step.requests_Q["start"].astype(np.int64)
        sure_Q = np.maximum(start_Q + 1, prompt[slot_Q])
        if lost:
            # A step in between was dropped: where a request goes on now says nothing of the drafts in this one.
            open_Q = sure_Q
        else:
            goes_on_Q = goes_on[slot_Q]
            # Where it goes on further back it was preempted; what it computes again then counts.
            open_Q = np.where(goes_on_Q >= 0, np.maximum(goes_on_Q, sure_Q), _WAITS)
        to_Q = np.where(start_Q + step.requests_Q["count"] <= sure_Q, NO_BOUND, open_Q)
        ended_Q = np.minimum(end_Q, to_Q) if lost else end_Q
        return np.where(known_Q & (end_Q == NO_BOUND), to_Q, ended_Q)


def _copied(raw: RawStep) -> RawStep:
    return dataclasses.replace(
        raw,
        requests_Q=raw.requests_Q.copy(),
        fires_N=raw.fires_N.copy(),
        dense_TP=raw.dense_TP.copy(),
        norm_TH=raw.norm_TH.copy(),
        events=b"",
    )


def _part(raw: RawStep, chosen_Q: Bool) -> RawStep:
    """The step as if it had held only some of its requests."""
    row_of_T: Bool = np.repeat(chosen_Q, raw.requests_Q["count"])
    number_T = np.cumsum(row_of_T) - 1
    scored_T = row_of_T[: raw.scored_rows]
    fires_N = raw.fires_N[row_of_T[raw.fires_N["row"]]]
    fires_N["row"] = number_T[fires_N["row"]]
    return dataclasses.replace(
        raw,
        requests_Q=raw.requests_Q[chosen_Q],
        rows=int(row_of_T.sum()),
        scored_rows=int(scored_T.sum()),
        fires_N=fires_N,
        dense_TP=raw.dense_TP[scored_T],
        norm_TH=raw.norm_TH[scored_T],
    )
