"""What fuzzing found, each as a test of its own: an error that had no name of ours."""

from __future__ import annotations

import contextlib
import io
import sqlite3
import struct
import zipfile
import zlib

import numpy as np
import pytest
from latentwatch import storage
from latentwatch.collector.durability import checkpoint
from latentwatch.errors import ConfigRefused, Refusal, StateRefused, StreamRefused
from latentwatch.evidence import segment
from latentwatch.evidence.archive import Archive, Wanted
from latentwatch.evidence.records import FIRE_RECORD
from latentwatch.handover.events import decode_events
from latentwatch.transport import codec, recording
from latentwatch.transport.address import Address
from latentwatch.transport.recording import RecordingSink

from tests.support.evidence import one_request, store
from tests.support.wire import batch, hello

NOW = 1_763_800_000.0


@pytest.mark.parametrize(
    "text", ["unix:///run/\udcff.sock", "\udc80host:1", "unix:///run/a\n.sock", "unix:///a\x1b.sock"]
)
def test_an_address_that_no_text_can_hold_is_refused(text):
    """Bytes of an environment variable that are no UTF-8: the engine's exporter ended with a UnicodeEncodeError."""
    with pytest.raises(ConfigRefused) as refused:
        Address.parse(text)
    assert refused.value.reason == "target_invalid"
    assert str(refused.value).encode()


@pytest.mark.parametrize("text", ["/run/\udcff", "a\nb", "\x1b[2Jclear", "\u202egnp", "é☃ 'b'"])
def test_a_refusal_is_one_line_that_anything_can_hold_and_shows_what_was_given(text):
    """A path of bytes that are no UTF-8, in a refusal: neither a log nor a message could hold it."""
    refusal = ConfigRefused(text, found=text, instead=text, reason="config_value")
    said = str(refusal)
    assert said.isprintable() and said.encode()
    assert (refusal.what, refusal.found, refusal.instead) == (said.split(": ")[0],) * 3
    again = ConfigRefused(refusal.what, found=refusal.found, instead=refusal.instead, reason="config_value")
    assert vars(again) == vars(refusal)
    if text.isprintable():
        assert refusal.found == text
    sent = StreamRefused(text, found=text, instead=text, reason="malformed_batch")
    assert codec.decode_reply(codec.encode_reply(sent)).found == refusal.found


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1.0, 1e300])
def test_a_recording_whose_times_are_none_is_refused(tmp_path, seconds):
    path = tmp_path / "r.recording"
    sink = RecordingSink(path)
    sink.hello(hello(), NOW)
    sink.observe(hello(), codec.decode_request(codec.encode_batch(1, batch(1))), NOW)
    sink.close()
    data = path.read_bytes()
    # Times stand outside the checksum.
    path.write_bytes(data.replace(struct.pack("<d", NOW), struct.pack("<d", seconds)))
    with pytest.raises(StreamRefused) as refused:
        list(recording.read(path))
    assert refused.value.reason == "recording" and "no time" in str(refused.value)


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("request", "request_id = x'ff'"),
        ("request", "outcome = 99"),
        ("request", "features = x'00'"),
        ("request", "scored = 'many'"),
        ("exceedance", "feature = feature + 1000"),
        ("exceedance", "phase = 9"),
        ("activations", "fires = x'789c'"),
        ("activations", "rows = zeroblob(20)"),
    ],
)
def test_a_row_of_evidence_that_no_collector_wrote_is_named(tmp_path, table, change):
    with store(tmp_path) as written:
        written.write(one_request(1, activations=5, exceedances=2), NOW)
    (path,) = (
        path for path in tmp_path.iterdir() if path.suffix not in (".db", "-wal", "-shm") and "20" in path.name[:2]
    )
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '')")
        connection.execute("PRAGMA writable_schema = RESET")
        connection.execute(f"UPDATE {table} SET {change}")
    with contextlib.closing(Archive(tmp_path)) as archive:
        # Each answers with what is whole; the file is named as damaged by whichever comes to the row first.
        assert len(list(archive.requests())) <= 1
        assert len(archive.exceedances(Wanted(), 10)) <= 2
        assert len(list(archive.ended("toy"))) <= 1
        assert archive.damaged.names == (path.name,)


def test_records_that_say_to_be_many_take_no_memory_for_it():
    for count in (b"1000000000000", b"-1", b"x", b""):
        with pytest.raises(ValueError, match=r"records|invalid literal"):
            segment.unpack(zlib.compress(count + b"\n" + b"x" * 8), FIRE_RECORD)
    made = np.zeros(3, FIRE_RECORD)
    assert np.array_equal(segment.unpack(segment.pack(made), FIRE_RECORD), made)


HEADERS = {
    "no literal": b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,\n",
    "a version to come": None,
    "a shape of a terabyte": b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,), }\n",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_checkpoint_whose_arrays_cannot_be_read_is_refused_by_name(tmp_path, kind):
    header = HEADERS[kind]
    member = b"\x93NUMPY\x09\x00" if header is None else b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as made:
        made.writestr("tree.npy", member)
    (tmp_path / "c.npz").write_bytes(content.getvalue())
    with pytest.raises(StateRefused) as refused:
        checkpoint.read(tmp_path / "c.npz", {})
    assert refused.value.reason == "state_damaged"


@pytest.mark.parametrize("compression", [12, 14, 97])
def test_a_checkpoint_that_is_compressed_in_another_way_is_refused_by_name(tmp_path, compression):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as made:
        made.writestr("tree.npy", b"x")
    data = bytearray(content.getvalue())
    for mark, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = data.index(mark) + at
        data[place : place + 2] = struct.pack("<H", compression)
    (tmp_path / "c.npz").write_bytes(data)
    with pytest.raises(StateRefused):
        checkpoint.read(tmp_path / "c.npz", {})


@pytest.mark.parametrize("data", [b'["x"]', b"[]", b"{}", b"1", b'["c"]', b"[[]]", b"\xff", b"[" * 5000, b"null\n"])
def test_events_that_the_engine_does_not_write_are_refused_by_name(data):
    with pytest.raises(Refusal) as refused:
        decode_events(data)
    assert refused.value.reason == "ring_events"


def test_the_storage_that_is_faked_in_targets_is_what_they_fake():
    """`unchecked` replaces these by name."""
    assert callable(storage.Framing._crc) and callable(storage.HashedArtifact._digest)
    assert callable(zipfile.ZipExtFile._update_crc)
