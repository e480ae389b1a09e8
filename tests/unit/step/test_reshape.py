"""Batches that are cut, joined or shed say the same of every token."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.step.batch import RequestOpened, StepBatch, owns_rows, tokens_by_state
from latentwatch.step.reshape import column_bytes, event_bytes, pieces, runs
from latentwatch.transport import codec

from tests.support.wire import batch, batches, tokens


@given(batches(), st.integers(600, 4000))
@settings(deadline=None, max_examples=200)
def test_the_pieces_of_a_batch_say_what_the_batch_says(value, max_bytes):
    cut = pieces(value, lambda piece: column_bytes(piece) + event_bytes(piece) <= max_bytes - 512)

    assert sum((tokens(piece) for piece in cut), 0) == tokens(value)
    whole, parts = tokens_by_state(value.segments_S), [tokens_by_state(piece.segments_S) for piece in cut]
    assert {key: sum(part.get(key, 0) for part in parts) for key in whole} == dict(whole)
    assert np.concatenate([piece.dense_RP for piece in cut]).tobytes() == value.dense_RP.tobytes()
    assert np.concatenate([piece.norm_RH for piece in cut]).tobytes() == value.norm_RH.tobytes()
    row, fires, places = 0, [], []
    for piece in cut:
        moved = piece.fires_N.copy()
        moved["row"] += row
        fires.append(moved)
        places += places_of(piece)
        row += piece.rows
        codec.decode_request(codec.encode_batch(1, piece))
    assert np.concatenate(fires).tobytes() == value.fires_N.tobytes()
    assert places == places_of(value)
    assert sum((piece.opened for piece in cut), ()) == value.opened
    assert sum((piece.closed for piece in cut), ()) == value.closed


def places_of(value: StepBatch) -> list[tuple[int, int]]:
    """(request, position) of every row."""
    return [
        (int(segment["handle"]), int(segment["start"]) + i)
        for segment in value.segments_S[owns_rows(value.segments_S)]
        for i in range(segment["count"])
    ]


def test_a_step_beyond_the_message_limit_is_cut_into_messages_within_it():
    big = batch(3, rows=100_000, fires=300_000, probes=8, hooks=2)
    cut = pieces(big, codec.fits_a_message)
    sizes = [len(codec.encode_batch(1, piece)) for piece in cut]
    assert len(cut) > 1
    assert max(sizes) <= codec.MAX_MESSAGE_BYTES
    assert min(sizes) > codec.MAX_MESSAGE_BYTES // 8
    assert cut[0].opened == big.opened
    assert cut[-1].closed == big.closed


def test_many_long_request_ids_are_cut_as_well():
    """A client chooses the ids; it must not be able to make a step that no message holds."""
    ids = [RequestOpened(i, "x" * 60_000, 1) for i in range(300)]
    cut = pieces(replace(batch(1), opened=tuple(ids)), codec.fits_a_message)
    assert all(len(codec.encode_batch(1, piece)) <= codec.MAX_MESSAGE_BYTES for piece in cut)
    assert [opened.handle for piece in cut for opened in piece.opened] == list(range(300))


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 4, st.integers(1, 3)), max_size=12))
def test_runs_are_maximal_and_cover_the_same_tokens(spans):
    """Each span goes on where the one before it ended, or jumps by one."""
    handle, state, reason, jump, count = np.array(spans, np.int64).reshape(-1, 5).T
    start = np.cumsum(count) - count + np.cumsum(jump == 2)
    made = runs(handle, start, count, state, reason, np.ones_like(handle))
    assert tokens_of(*(made[name] for name in ("handle", "start", "count", "state", "reason"))) == tokens_of(
        handle, start, count, state, reason
    )
    for one, other in pairwise(made):
        goes_on = one["start"] + one["count"] == other["start"]
        assert not goes_on or any(one[name] != other[name] for name in ("handle", "state", "reason"))


def tokens_of(handle, start, count, state, reason) -> list[tuple[int, ...]]:
    rows = zip(handle.tolist(), start.tolist(), count.tolist(), state.tolist(), reason.tolist(), strict=True)
    return [(h, s + i, t, r) for h, s, c, t, r in rows for i in range(c)]
