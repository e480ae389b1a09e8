"""Sessions, which take input while they run: whatever the scheduler does with them, their books balance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.handover.events import Closed, Event, Grown, TurnEnded
from latentwatch.handover.ring import RawStep
from latentwatch.names import Phase

from tests.unit.exporter.test_ledger import opened, phases, raw, run, score


@dataclass
class Session:
    """One as the scheduler has it; `reached` is its first position that was never computed or found in the cache."""

    slot: int
    handle: int
    prompt: int
    computed: int
    reached: int
    said: int = 0
    """Output tokens of this turn."""
    inputs: int = 0
    """Positions that were computed as prompt."""
    waits: bool = False


class Sessions:
    """A scheduler that cuts turns into chunks, finds prefixes in the cache, preempts and aborts."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.free = list(range(4))
        self.live: dict[int, Session] = {}
        self.ended: dict[int, Session] = {}
        self.handles = 0
        self.events: list[Event] = []

    def steps(self, count: int) -> list[RawStep]:
        made, number = [], 0
        for _ in range(count):
            step = self.step(number + 1)
            number += step.rows > 0
            made.append(replace(step, step=number))  # as the tap counts: what has no rows is no step
        for session in list(self.live.values()):
            self.end(session)
        return [*made, raw([], self.events, number=number)]

    def step(self, number: int) -> RawStep:
        if self.free and self.rng.random() < 0.5:
            self.begin()
        handles = {slot: session.handle for slot, session in self.live.items()}
        rows, later = [], list[Event]()
        for session in list(self.live.values()):
            rows += self.rows(session, later)
        events, self.events = self.events, later
        return raw(rows, events, number=number, score_of=lambda slot, position: score(handles[slot], position))

    def begin(self) -> None:
        prompt = int(self.rng.integers(1, 12))
        cached = int(self.rng.integers(0, prompt))
        self.handles += 1
        session = Session(self.free.pop(), self.handles, prompt, cached, cached, inputs=cached)
        self.live[session.slot] = session
        self.events.append(opened(session.slot, session.handle, prompt, cached))

    def rows(self, session: Session, later: list[Event]) -> list[tuple[int, int, int]]:
        chance = self.rng.random()
        if session.waits:
            if chance < 0.3:
                self.end(session)
            elif chance < 0.6:
                self.grow(session)
            return []
        if chance < 0.05:
            self.end(session, aborted=True)
            return []
        if chance < 0.15:
            session.computed = int(self.rng.integers(0, session.computed + 1))
            return []
        return [self.compute(session, later)]

    def compute(self, session: Session, later: list[Event]) -> tuple[int, int, int]:
        known = session.prompt + session.said
        count = int(self.rng.integers(1, known - session.computed + 1))
        row = (session.slot, session.computed, count)
        session.computed += count
        new = range(session.reached, session.computed)
        session.inputs += sum(position < session.prompt for position in new)
        session.reached = max(session.reached, session.computed)
        if session.computed == known:
            session.said += 1
            if self.rng.random() < 0.3:
                session.waits = True
                later.append(TurnEnded(session.slot, session.computed))
        return row

    def grow(self, session: Session) -> None:
        """More input, behind what was computed: the output's last token is dropped, the others are context now."""
        session.prompt = session.computed + int(self.rng.integers(1, 9))
        session.said, session.waits = 0, False
        self.events.append(Grown(session.slot, session.prompt))

    def end(self, session: Session, *, aborted: bool = False) -> None:
        reached = 0 if session.said else session.reached
        self.events.append(Closed(session.slot, session.said, aborted, reached, session.prompt))
        self.ended[session.handle] = session
        del self.live[session.slot]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), drafts=st.booleans())
def test_each_position_of_a_session_is_once_in_the_books_in_the_phase_in_which_it_was_computed(seed, drafts):
    sessions = Sessions(seed)
    books = run(*sessions.steps(60), drafts=drafts)
    assert set(books.closed) == set(sessions.ended)
    for handle, session in sessions.ended.items():
        total = session.prompt + session.said - 1 if session.said else min(session.reached, session.prompt)
        assert books.total(handle) == books.closed[handle].total_tokens == total
        assert {position for of, position in books.score if of == handle} == set(range(total))
        if not session.said or session.reached == total:
            assert phases(books, handle)[Phase.PROMPT] == session.inputs
    for (handle, position), value in books.score.items():
        assert np.isnan(value) or value == np.float32(score(handle, position))
