"""The committed protobuf code says what the .proto says, and nobody edited it by hand."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from latentwatch import facts
from latentwatch.step import batch
from latentwatch.transport import _pb, hello, report
from latentwatch.transport._pb import latentwatch_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto" / "latentwatch" / "v1" / "stream.proto"
SCALARS = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}
WORDS = {"crossings": "exceedances", "shed_crossings": "shed_exceedances"}
"""An older word that stays on the wire, and ours."""
FACTS = {"info": facts.RequestInfo, "progress": facts.RequestProgress}
"""Facts that a value holds whole, and whose fields the message has among its own."""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_text().encode()).hexdigest()


def test_the_committed_code_was_made_from_this_proto():
    """Red: run proto/generate.py (its first lines say how) and commit what it writes."""
    assert sha256(PROTO) == _pb.PROTO_SHA256


@pytest.mark.parametrize("name", sorted(_pb.FILES_SHA256))
def test_the_committed_code_is_as_the_generator_left_it(name):
    assert sha256(Path(_pb.__file__).with_name(name)) == _pb.FILES_SHA256[name]


def test_every_field_of_the_proto_has_its_number_and_type_in_the_code():
    """Read without protoc, so that a hash recorded by hand would not hide a difference."""
    declared = {}
    message = ""
    for line in PROTO.read_text().splitlines():
        code = line.partition("//")[0]
        if opening := re.match(r"message (\w+) {", code):
            message = opening[1]
        elif field := re.match(r"\s+(repeated |optional )?(\w+) (\w+) = (\d+);", code):
            declared[message, field[3]] = (field[1] == "repeated ", field[2], int(field[4]))
    described: dict[tuple[str, str], tuple[bool, str, int]] = {}
    for name, kind in pb.DESCRIPTOR.message_types_by_name.items():
        assert isinstance(kind, Descriptor)
        for field in kind.fields:
            spelled = field.message_type.name if field.message_type else SCALARS[field.type]
            described[name, field.name] = (field.is_repeated, spelled, field.number)
    assert described == declared


@pytest.mark.parametrize(
    ("message", "values", "only_on_the_wire"),
    [
        (pb.EngineCounters, batch.EngineCounters, set()),
        (pb.RequestOpened, batch.RequestOpened, set()),
        (pb.RequestClosed, batch.RequestClosed, set()),
        (pb.Hello, hello.Hello, {"protocol", "last_acked_sequence", "time_unix_nano"}),
        (pb.ReplicaState, report.ReplicaState, set()),
        (pb.EngineDelta, report.EngineDelta, set()),
        (pb.RequestRow, report.RequestRow, set()),
        (pb.Report, report.Report, {"sequence"}),
    ],
)
def test_a_message_has_the_fields_of_the_value_it_carries(message, values, only_on_the_wire):
    """codec copies these by name: a field on one side only would be lost or refused in every batch."""
    wire = {WORDS.get(field.name, field.name) for field in message.DESCRIPTOR.fields}
    inside = {field.name for field in fields(values)}
    for name in inside & FACTS.keys():
        inside |= {field.name for field in fields(FACTS[name])} - {name}
    assert wire - only_on_the_wire == inside - FACTS.keys()


def test_generating_again_changes_nothing():
    subprocess.run([sys.executable, ROOT / "proto" / "generate.py", "--check"], check=True)
