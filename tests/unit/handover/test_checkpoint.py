"""What an exporter notes is there for the next one: all of one commit, and nothing of the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.handover import checkpoint
from latentwatch.handover.checkpoint import Checkpoint, Logged, checkpoint_bytes


class Memory:
    """Shared memory that outlives the checkpoints on it."""

    def __init__(self) -> None:
        self._bytes = memoryview(bytearray(checkpoint_bytes(4)))
        self._word = np.zeros(1, np.uint64)

    def open(self) -> Checkpoint:
        return Checkpoint(self._bytes, self._word)


def shorter(logged: Logged) -> Logged:
    return logged._replace(message=logged.message[:10])


def commit(made: Checkpoint, state: bytes, *new: Logged) -> list[Logged]:
    fitting, let_go = made.make_room(new, shorter)
    made.commit(state, fitting)
    return let_go


def test_the_first_exporter_finds_nothing_and_the_next_one_all():
    memory = Memory()
    one = memory.open()
    assert one.load() is None
    commit(one, b"first", Logged(1, 5, b"a"), Logged(2, 6, b"bb"))
    commit(one, b"second", Logged(3, 7, b"ccc"))
    one.done(2)
    assert memory.open().load() == (b"second", [Logged(1, 5, b"a"), Logged(3, 7, b"ccc")])
    one.done_to(3)
    assert memory.open().load() == (b"second", [])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_is_committed_done_and_interrupted_the_next_one_finds_the_last_commit(seed):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LOG_BYTES", 1 << 12)
        patch.setattr(checkpoint, "_RENEW_BYTES", 1 << 9)
        memory = Memory()
        made, sequence, state = memory.open(), 0, b""
        live: dict[int, Logged] = {}
        for _ in range(120):
            new = [
                Logged(sequence + i, int(rng.integers(100)), rng.bytes(int(rng.integers(1, 300))))
                for i in range(1, int(rng.integers(0, 4)) + 1)
            ]
            fitting, let_go = made.make_room(new, shorter)
            if rng.random() < 0.2:
                # Death before the word is written: everything else of the commit is there.
                word = made._committed
                made._committed = word.copy()
                made.commit(rng.bytes(50), fitting)
                made = memory.open()
            else:
                sequence, state = sequence + len(new), rng.bytes(int(rng.integers(0, 200)))
                made.commit(state, fitting)
                live |= {batch.sequence: batch for batch in new}
                for batch in let_go:
                    del live[batch.sequence]
                for number in [n for n in live if rng.random() < 0.3]:
                    made.done(number)
                    del live[number]
                if rng.random() < 0.3:
                    made = memory.open()
                else:
                    check(memory.open().load(), state, live)
                    continue
            found = made.load()
            check(found, state, live)


def check(found: Any, state: bytes, live: dict[int, Logged]) -> None:
    if found is None:
        assert not live
        return
    assert found[0] == state
    assert [batch.sequence for batch in found[1]] == list(live)
    for batch in found[1]:
        assert batch in (live[batch.sequence], shorter(live[batch.sequence]))


def test_where_all_do_not_fit_the_oldest_are_made_shorter_before_any_is_let_go():
    made, message = Memory().open(), bytes(checkpoint.LOG_BYTES // 10)
    let_go = [gone for n in range(1, 31) for gone in commit(made, b"", Logged(n, 1, message))]
    assert not let_go
    found = made.load()
    assert found is not None
    lengths = [len(batch.message) for batch in found[1]]
    assert len(lengths) == 30 and lengths == sorted(lengths) and lengths[-1] == len(message)


def test_what_does_not_even_fit_shortened_is_let_go_oldest_first_and_told():
    made = Memory().open()
    many = checkpoint.LOG_BYTES // 20
    let_go = commit(made, b"", *(Logged(n, 1, bytes(10)) for n in range(1, many + 1)))
    found = made.load()
    assert found is not None
    assert [batch.sequence for batch in (*let_go, *found[1])] == list(range(1, many + 1))
    assert 0 < len(let_go) < many


def test_a_log_of_which_little_is_needed_touches_few_pages():
    made, furthest = Memory().open(), 0
    for n in range(1, 3000):
        commit(made, b"", Logged(n, 1, bytes(1000)))
        made.done_to(n - 5)
        furthest = max(furthest, made._end)
    assert furthest < 2 * checkpoint._RENEW_BYTES
