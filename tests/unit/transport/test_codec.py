"""What is sent is what is read, to the bit, and everything else is refused with a reason."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.errors import StreamRefused
from latentwatch.step.batch import (
    RequestOpened,
)
from latentwatch.transport import codec
from latentwatch.transport._pb import latentwatch_pb2 as pb
from latentwatch.transport.codec.fields import MAX_COUNT
from latentwatch.transport.hello import Hello
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport

from tests.support.wire import batch, batches, hello, same

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("messages.json").read_text())


def decoded(data: bytes) -> ReceivedBatch:
    request = codec.decode_request(data)
    assert isinstance(request, ReceivedBatch)
    return request


@given(batches(), st.integers(1, MAX_COUNT))
@settings(deadline=None, max_examples=200)
def test_a_batch_is_read_as_it_was_written(value, sequence):
    read = decoded(codec.encode_batch(sequence, value))
    assert read.sequence == sequence
    assert same(read.batch, value)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_an_earlier_version_wrote_is_read_and_written_again_to_the_byte(name):
    """The messages were written before the codec was cut into parts; spools and journals hold such."""
    data = bytes.fromhex(GOLDEN[name])
    match codec.decode_request(data):
        case Hello() as read:
            acked, nano = (7, 8) if name == "hello" else (0, 0)
            assert codec.encode_hello(read, last_acked_sequence=acked, time_unix_nano=nano) == data
        case ReceivedBatch(sequence, read, message):
            assert codec.encode_batch(sequence, read) == message == data
        case ReceivedReport(sequence, read, message):
            assert codec.encode_report(sequence, read) == message == data


def test_a_decoded_column_is_a_view_of_the_message_and_cannot_be_written():
    read = decoded(codec.encode_batch(1, batch(1))).batch
    for column in (read.segments_S, read.fires_N, read.dense_RP, read.norm_RH):
        assert not column.flags.writeable
        assert not column.flags.owndata


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
        (wire(segments=segments(state=0)), "dense has 32 bytes, not those of 0 rows"),
        (wire(segments=segments(count=-8)), "not those of -8 rows"),
        (wire(segments=segments(count=-8), dense=b"", norm=b"", dense_features=0, hook_points=0), "of -8 rows"),
        (wire(segments=segments(count=9)), "9 rows"),
    ],
)
def test_a_batch_that_does_not_add_up_is_refused_with_the_offending_value(data, found):
    with pytest.raises(StreamRefused, match=found) as refused:
        codec.decode_request(data)
    assert refused.value.reason == "malformed_batch"
    assert refused.value.instead


# Whatever a state adds up or holds as a whole number; a step's number is in none, and a column of counts is checked as
# one.
COUNTED = [("batch", "sequence"), ("report", "sequence"), ("report", "shed_requests"), ("report", "shed_crossings")]
COUNTED += [("batch.counters", name.name) for name in pb.EngineCounters.DESCRIPTOR.fields]
COUNTED += [("report.replicas.0.counters", name.name) for name in pb.EngineCounters.DESCRIPTOR.fields]
COUNTED += [("report.replicas.0", "open_requests"), ("report.requests.0", "number")]


@pytest.mark.parametrize(("path", "name"), [*COUNTED, ("report.engines.0", "requests")])
def test_a_number_that_no_sum_could_hold_is_refused(path, name):
    kind, *inner = path.split(".")
    for value, refused in ((MAX_COUNT, False), (MAX_COUNT + 1, True), (2**64 - 1, True)):
        request = pb.StreamRequest.FromString(bytes.fromhex(GOLDEN[kind]))
        part = getattr(request, kind)
        for at in inner:
            part = part[int(at)] if at.isdigit() else getattr(part, at)
        if name == "requests":
            part.requests[0] = value
        else:
            setattr(part, name, value)
        if not refused:
            codec.decode_request(request.SerializeToString())
            continue
        with pytest.raises(StreamRefused, match=f"{name} is {value}, more than") as error:
            codec.decode_request(request.SerializeToString())
        assert error.value.reason == "malformed_batch"


@pytest.mark.parametrize("reply", [codec.Ack(2**63), codec.Welcome(2**64 - 1, "c")])
def test_a_reply_that_acknowledges_what_nobody_can_have_sent_is_refused(reply):
    with pytest.raises(StreamRefused, match="it acknowledges") as refused:
        codec.decode_reply(codec.encode_reply(reply))
    assert refused.value.reason == "malformed_reply"


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
        hello(model_match="differs", model_text="the values of x are others"),
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
        {"model_match": "perhaps"},
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
    for reply in (codec.Welcome(7, "c" * 32), codec.Ack(MAX_COUNT)):
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
