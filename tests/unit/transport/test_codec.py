"""What is sent is what is read, to the bit, and everything else is refused with a reason."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.errors import StreamRefused
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.step.batch import (
    FIRE_DTYPE,
    SEGMENT_DTYPE,
    EngineCounters,
    RequestClosed,
    RequestOpened,
    StepBatch,
    owns_rows,
    tokens_by_state,
)
from latentwatch.transport import codec
from latentwatch.transport._pb import latentwatch_pb2 as pb
from latentwatch.transport.sink import ReceivedBatch

from tests.support.wire import batch, hello, same, tokens

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def batches(draw):
    segments = draw(
        st.lists(
            st.tuples(
                I64,
                st.integers(0, 2**31 - 100),
                st.integers(1, 9),
                st.sampled_from(TokenState),
                st.sampled_from(Reason),
                st.sampled_from(Phase),
            ),
            max_size=6,
        )
    )
    segments_S = np.array(segments, SEGMENT_DTYPE)
    rows = int(segments_S["count"][owns_rows(segments_S)].sum())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    fires_N = np.frombuffer(rng.bytes(10 * draw(st.integers(0, 12)) if rows else 0), FIRE_DTYPE).copy()
    fires_N["row"] = np.sort(fires_N["row"] % max(rows, 1))
    probes, hooks = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    return StepBatch(
        step=draw(U64),
        time_unix_nano=draw(I64),
        segments_S=segments_S,
        fires_N=fires_N,
        # Any bit pattern, NaN and infinities too: what a value may be is for step.validate to say.
        dense_RP=np.frombuffer(rng.bytes(2 * rows * probes), "<f2").reshape(rows, probes),
        norm_RH=np.frombuffer(rng.bytes(4 * rows * hooks), "<f4").reshape(rows, hooks),
        opened=tuple(draw(st.lists(st.builds(RequestOpened, I64, TEXT, U32, TEXT, TEXT), max_size=3))),
        closed=tuple(
            draw(st.lists(st.builds(RequestClosed, I64, TEXT, U32, U32, U32, st.sampled_from(Outcome)), max_size=3))
        ),
        counters=draw(st.builds(EngineCounters, *[U64] * len(pb.EngineCounters.DESCRIPTOR.fields))),
    )


def decoded(data: bytes) -> ReceivedBatch:
    request = codec.decode_request(data)
    assert isinstance(request, ReceivedBatch)
    return request


@given(batches(), st.integers(1, 2**64 - 1))
@settings(deadline=None, max_examples=200)
def test_a_batch_is_read_as_it_was_written(value, sequence):
    read = decoded(codec.encode_batch(sequence, value))
    assert read.sequence == sequence
    assert same(read.batch, value)


def test_a_decoded_column_is_a_view_of_the_message_and_cannot_be_written():
    read = decoded(codec.encode_batch(1, batch(1))).batch
    for column in (read.segments_S, read.fires_N, read.dense_RP, read.norm_RH):
        assert not column.flags.writeable
        assert not column.flags.owndata


@given(batches(), st.integers(600, 4000))
@settings(deadline=None, max_examples=200)
def test_the_pieces_of_a_batch_say_what_the_batch_says(value, max_bytes):
    cut = codec.pieces(value, max_bytes=max_bytes)

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
        decoded(codec.encode_batch(1, piece))
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
    cut = codec.pieces(big)
    sizes = [len(codec.encode_batch(1, piece)) for piece in cut]
    assert len(cut) > 1
    assert max(sizes) <= codec.MAX_MESSAGE_BYTES
    assert min(sizes) > codec.MAX_MESSAGE_BYTES // 8
    assert cut[0].opened == big.opened
    assert cut[-1].closed == big.closed


def test_many_long_request_ids_are_cut_as_well():
    """A client chooses the ids; it must not be able to make a step that no message holds."""
    ids = [RequestOpened(i, "x" * 60_000, 1) for i in range(300)]
    cut = codec.pieces(replace(batch(1), opened=tuple(ids)))
    assert all(len(codec.encode_batch(1, piece)) <= codec.MAX_MESSAGE_BYTES for piece in cut)
    assert [opened.handle for piece in cut for opened in piece.opened] == list(range(300))


def wire(**changes) -> bytes:
    """An encoded batch with some fields of the message replaced."""
    request = pb.StreamRequest.FromString(codec.encode_batch(1, batch(1)))
    for name, value in changes.items():
        setattr(request.batch, name, value)
    return request.SerializeToString()


def segments(**changes) -> bytes:
    column = batch(1).segments_S.copy()
    for name, value in changes.items():
        column[name][1] = value
    return column.tobytes()


def far_fire() -> bytes:
    column = batch(1).fires_N.copy()
    column["row"][-1] = 8
    return column.tobytes()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "neither a hello, a batch nor a report"),
        (b"\xff" * 40, "do not parse"),
        (wire(sequence=0), "sequences count from 1"),
        (wire(segments=segments()[:-1]), "segments has 37 bytes, no multiple of a record's 19"),
        (wire(fires=b"12345678901"), "fires has 11 bytes"),
        (wire(dense=b"\0" * 30), "dense has 30 bytes, not those of 8 rows and 2 columns"),
        (wire(dense_features=3), "8 rows and 3 columns"),
        (wire(dense_features=2**32 - 1), "more than 65536"),
        (wire(norm=b""), "norm has 0 bytes"),
        (wire(hook_points=0), "8 rows and 0 columns"),
        (wire(segments=segments(state=0)), "segment state 0"),
        (wire(segments=segments(state=250)), "segment state 250"),
        (wire(segments=segments(reason=99)), "segment reason 99"),
        (wire(segments=segments(phase=3)), "segment phase 3"),
        (wire(segments=segments(count=0)), "no positions of a request"),
        (wire(segments=segments(count=-8)), "no positions of a request"),
        (wire(segments=segments(start=-1)), "no positions of a request"),
        (wire(segments=segments(start=2**31 - 1)), "no positions of a request"),
        (wire(segments=segments(count=9)), "9 rows"),
        (wire(fires=far_fire()), "an activation names row 8 of 8"),
    ],
)
def test_a_batch_that_does_not_add_up_is_refused_with_the_offending_value(data, found):
    with pytest.raises(StreamRefused, match=found) as refused:
        codec.decode_request(data)
    assert refused.value.reason == "malformed_batch"
    assert refused.value.instead


def test_an_unknown_outcome_is_refused():
    request = pb.StreamRequest.FromString(wire())
    request.batch.closed[0].outcome = 77
    with pytest.raises(StreamRefused, match="outcome 77"):
        codec.decode_request(request.SerializeToString())


def test_a_column_of_a_newer_version_is_refused_and_not_overlooked():
    """Field 99 of the batch, here a new kind of score, would otherwise vanish as if nothing had fired."""
    inner = pb.StreamRequest.FromString(wire()).batch.SerializeToString() + b"\x9a\x06\x03abc"
    data = b"\x12" + varint(len(inner)) + inner
    with pytest.raises(StreamRefused, match="StepBatch has field 99"):
        codec.decode_request(data)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize("name", ["segments_S", "fires_N", "dense_RP", "norm_RH"])
def test_a_column_of_another_dtype_is_not_sent(name):
    value = replace(batch(1), **{name: getattr(batch(1), name).view(np.uint8)})
    with pytest.raises((StreamRefused, IndexError)):
        codec.encode_batch(1, value)


@pytest.mark.parametrize("changes", [{"step": -1}, {"step": 2**64}, {"opened": (RequestOpened(1, "\ud800", 1),)}])
def test_a_value_that_does_not_fit_its_field_is_not_sent(changes):
    with pytest.raises(StreamRefused, match="does not fit") as refused:
        codec.encode_batch(1, replace(batch(1), **changes))
    assert refused.value.reason == "malformed_batch"


def test_a_hello_is_read_as_it_was_written():
    for value in (
        hello(),
        hello(armed=False, watchlist_sha256="", not_armed_reason="watchlist_width", not_armed_text="what: found."),
    ):
        assert codec.decode_request(codec.encode_hello(value, last_acked_sequence=7, time_unix_nano=8)) == value


@pytest.mark.parametrize(
    "changes",
    [
        {"replica": ""},
        {"replica": "r" * 254},
        {"boot_id": "0" * 31},
        {"boot_id": "G" * 32},
        {"watchlist_sha256": "a" * 63},
        {"armed": False},
        {"not_armed_reason": "watchlist_width"},
        {"armed": False, "not_armed_reason": "No Slug"},
        {"model_name": "m" * 5000},
    ],
)
def test_a_hello_that_no_collector_accepts_is_refused_on_both_sides(changes):
    value = hello(**changes)
    with pytest.raises(StreamRefused) as refused:
        codec.encode_hello(value, last_acked_sequence=0, time_unix_nano=0)
    assert refused.value.reason == "malformed_hello"
    message = pb.Hello(protocol=1)
    for name, field in vars(value).items():
        setattr(message, name, field)
    with pytest.raises(StreamRefused) as refused:
        codec.decode_request(pb.StreamRequest(hello=message).SerializeToString())
    assert refused.value.reason == "malformed_hello"


def test_another_protocol_is_refused_by_its_number():
    request = pb.StreamRequest.FromString(codec.encode_hello(hello(), last_acked_sequence=0, time_unix_nano=0))
    request.hello.protocol = 2
    with pytest.raises(StreamRefused, match="protocol 2, this collector speaks 1") as refused:
        codec.decode_request(request.SerializeToString())
    assert refused.value.reason == "protocol_version"


def test_replies_are_read_as_they_were_written():
    for reply in (codec.Welcome(7, "c" * 32), codec.Ack(2**64 - 1)):
        assert codec.decode_reply(codec.encode_reply(reply)) == reply
    told = StreamRefused("what", found="found", instead="instead", reason="watchlist_mismatch")
    read = codec.decode_reply(codec.encode_reply(told))
    assert isinstance(read, StreamRefused)
    assert vars(read) == vars(told)


@pytest.mark.parametrize("data", [b"", b"\xff\xff", b"\x0a\x05x"])
def test_a_reply_that_is_none_is_refused(data):
    with pytest.raises(StreamRefused) as refused:
        codec.decode_reply(data)
    assert refused.value.reason == "malformed_reply"


@pytest.mark.parametrize("seed", range(6))
def test_mutated_bytes_are_refused_or_read_as_something_that_is_written_the_same(seed):
    """Never another exception: one such would end in the collector as a bug instead of a refusal."""
    rng = random.Random(seed)
    originals = [codec.encode_batch(1 + i, batch(i, rows=i % 4, fires=i % 3)) for i in range(8)]
    originals.append(codec.encode_hello(hello(), last_acked_sequence=0, time_unix_nano=0))
    outcomes = {"refused": 0, "read": 0}
    for _ in range(1500):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            match rng.randrange(5):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.choice((0, 1, 127, 128, 255))
                case 2:
                    del data[at : at + rng.randint(1, 20)]
                case 3:
                    data[at:at] = rng.randbytes(rng.randint(1, 20))
                case 4:
                    data += rng.choice(originals)[: rng.randint(0, 60)]
            data = data or bytearray(b"\0")
        try:
            read = codec.decode_request(bytes(data))
        except StreamRefused as refused:
            assert refused.reason in {"malformed_batch", "malformed_hello", "protocol_version"}
            assert len(str(refused)) < 1000
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        if isinstance(read, ReceivedBatch):
            again = decoded(codec.encode_batch(read.sequence, read.batch))
            assert again.sequence == read.sequence
            assert same(again.batch, read.batch)
    assert min(outcomes.values()) > 50, outcomes
