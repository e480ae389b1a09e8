"""Prefix-cache hits: in which KV block each position of a request lies, and the scores that were given there before.

Legend: Q requests of a step, T its rows, R rows chosen among them.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import numpy as np

from latentwatch.arrays import I64, Array
from latentwatch.exporter.attribution import Attributed, ScoredRows, StepRows, positions, scores_of, span
from latentwatch.exporter.score_cache import ScoreCache
from latentwatch.handover.events import Blocks, Opened
from latentwatch.names import Phase, Reason, TokenState
from latentwatch.step.reshape import runs


class Hit(NamedTuple):
    """Positions start..stop-1 of a request, found in the prefix cache and not taken over yet."""

    request: Opened
    start: int
    stop: int


class Inheritance:
    """The KV blocks of the open requests, by table slot, over the scores by KV slot."""

    def __init__(self, score_cache: ScoreCache | None, cached_reason: Reason) -> None:
        """Args:
        score_cache: None where the engine's cache cannot be followed; then nothing is inherited.
        cached_reason: why tokens that inherit nothing are unseen.
        """
        self._score_cache = score_cache
        self._cached_reason = cached_reason
        self._block = np.full((64, 64), -1, np.int32)

    def open(self, slot: int) -> None:
        """A request begins in this table slot."""
        while slot >= len(self._block):
            self._block = np.concatenate([self._block, np.full_like(self._block, -1)])
        self._block[slot] = -1

    def clear(self) -> None:
        """What became of the KV blocks is not known any more."""
        if self._score_cache is not None:
            self._score_cache.clear()
        self._block[:] = -1

    def assign(self, event: Blocks, open_slots: Container[int]) -> None:
        """Take over what KV blocks requests were given; the new ones among them forget what they held."""
        if self._score_cache is None:
            return
        for slot, at, hits, *blocks in event.given:
            if slot not in open_slots:
                continue
            while at + len(blocks) > self._block.shape[1]:
                self._block = np.concatenate([self._block, np.full_like(self._block, -1)], axis=1)
            self._block[slot, at : at + len(blocks)] = blocks
            self._block[slot, at + len(blocks) :] = -1
            self._score_cache.forget(np.array(blocks[hits:], np.int64))

    def store(self, rows: StepRows, attributed: Attributed, slot_Q: I64) -> None:
        """Keep what was scored under the KV slot of its token. `slot_Q` is -1 for a request that is not known."""
        if self._score_cache is None:
            return
        request_T, position_T = positions(rows.start_Q, rows.count_Q)
        for chosen, scored in ((attributed.scored_T, attributed.scored), (attributed.again_T, None)):
            if not len(chosen):
                continue
            slot_R = slot_Q[request_T[chosen]]
            kv_R = np.where(slot_R >= 0, self._kv_slots(slot_R, position_T[chosen], self._score_cache), -1)
            there = kv_R >= 0
            if scored is None or not there.all():
                scored = scores_of(rows, chosen[there])
            self._score_cache.write(kv_R[there], scored)

    def of(self, hit: Hit) -> tuple[Array, ScoredRows | None]:
        """(segments, scores) of what a request found in the prefix cache: inherited where scores are there, else
        unseen."""
        request, start, stop = hit
        if self._score_cache is None:
            return span(request.handle, start, stop, request.prompt_tokens, self._cached_reason), None
        position = np.arange(start, stop)
        kv = self._kv_slots(request.slot, position, self._score_cache)
        there = kv >= 0
        there[there], scored = self._score_cache.read(kv[there])
        return runs(
            np.full(len(position), request.handle, np.int64),
            position,
            np.ones(len(position), np.int64),
            np.where(there, TokenState.INHERITED, TokenState.UNSEEN).astype(np.uint8),
            np.where(there, Reason.NONE, self._cached_reason).astype(np.uint8),
            np.where(position < request.prompt_tokens, Phase.PROMPT, Phase.OUTPUT).astype(np.uint8),
        ), scored

    def _kv_slots(self, slot: I64 | int, position: I64, score_cache: ScoreCache) -> I64:
        """Where the engine keeps each position's KV, -1 where it did not say."""
        size, width = score_cache.block_size, self._block.shape[1]
        at = position // size
        block = np.where(at < width, self._block[slot, np.minimum(at, width - 1)], -1).astype(np.int64)
        return np.where(block >= 0, block * size + position % size, -1)
