"""Inputs made of others by chance: for the gate, where no coverage guides them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.fuzz.targets.target import SEPARATOR

MAX_BYTES = 256 << 10
_BYTES = (0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x2C, 0x5B, 0x7B)
_TEXTS = (
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"9" * 30,
    b"\\ud800",
    b"\xff\xfe",
    b"../",
    b"\n",
)


def mutated(rng: random.Random, corpus: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One of them with a few changes: bits, edges, cuts, repeats, splices, words of the format."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(9)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice(_BYTES)
        elif kind == 2:
            del data[at : at + rng.choice((1, 2, 8, 1 << 20))]
        elif kind == 3:
            other = rng.choice(corpus)
            data[at:at] = other[rng.randrange(len(other) + 1) :][: rng.randrange(1, 64)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.choice((1, 16, 256))]
        elif kind == 5:
            data[at : at + rng.choice((0, 1, 4))] = rng.choice((*_TEXTS, *words))
        elif kind == 6 and len(data) > 8:
            width = rng.choice((1, 2, 4, 8))
            at = rng.randrange(len(data) - width)
            value = rng.choice((0, 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1, len(data), rng.randrange(256)))
            data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "big")))
        elif kind == 7:
            # A number in a text.
            digits = [i for i in range(len(data)) if 48 <= data[i] <= 57]
            if digits:
                at = rng.choice(digits)
                data[at : at + 1] = rng.choice((b"0", b"-1", b"99999999", b"1.5", b"1e400", b'"a"'))
        elif kind == 8 and SEPARATOR in data:
            parts = bytes(data).split(SEPARATOR)
            rng.shuffle(parts)
            data = bytearray(SEPARATOR.join(parts))
    return bytes(data[:MAX_BYTES])
