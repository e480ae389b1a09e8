"""Prefix-cache hits inherit exactly and only accepted drafts are committed, whatever the engine does meanwhile."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.exporter.attribution import ScoredRows
from latentwatch.exporter.ledger import Ledger
from latentwatch.exporter.pending_steps import PendingSteps
from latentwatch.exporter.score_cache import ScoreCache
from latentwatch.handover.events import Blocks, Closed, Event
from latentwatch.handover.ring import RawStep
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.step.batch import FIRE_DTYPE, EngineCounters

from tests.unit.exporter.test_ledger import Books, opened, raw

BLOCK = 4
POOL = 14
WRONG = 65000.0
"""Score of a row whose token is not the request's."""


def kept(**limits: Any) -> ScoreCache:
    return ScoreCache(blocks=POOL, block_size=BLOCK, dense=1, hook_points=1, **limits)


def score_of(tokens: list[int]) -> float:
    """Depends on the token and all before it, as an activation does."""
    return float(zlib.crc32(bytes(tokens)) % 60000 + 1)


class Engine:
    """A scheduler with a small KV cache: shared prefixes, eviction, preemption, aborts, drafts, skipped requests."""

    def __init__(self, rng: np.random.Generator, *, drafts: bool, lossy: bool) -> None:
        self.rng, self.drafts, self.lossy = rng, drafts, lossy
        self.families = [rng.integers(0, 9, size=16).tolist() for _ in range(2)]
        self.free = list(range(POOL))  # oldest first, as vLLM gives blocks out
        self.cached: dict[bytes, int] = {}
        self.users = np.zeros(POOL, int)
        self.live: dict[int, dict[str, Any]] = {}
        self.ended: dict[int, dict[str, Any]] = {}
        self.pending: list[Event] = []
        self.handles = self.inherited = 0

    def steps(self, count: int) -> list[RawStep]:
        out, number = [], 0
        for _ in range(count):
            made = self.step(number + 1)
            number += made.rows > 0
            made = replace(made, step=number)  # as the tap counts: what has no rows is no step
            if self.lossy and self.rng.random() < 0.15:
                continue  # the ring was full: the events wait for the next step
            out.append(made)
            self.pending = []
        for slot in list(self.live):
            self.end(slot, aborted=True)
        out.append(raw([], self.pending, number=number))
        return out

    def step(self, number: int) -> RawStep:
        for slot, r in list(self.live.items()):
            if len(r["tokens"]) - r["prompt"] >= r["want"] or self.rng.random() < 0.03:
                self.end(slot, aborted=len(r["tokens"]) - r["prompt"] < r["want"])
        if len(self.live) < 3 and self.rng.random() < 0.7:
            self.arrive()
        rows: list[tuple[int, int, int]] = []
        scores: dict[tuple[int, int], float] = {}
        given: list[list[int]] = []
        for slot in list(self.live):
            if self.live[slot]["blocks"] and self.rng.random() < 0.06:
                self.preempt(slot)
            if self.rng.random() < 0.8:
                self.schedule(slot, rows, scores, given)
        if given:
            self.pending.append(Blocks(given))
        order = self.rng.permutation(len(rows))
        return raw([rows[i] for i in order], self.pending, number=number, score_of=lambda slot, p: scores[slot, p])

    def arrive(self) -> None:
        slot = min(set(range(4)) - set(self.live))
        family = self.families[int(self.rng.integers(2))]
        tokens = (
            family[: int(self.rng.integers(0, 17))] + self.rng.integers(0, 9, size=self.rng.integers(1, 9)).tolist()
        )
        self.handles += 1
        want = int(self.rng.integers(1, 9))
        self.live[slot] = {
            "handle": self.handles,
            "tokens": tokens,
            "prompt": len(tokens),
            "want": want,
            "at": 0,
            "blocks": [],
            "announced": False,
            "reached": 0,
        }

    def schedule(self, slot: int, rows: list[Any], scores: dict[Any, float], given: list[list[int]]) -> None:
        r = self.live[slot]
        fresh = not r["blocks"]
        if fresh:
            while (len(r["blocks"]) + 1) * BLOCK < len(r["tokens"]):
                block = self.cached.get(bytes(r["tokens"][: (len(r["blocks"]) + 1) * BLOCK]))
                if block is None:
                    break
                self.use(block)
                r["blocks"].append(block)
            r["at"] = len(r["blocks"]) * BLOCK
        hits = len(r["blocks"]) if fresh else 0
        known, at = len(r["tokens"]), r["at"]
        count = min(known - at, int(self.rng.integers(1, 9)))
        samples = at + count == known
        guessed = int(self.rng.integers(0, 4)) if samples and self.drafts else 0
        before = 0 if fresh else len(r["blocks"])
        need = -(-(at + count + guessed) // BLOCK) - len(r["blocks"])
        if need > len(self.free):
            if fresh:
                self.release(r)
            return
        for _ in range(need):
            block = self.free[0]
            self.cached = {key: held for key, held in self.cached.items() if held != block}
            self.use(block)
            r["blocks"].append(block)
        if not r["announced"]:
            r["announced"] = True
            self.pending.append(opened(slot, r["handle"], r["prompt"], cached=at))
        # A request that is resumed may find more in the cache than it had computed before.
        self.inherited += max(0, at - r["reached"])
        r["reached"] = max(r["reached"], at + count)
        if fresh or need > 0:
            given.append([slot, before, hits, *r["blocks"][before:]])
        rows.append((slot, at, count + guessed))
        for position in range(at, at + count):
            scores[slot, position] = score_of(r["tokens"][: position + 1])
        accepted = 0
        if samples:
            accepted = int(self.rng.integers(0, guessed + 1))
            accepted = min(accepted, r["prompt"] + r["want"] - known - 1)
            r["tokens"] = r["tokens"] + self.rng.integers(0, 9, size=accepted + 1).tolist()
        for position in range(at + count, at + count + guessed):
            true = position < at + count + accepted
            scores[slot, position] = score_of(r["tokens"][: position + 1]) if true else WRONG
        r["at"] = at + count + accepted
        # As vLLM: a block is in the cache as soon as it is scheduled to be full.
        for i in range(r["at"] // BLOCK):
            self.cached.setdefault(bytes(r["tokens"][: (i + 1) * BLOCK]), r["blocks"][i])

    def use(self, block: int) -> None:
        self.users[block] += 1
        if block in self.free:
            self.free.remove(block)

    def release(self, r: dict[str, Any]) -> None:
        for block in reversed(r["blocks"]):
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        r["blocks"] = []

    def preempt(self, slot: int) -> None:
        self.release(self.live[slot])
        self.live[slot]["at"] = 0

    def end(self, slot: int, aborted: bool) -> None:
        r = self.live.pop(slot)
        self.release(r)
        if r["announced"]:
            self.pending.append(Closed(slot, len(r["tokens"]) - r["prompt"], aborted))
            self.ended[r["handle"]] = r


def books_of(engine: Engine, steps: list[RawStep], ledger: Ledger) -> Books:
    books = Books()
    for each in steps:
        books.take(ledger.settle(each, EngineCounters()))
    books.take(ledger.finish())
    for handle, r in engine.ended.items():
        total = books.closed[handle].total_tokens
        assert books.total(handle) == total
        if len(r["tokens"]) > r["prompt"]:
            assert total == len(r["tokens"]) - 1
    return books


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), drafts=st.booleans(), lossy=st.booleans(), small=st.booleans())
def test_every_score_is_that_of_its_own_tokens_computed_or_inherited(seed, drafts, lossy, small):
    engine = Engine(np.random.default_rng(seed), drafts=drafts, lossy=lossy)
    limits = {"max_bytes": 400} if small else {}
    ledger = Ledger(armed=True, drafts=drafts, score_cache=kept(**limits))
    books = books_of(engine, engine.steps(80), ledger)
    for (handle, position), found in books.score.items():
        if not np.isnan(found):
            assert found == score_of(engine.ended[handle]["tokens"][: position + 1])
    states = {state for _, state, _, _ in books.tokens}
    for handle, state, reason, _ in books.tokens if not lossy else ():
        if state == TokenState.DROPPED:
            # Only drafts of a request that was preempted, then aborted before it had computed them again.
            assert drafts and reason == Reason.LOST and books.closed[handle].outcome == Outcome.ABORTED
    if not (drafts or lossy or small):
        # Everything that could be inherited was: nothing else can make a token unseen here.
        assert TokenState.UNSEEN not in states
        inherited = sum(n for (_, state, _, _), n in books.tokens.items() if state == TokenState.INHERITED)
        assert inherited == engine.inherited


def test_a_hit_on_blocks_that_the_same_step_fills_inherits_their_scores():
    """vLLM puts a block into the prefix cache when it schedules it, so that the next request in line can hit it."""
    ledger, books = Ledger(armed=True, drafts=False, score_cache=kept()), Books()
    both: list[Event] = [
        opened(0, 1, 8), opened(1, 2, 6, cached=4), Blocks([[0, 0, 0, 7, 8], [1, 0, 1, 7, 9]]),
    ]  # fmt: skip
    ended: list[Event] = [Closed(0, 1, False), Closed(1, 1, False)]
    for each in (
        raw([(0, 0, 8), (1, 4, 2)], both, number=1, score_of=lambda slot, p: slot * 100.0 + p + 1),
        raw([], ended, number=1),
    ):
        books.take(ledger.settle(each, EngineCounters()))
    assert books.tokens[2, TokenState.INHERITED, Reason.NONE, Phase.PROMPT] == 4
    assert [books.score[2, p] for p in range(6)] == [1.0, 2.0, 3.0, 4.0, 105.0, 106.0]


def test_a_block_allocated_anew_forgets_even_if_the_step_that_filled_it_was_lost():
    ledger, books = Ledger(armed=True, drafts=False, score_cache=kept()), Books()
    for each in (
        raw([(0, 0, 4)], [opened(0, 1, 4), Blocks([[0, 0, 0, 7]])], number=1),
        # Step 2 gave block 7 to request 2 and found the ring full; request 3 hits what it left there.
        raw(
            [(2, 4, 1)],
            [
                Closed(0, 1, False), opened(1, 2, 4), Blocks([[1, 0, 0, 7]]),
                Closed(1, 1, False), opened(2, 3, 5, cached=4), Blocks([[2, 0, 1, 7, 8]]),
            ],
            number=3,
        ),
        raw([], [Closed(2, 1, False)], number=3),
    ):  # fmt: skip
        books.take(ledger.settle(each, EngineCounters()))
    assert books.tokens[3, TokenState.UNSEEN, Reason.PREFIX_CACHE, Phase.PROMPT] == 4
    assert books.total(3) == 5


def test_where_kv_may_come_from_elsewhere_a_cached_token_is_unseen_for_that_reason():
    ledger, books = Ledger(armed=True, drafts=False, cached_reason=Reason.KV_CONNECTOR), Books()
    for each in (raw([(0, 4, 1)], [opened(0, 1, 5, cached=4)]), raw([], [Closed(0, 1, False)])):
        books.take(ledger.settle(each, EngineCounters()))
    assert books.tokens[1, TokenState.UNSEEN, Reason.KV_CONNECTOR, Phase.PROMPT] == 4


def rows(values: list[float]) -> ScoredRows:
    """Row i fires feature 0 i times with its value."""
    fires = [(i, feature, value) for i, value in enumerate(values) for feature in range(i)]
    return ScoredRows(
        np.array(fires, FIRE_DTYPE), np.array(values, np.float16)[:, None], np.array(values, np.float32)[:, None]
    )


def test_what_is_read_is_what_was_written_with_every_activation():
    store = kept()
    store.write(np.array([9, 3, 30]), rows([1.0, 2.0, 3.0]))
    there, found = store.read(np.array([30, 4, 9]))
    assert there.tolist() == [True, False, True]
    assert found.fires_N.tolist() == [(0, 0, 3.0), (0, 1, 3.0)]
    assert (found.dense_RP.tolist(), found.norm_RH.tolist()) == ([[3.0], [1.0]], [[3.0], [1.0]])


def test_memory_is_bounded_and_what_is_inherited_again_and_again_stays():
    store = kept(max_bytes=2000)
    before = sum(part.nbytes for part in vars(store).values() if isinstance(part, np.ndarray))
    assert before <= 2000
    store.write(np.array([0, 1, 2]), rows([1.0, 2.0, 3.0]))
    for i in range(400):
        store.write(np.array([4 + i % 20, 30]), rows([5.0, 6.0]))
        if i % 3 == 0:
            there, found = store.read(np.array([1]))
            assert there.all() and found.fires_N.tolist() == [(0, 0, 2.0)]
    assert not store.read(np.array([2]))[0].any()
    assert before == sum(part.nbytes for part in vars(store).values() if isinstance(part, np.ndarray))


def test_two_slots_that_share_a_place_never_read_each_other():
    store = ScoreCache(blocks=POOL, block_size=BLOCK, dense=1, hook_points=1, max_bytes=2 * 26 * 10)
    store.write(np.array([0, 1]), rows([1.0, 2.0]))
    store.write(np.array([10]), rows([9.0]))
    assert store.read(np.array([0, 1, 10]))[0].tolist() == [False, True, True]
    store.forget(np.array([0]))
    assert store.read(np.array([0, 1, 10]))[0].tolist() == [False, False, True]


def test_a_request_that_skips_a_step_keeps_its_drafts_waiting_until_it_goes_on():
    """Rows 4..7 with three drafts; the step after does not have the request; the one after that goes on at 6."""
    held = PendingSteps(drafts=True)
    prompt, end = np.array([4, 4]), np.full(2, 1 << 40)
    held.add(raw([(0, 4, 4), (1, 4, 1)], number=1))
    assert [s.requests_Q["slot"].tolist() for s, _, _ in held.settled(raw([(1, 5, 1)], number=2), prompt, end)] == [[1]]
    held.add(raw([(1, 5, 1)], number=2))
    decided = held.settled(raw([(0, 6, 1)], number=3), prompt, end)
    assert [(s.requests_Q.tolist(), to.tolist()) for s, to, _ in decided if s.requests_Q["slot"][0] == 0] == [
        ([(0, 4, 4)], [6])
    ]


def test_after_a_lost_step_only_the_first_row_of_a_draft_is_taken_for_true():
    held = PendingSteps(drafts=True)
    held.add(raw([(0, 4, 4)], number=1))
    ((_, to_Q, _),) = held.settled(raw([(0, 8, 4)], number=3), np.array([4]), np.full(1, 1 << 40))
    assert to_Q.tolist() == [5]
