"""A batch as it lies in a spool: what the spool hands to whoever sends it."""

from __future__ import annotations

from typing import NamedTuple


class Spooled(NamedTuple):
    """One batch as it was written."""

    sequence: int
    tokens: int
    message: bytes
    """codec.encode_batch of it."""
