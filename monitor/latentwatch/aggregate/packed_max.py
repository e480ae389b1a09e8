"""A value and the position where it stood in one uint64, ordered so that a plain maximum keeps the right one.

The upper half is a float32 mapped to an unsigned integer of the same order, the lower half counts positions
downwards. Hence the larger of two packed words is the larger value and, between equal values, the earlier position;
the maximum is associative, commutative and idempotent, which makes every per-request maximum independent of how
the scheduler cut the steps. 0 stands for "nothing seen": no finite value packs to it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from latentwatch.arrays import F32, I64, U64, Array

NOTHING: Final = np.uint64(0)
_LAST_POSITION: Final = np.uint32(0xFFFF_FFFF)
_SIGN: Final = np.uint32(0x8000_0000)


def pack(value: Array, position: Array) -> U64:
    """Packed words of finite values (rounded to float32) at positions 0..2**32-1; the shapes broadcast."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    ordered = bits ^ ((bits.view(np.int32) >> 31).view(np.uint32) | _SIGN)
    return (ordered.astype(np.uint64) << np.uint64(32)) | (_LAST_POSITION - position.astype(np.uint32))


def values(packed: U64, nothing: float = np.nan) -> F32:
    """The values, with `nothing` where nothing was seen."""
    ordered = (packed >> np.uint64(32)).astype(np.uint32)
    bits = np.where(ordered & _SIGN, ordered ^ _SIGN, ~ordered)
    return np.where(packed != NOTHING, bits.view(np.float32), np.float32(nothing))


def positions(packed: U64) -> I64:
    """The positions, -1 where nothing was seen."""
    return np.where(packed != NOTHING, (_LAST_POSITION - packed.astype(np.uint32)).astype(np.int64), -1)
