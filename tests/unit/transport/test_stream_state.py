"""What a stream may say next, and what it is owed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentwatch.errors import StreamRefused
from latentwatch.transport import codec
from latentwatch.transport.report import Report
from latentwatch.transport.stream_state import IDLE_SECONDS, StreamState, first_message

from tests.support.wire import batch, hello

BATCH = codec.encode_batch(6, batch(6))
REPORT = codec.encode_report(6, Report(0))
HELLO = codec.encode_hello(hello(), last_acked_sequence=0, time_unix_nano=0)


def state(**changes) -> StreamState:
    return StreamState(hello(**changes), 5, 100.0)


def test_each_kind_of_stream_sends_what_its_hello_announced():
    assert state().read(BATCH).sequence == 6
    assert state(forwards=True).read(REPORT).sequence == 6


@pytest.mark.parametrize(
    ("made", "data", "reason"),
    [
        (state(), HELLO, "hello_repeated"),
        (state(), REPORT, "malformed_batch"),
        (state(forwards=True), BATCH, "malformed_batch"),
        (state(), b"\xff", "malformed_batch"),
        (state(), bytes(codec.MAX_MESSAGE_BYTES + 1), "message_too_large"),
        (state(), codec.encode_batch(5, batch(5)), "replayed"),
    ],
)
def test_what_must_not_come_is_refused_and_changes_nothing(made, data, reason):
    with pytest.raises(StreamRefused) as refused:
        made.read(data)
    assert refused.value.reason == reason and refused.value.instead
    assert (made.stored, made.acknowledge()) == (5, None)


@given(st.lists(st.booleans(), max_size=30))
def test_an_ack_names_what_is_in_the_state_and_comes_once_for_it(moves):
    """True: the next batch comes into the state; False: an ack is written."""
    made, number, acked = state(), 5, 5
    for arrives in moves:
        if arrives:
            number += 1
            made.store(number)
            assert made.unacked == number - acked
        else:
            assert made.acknowledge() == (number if number > acked else None)
            acked = number


def test_patience_is_measured_from_the_last_whole_message():
    made = state()
    assert made.patience_seconds(100.0) == IDLE_SECONDS
    made.heard(130.0)
    assert made.patience_seconds(130.0 + IDLE_SECONDS) == 0.0


def test_a_stream_begins_with_a_hello():
    assert first_message(HELLO) == hello()
    with pytest.raises(StreamRefused, match="batch 6") as refused:
        first_message(BATCH)
    assert refused.value.reason == "hello_missing"
