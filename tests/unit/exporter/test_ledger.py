"""I1 and I2 without an engine: whatever the scheduler does, each position is accounted for once, with its own score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.exporter.ledger import Ledger
from latentwatch.exporter.ledger_state import LedgerState
from latentwatch.handover.events import Closed, Event, Grown, Opened, TurnEnded, decode_events, encode_events
from latentwatch.handover.ring import REQUEST_DTYPE, RawStep
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.step.batch import FIRE_DTYPE, EngineCounters, RequestClosed, StepBatch, owns_rows
from latentwatch.step.checks import validate

SPARSE = np.array([True, True, False])


def score(handle: int, position: int, attempt: int = 0) -> float:
    """A value that names its request, its position and the time it was computed."""
    return handle + position / 1024 + attempt / 2**20


def raw(
    requests: list[tuple[int, int, int]],
    events: Sequence[Event] = (),
    *,
    number: int = 1,
    score_of: Any = lambda slot, position: 1.0,
    scored_rows: int | None = None,
    silent: bool = False,
    infinite: tuple[int, ...] = (),
) -> RawStep:
    """A step whose row at (slot, position) fires feature 1 with score_of(slot, position)."""
    rows = [(slot, start + i) for slot, start, count in requests for i in range(count)]
    scored = len(rows) if scored_rows is None else scored_rows
    fires = np.array([(i, 1, score_of(*row)) for i, row in enumerate(rows[:scored])], FIRE_DTYPE)
    norm = np.ones((scored, 1), np.float32)
    norm[list(infinite)] = np.inf
    return RawStep(
        step=number,
        time_unix_nano=number,
        requests_Q=np.array(requests, REQUEST_DTYPE),
        rows=len(rows),
        scored_rows=scored,
        silent=silent,
        fires_N=fires if not silent else fires[:0],
        dense_TP=np.array([[score_of(*row)] for row in rows[:scored]], np.float16).reshape(scored, 1),
        norm_TH=norm,
        events=encode_events(events),
    )


def opened(slot: int, handle: int, prompt: int, cached: int = 0) -> Opened:
    return Opened(slot, handle, f"r{handle}", prompt, cached, "", "")


@dataclass
class Books:
    """What a collector would have after a sequence of batches."""

    tokens: Counter[tuple[int, TokenState, Reason, Phase]] = field(default_factory=Counter)
    score: dict[tuple[int, int], float] = field(default_factory=dict)
    closed: dict[int, RequestClosed] = field(default_factory=dict)

    def take(self, batch: StepBatch) -> None:
        validate(batch, sparse_F=SPARSE, hook_points=1)
        row = 0
        for s, owns in zip(batch.segments_S, owns_rows(batch.segments_S), strict=True):
            handle, start, count = int(s["handle"]), int(s["start"]), int(s["count"])
            self.tokens[handle, TokenState(s["state"]), Reason(s["reason"]), Phase(s["phase"])] += count
            for i in range(count):
                assert (handle, start + i) not in self.score, f"position {start + i} of request {handle} came twice"
                self.score[handle, start + i] = np.nan
                if owns:
                    fire = batch.fires_N[batch.fires_N["row"] == row + i]
                    self.score[handle, start + i] = float(fire["act"][0])
            row += count if owns else 0
        for closed in batch.closed:
            self.closed[closed.handle] = closed

    def total(self, handle: int) -> int:
        return sum(count for (h, *_), count in self.tokens.items() if h == handle)


def run(*steps: RawStep, armed: bool = True, drafts: bool = False) -> Books:
    ledger, books = Ledger(armed=armed, drafts=drafts), Books()
    for each in steps:
        books.take(ledger.settle(each, EngineCounters()))
    books.take(ledger.finish())
    return books


def test_events_survive_the_ring_as_they_were():
    events: list[Event] = [opened(3, 17, 5, cached=2), Closed(1, -1, True)]
    assert decode_events(encode_events(events)) == events


def test_a_plain_request_has_prompt_plus_output_minus_one_tokens_all_scored():
    books = run(
        raw([(0, 0, 4)], [opened(0, 1, 4)], number=1),
        raw([(0, 4, 1)], number=2),
        raw([(0, 5, 1)], number=3),
        raw([], [Closed(0, 3, False)], number=3),
    )
    assert books.tokens == {
        (1, TokenState.SCORED, Reason.NONE, Phase.PROMPT): 4,
        (1, TokenState.SCORED, Reason.NONE, Phase.OUTPUT): 2,
    }
    assert (books.closed[1].total_tokens, books.closed[1].outcome) == (6, Outcome.FINISHED)


def test_the_row_that_async_scheduling_computes_past_the_end_is_nobodys_token():
    ledger, books = Ledger(armed=True, drafts=False), Books()
    for each in (
        raw([(0, 0, 4)], [opened(0, 1, 4)]),
        raw([(0, 4, 1)]),  # position 4 holds the stop token: the request ended with one output token
        raw([], [Closed(0, 1, False)]),
    ):
        books.take(ledger.settle(each, EngineCounters()))
    assert books.total(1) == books.closed[1].total_tokens == 4
    assert ledger.surplus_tokens == 1


def test_a_prefix_cache_hit_is_unseen_and_counted():
    books = run(raw([(0, 32, 8)], [opened(0, 1, 40, cached=32)]), raw([], [Closed(0, 1, False)]))
    assert books.tokens[1, TokenState.UNSEEN, Reason.PREFIX_CACHE, Phase.PROMPT] == 32
    assert books.total(1) == books.closed[1].total_tokens == 40


def test_recompute_after_preemption_counts_each_position_once_with_its_first_final_score():
    books = run(
        raw([(0, 0, 4)], [opened(0, 1, 4)], score_of=lambda s, p: score(1, p)),
        raw([(0, 4, 1)], score_of=lambda s, p: score(1, p)),
        raw([(0, 5, 1)], score_of=lambda s, p: score(1, p)),
        raw([(0, 0, 6)], score_of=lambda s, p: score(1, p, attempt=1)),
        raw([(0, 6, 1)], score_of=lambda s, p: score(1, p)),
        raw([], [Closed(0, 4, False)]),
    )
    assert books.total(1) == books.closed[1].total_tokens == 7
    assert books.score[1, 3] == np.float32(score(1, 3))


def test_rejected_drafts_are_never_committed():
    """Four rows at 4..7, of which the next step confirms 4 and 5 by going on at 6."""
    books = run(
        raw([(0, 0, 4)], [opened(0, 1, 4)]),
        raw([(0, 4, 4)], score_of=lambda s, p: score(1, p, attempt=1)),
        raw([(0, 6, 4)], score_of=lambda s, p: score(1, p, attempt=2)),
        raw([], [Closed(0, 4, False)]),
        drafts=True,
    )
    assert books.total(1) == books.closed[1].total_tokens == 7
    assert books.score[1, 5] == np.float32(score(1, 5, attempt=1))
    assert books.score[1, 6] == np.float32(score(1, 6, attempt=2))


def test_a_slot_used_again_in_the_step_that_frees_it_mixes_nothing():
    books = run(
        raw([(0, 0, 4)], [opened(0, 1, 4)]),
        raw([(0, 4, 1)], score_of=lambda s, p: score(1, p)),
        raw([(0, 0, 3)], [Closed(0, 2, False), opened(0, 2, 3)], score_of=lambda s, p: score(2, p)),
        raw([], [Closed(0, 1, False)]),
    )
    assert (books.total(1), books.total(2)) == (5, 3)
    assert books.score[1, 4] == np.float32(score(1, 4))
    assert books.score[2, 0] == np.float32(score(2, 0))


def test_steps_that_found_the_ring_full_are_dropped_tokens_in_the_middle_and_at_the_end():
    books = run(
        raw([(0, 0, 4)], [opened(0, 1, 4)], number=1),
        raw([(0, 6, 1)], number=4),
        raw([], [Closed(0, 5, False)], number=7),
    )
    assert books.tokens[1, TokenState.DROPPED, Reason.RING_FULL, Phase.OUTPUT] == 3
    assert books.total(1) == books.closed[1].total_tokens == 8


def test_an_aborted_request_stops_where_the_engine_stopped():
    books = run(
        raw([(0, 0, 16), (1, 0, 4)], [opened(0, 1, 40), opened(1, 2, 4)]),
        raw([(0, 16, 16), (1, 4, 1)]),
        raw([], [Closed(0, 0, True), Closed(1, 1, True)]),
    )
    assert (books.total(1), books.closed[1].total_tokens, books.closed[1].outcome) == (32, 32, Outcome.ABORTED)
    assert (books.total(2), books.closed[2].total_tokens) == (4, 4)


def test_an_engine_that_is_not_armed_counts_every_token_as_unseen():
    books = run(raw([(0, 0, 4)], [opened(0, 1, 4)], scored_rows=0), raw([], [Closed(0, 1, False)]), armed=False)
    assert books.tokens == {(1, TokenState.UNSEEN, Reason.NOT_ARMED, Phase.PROMPT): 4}


@pytest.mark.parametrize("reason", [Reason.PREFIX_CACHE, Reason.KV_CONNECTOR])
def test_a_prefix_hit_of_an_engine_that_is_not_armed_is_unseen_for_that_reason_and_no_other(reason):
    ledger, books = Ledger(armed=False, drafts=False, cached_reason=reason), Books()
    hit = raw([(0, 32, 4)], [opened(0, 1, 36, cached=32)], scored_rows=0)
    for each in (hit, raw([], [Closed(0, 1, False)])):
        books.take(ledger.settle(each, EngineCounters()))
    books.take(ledger.finish())
    assert books.tokens == {(1, TokenState.UNSEEN, Reason.NOT_ARMED, Phase.PROMPT): 36}


def test_a_step_without_a_trace_of_the_op_is_unseen_not_zero():
    books = run(raw([(0, 0, 4)], [opened(0, 1, 4)], scored_rows=0, silent=True), raw([], [Closed(0, 1, False)]))
    assert books.tokens == {(1, TokenState.UNSEEN, Reason.OP_SILENT, Phase.PROMPT): 4}


def test_rows_that_did_not_fit_and_rows_that_are_not_finite_are_dropped_by_reason():
    books = run(raw([(0, 0, 6)], [opened(0, 1, 6)], scored_rows=4, infinite=(1,)), raw([], [Closed(0, 1, False)]))
    assert books.tokens == {
        (1, TokenState.SCORED, Reason.NONE, Phase.PROMPT): 3,
        (1, TokenState.DROPPED, Reason.NON_FINITE, Phase.PROMPT): 1,
        (1, TokenState.DROPPED, Reason.TRIPLES_FULL, Phase.PROMPT): 2,
    }


class Simulation:
    """A scheduler that does everything a real one may: chunks, mixes, preempts, aborts, runs one step past the end."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.free: list[int] = []
        self.slots = self.handles = self.attempts = 0
        self.live: dict[int, dict[str, int]] = {}
        self.expected: dict[int, dict[str, Any]] = {}
        self.pending: list[Event] = []

    def steps(self, count: int, lossy: bool) -> list[RawStep]:
        out, number = [], 0
        for _ in range(count):
            made = self.one(number + 1)
            number += made.rows > 0
            made = replace(made, step=number)  # as the tap counts: what has no rows is no step
            if lossy and self.rng.random() < 0.15:
                continue  # the ring was full: the events wait for the next step
            out.append(made)
            self.pending = []
        for slot in list(self.live):
            self.end(slot, aborted=True)
        out.append(self.raw([], number))
        return out

    def one(self, number: int) -> RawStep:
        for slot in list(self.live):
            r = self.live[slot]
            if r["done"] or self.rng.random() < 0.03:
                self.end(slot, aborted=not r["done"])
        if len(self.live) < 4 and self.rng.random() < 0.6:
            self.begin()
        batch = []
        for slot, r in self.live.items():
            if self.rng.random() < 0.08 and r["at"] > 0:
                r["at"] = int(self.rng.integers(0, r["at"]))  # preempted, part of its KV is lost
            if self.rng.random() < 0.15:
                continue  # no budget this step
            known = r["prompt"] + r["out"]
            count = int(min(known - r["at"], self.rng.integers(1, 9)))
            if count <= 0:
                continue
            batch.append((slot, r["at"], count))
            r["at"] += count
            if r["at"] == known:
                # The row at the end samples. A stop is known one step later: the step after it still runs.
                if r["stopped"]:
                    r["done"] = 1
                else:
                    r["out"] += 1
                    r["stopped"] = int(r["out"] >= r["want"])
        order = self.rng.permutation(len(batch))
        return self.raw([batch[i] for i in order], number)

    def begin(self) -> None:
        slot = self.free.pop() if self.free else self.slots
        self.slots = max(self.slots, slot + 1)
        self.handles += 1
        prompt = int(self.rng.integers(1, 20))
        cached = int(self.rng.integers(0, prompt)) if self.rng.random() < 0.3 else 0
        want = int(self.rng.integers(1, 6))
        state = {"at": cached, "out": 0, "want": want, "stopped": 0, "done": 0}
        self.live[slot] = {"handle": self.handles, "prompt": prompt, **state}
        self.pending.append(opened(slot, self.handles, prompt, cached))

    def end(self, slot: int, aborted: bool) -> None:
        r = self.live.pop(slot)
        self.free.append(slot)
        self.pending.append(Closed(slot, r["out"], aborted))
        self.expected[r["handle"]] = r

    def raw(self, batch: list[tuple[int, int, int]], number: int) -> RawStep:
        handle = {slot: r["handle"] for slot, r in self.live.items()}
        return raw(batch, self.pending, number=number, score_of=lambda slot, p: score(handle[slot], p))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lossy=st.booleans())
def test_books_balance_whatever_the_scheduler_does(seed, lossy):
    """Every request: each position once, its own score, and the sum that the engine's own counts give."""
    simulation = Simulation(np.random.default_rng(seed))
    books = run(*simulation.steps(80, lossy))
    assert set(books.closed) == set(simulation.expected)
    for handle, r in simulation.expected.items():
        assert books.total(handle) == books.closed[handle].total_tokens
        if r["out"] > 0:
            assert books.closed[handle].total_tokens == r["prompt"] + r["out"] - 1
    for (handle, position), value in books.score.items():
        assert np.isnan(value) or value == np.float32(score(handle, position))
    if not lossy:
        assert not any(state == TokenState.DROPPED for _, state, _, _ in books.tokens)


def test_a_single_step_that_was_lost_before_an_idle_moment_is_a_gap_and_no_prefix_cache_hit():
    """The step without rows, which says that another request ended, has the number of the one that was lost."""
    books = run(
        raw([(0, 0, 4), (1, 0, 2)], [opened(0, 1, 4), opened(1, 2, 2)], number=1),
        raw([], [Closed(1, 1, False)], number=2),
        raw([(0, 5, 1)], number=3),
        raw([], [Closed(0, 3, False)], number=3),
    )
    assert books.tokens[1, TokenState.DROPPED, Reason.RING_FULL, Phase.OUTPUT] == 1
    assert (1, TokenState.UNSEEN, Reason.PREFIX_CACHE, Phase.OUTPUT) not in books.tokens
    assert books.total(1) == books.closed[1].total_tokens == 6


def test_what_is_told_late_in_several_parts_is_of_the_steps_that_were_lost_before_the_first_of_them():
    """All parts have the number of the newest step, so none after the first one shows a loss of its own."""
    books = run(
        raw([(0, 0, 4)], [opened(0, 1, 4)], number=1),
        raw([], [opened(1, 2, 5), Closed(1, 3, False)], number=9),
        raw([], [opened(1, 3, 6), Closed(1, 2, False)], number=9),
        raw([(0, 4, 1)], number=10),
        raw([], [opened(2, 4, 7), Closed(2, 1, False)], number=10),
        raw([], [Closed(0, 8, False)], number=10),
    )
    for handle, tokens in ((2, 7), (3, 7), (4, 7)):
        assert books.total(handle) == tokens
        assert not any(books.tokens.get((handle, TokenState.DROPPED, Reason.LOST, phase)) for phase in Phase)
        assert sum(books.tokens[handle, TokenState.DROPPED, Reason.RING_FULL, phase] for phase in Phase) == tokens


def test_of_a_request_that_was_aborted_before_its_first_token_what_the_ring_had_no_room_for_counts():
    books = run(
        raw([(0, 0, 4)], [opened(0, 1, 40)], number=1),
        raw([], [Closed(0, 0, True, reached=12)], number=3),
    )
    assert books.total(1) == books.closed[1].total_tokens == 12
    assert books.tokens[1, TokenState.DROPPED, Reason.RING_FULL, Phase.PROMPT] == 8


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lossy=st.booleans())
def test_a_ledger_that_takes_over_after_any_step_says_what_the_first_one_would_have_said(seed, lossy):
    steps = Simulation(np.random.default_rng(seed)).steps(40, lossy)
    rng = np.random.default_rng(seed)
    for drafts in (False, True):
        whole, books = run(*steps, drafts=drafts), Books()
        ledger, last = Ledger(armed=True, drafts=drafts), None
        for each in steps:
            if rng.random() < 0.3:
                state = LedgerState.from_bytes(ledger.state().to_bytes())
                ledger = Ledger(armed=True, drafts=drafts)
                ledger.restore(state, last)
            books.take(ledger.settle(each, EngineCounters()))
            last = each if len(each.requests_Q) else None
        books.take(ledger.finish())
        assert books.tokens == whole.tokens and books.closed == whole.closed
        assert {k: v for k, v in books.score.items() if v == v} == {k: v for k, v in whole.score.items() if v == v}


def phases(books: Books, handle: int) -> dict[Phase, int]:
    return {phase: sum(n for (h, _, _, of), n in books.tokens.items() if (h, of) == (handle, phase)) for phase in Phase}


def test_a_session_is_prompt_and_output_by_turns_and_the_row_past_an_output_is_no_token():
    """Three inputs of 5, 4 and 3 tokens; outputs of 3, 1 and 2, of which the last token is dropped each time."""
    books = run(
        raw([(0, 0, 5)], [opened(0, 1, 5)], number=1),
        raw([(0, 5, 1)], number=2),
        raw([(0, 6, 1)], number=3),
        raw([(0, 7, 1)], number=4),  # computed past the end, before the engine knew of it
        raw([], [TurnEnded(0, 7)], number=5),
        raw([(0, 7, 4)], [Grown(0, 11)], number=6),
        raw([(0, 11, 3)], [TurnEnded(0, 11), Grown(0, 14)], number=7),
        raw([(0, 14, 1)], number=8),
        raw([], [Closed(0, 2, False, 0, 14)], number=9),
    )
    closed = books.closed[1]
    assert (closed.prompt_tokens, closed.output_tokens, closed.total_tokens) == (14, 2, 15)
    assert books.total(1) == 15 and phases(books, 1) == {Phase.PROMPT: 12, Phase.OUTPUT: 3}
    assert sorted(position for _, position in books.score) == list(range(15))


def test_a_session_whose_last_input_was_never_computed_ends_where_the_engine_stopped():
    books = run(
        raw([(0, 0, 5)], [opened(0, 1, 5)], number=1),
        raw([(0, 5, 1)], number=2),
        raw([], [TurnEnded(0, 6), Closed(0, 0, True, 6, 10)], number=3),
    )
    assert books.closed[1].total_tokens == books.total(1) == 6
    assert books.closed[1].prompt_tokens == 10
