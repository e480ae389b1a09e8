"""Hello <-> its message."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Final

from latentwatch.errors import RefusalReason, StreamRefused
from latentwatch.names import ModelMatch
from latentwatch.transport._pb import latentwatch_pb2 as pb
from latentwatch.transport.codec.fields import malformed, no_unknown_fields
from latentwatch.transport.hello import PROTOCOL, Hello

MAX_REPLICA_BYTES: Final = 253
"""A DNS name's length, and so a pod name's; a replica is a label on every series."""
MAX_TEXT_BYTES: Final = 4096
"""Longest free text of a Hello; its longest real one is a refusal's sentence."""

_MATCHES: Final = frozenset({"", *ModelMatch})
_HEX_32 = re.compile(r"[0-9a-f]{32}")
_HEX_64 = re.compile(r"[0-9a-f]{64}")
_SLUG = re.compile(r"[a-z][a-z0-9_]{0,63}")


def hello_message(hello: Hello) -> pb.Hello:
    message = pb.Hello(protocol=PROTOCOL)
    for field in fields(Hello):
        setattr(message, field.name, getattr(hello, field.name))
    return message


def read_hello(message: pb.Hello) -> Hello:
    if message.protocol != PROTOCOL:
        raise StreamRefused(
            f"stream of replica {message.replica[:MAX_REPLICA_BYTES]!r}",
            found=f"it speaks protocol {message.protocol}, this collector speaks {PROTOCOL}",
            instead="Run the same latentwatch version in the engine and in the collector.",
            reason=RefusalReason.PROTOCOL_VERSION,
        )
    no_unknown_fields("hello", message, reason=RefusalReason.MALFORMED_HELLO)
    hello = Hello(**{field.name: getattr(message, field.name) for field in fields(Hello)})
    check_hello(hello)
    return hello


def check_hello(hello: Hello) -> None:
    for name in (field.name for field in fields(Hello) if field.name not in ("armed", "forwards")):
        limit = MAX_REPLICA_BYTES if name == "replica" else MAX_TEXT_BYTES
        length = len(getattr(hello, name).encode(errors="replace"))
        if length > limit:
            raise malformed(
                "hello", f"{name} has {length} bytes, more than {limit}", reason=RefusalReason.MALFORMED_HELLO
            )
    for name, good in (
        ("replica", bool(hello.replica)),
        ("boot_id", bool(_HEX_32.fullmatch(hello.boot_id))),
        ("watchlist_sha256", bool(_HEX_64.fullmatch(hello.watchlist_sha256)) or not hello.armed),
        ("model_match", hello.model_match in _MATCHES),
        ("not_armed_reason", bool(_SLUG.fullmatch(hello.not_armed_reason)) != hello.armed),
    ):
        if not good:
            found = f"{name} is {getattr(hello, name)[:80]!r}, and armed is {hello.armed}"
            raise malformed("hello", found, reason=RefusalReason.MALFORMED_HELLO)
