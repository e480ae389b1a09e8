"""Which windows are in a sum: told apart by when they ended and by the requests in them, wherever they were counted.

The key of a window is made of its requests' ids, which are unique to a server's boot: the same window seen by a
collector, by its gateway, in a recording and in its evidence is one. Pure.

Shape legend: W windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

import numpy as np

from latentwatch.arrays import Array

MOST: Final = 43_200
"""Windows that are remembered: 30 days of one minute, after which a baseline is old. 16 bytes each."""


def no_windows() -> Array:
    """int64 [0, 2]: the end in milliseconds since the Unix epoch, and the key."""
    return np.zeros((0, 2), np.int64)


def key_of(request_ids: Iterable[str], key: int = 0) -> int:
    """The key of a window after these requests; in any order. Args: key: the one before."""
    for request_id in request_ids:
        digest = hashlib.blake2b(request_id.encode("utf-8", "replace"), digest_size=8).digest()
        key ^= int.from_bytes(digest, "little") >> 1
    return key


def with_window(windows_W2: Array, end_seconds: float, key: int) -> Array:
    """With one more; 0 is no key, and what has none is not told apart."""
    if not key:
        return windows_W2
    return union(windows_W2, np.array([[int(end_seconds * 1000), key]], np.int64))


def union(one_W2: Array, other_W2: Array) -> Array:
    """Those of both, each once, in order; the latest MOST."""
    joined: Array = np.unique(np.concatenate((one_W2, other_W2)), axis=0)
    return joined[-MOST:]


def common(one_W2: Array, other_W2: Array) -> int:
    """How many are in both."""
    return len(one_W2) + len(other_W2) - len(np.unique(np.concatenate((one_W2, other_W2)), axis=0))


def covers(more_W2: Array, less_W2: Array) -> bool:
    """Whether every window of the second is in the first, as far as both remember."""
    if len(more_W2) >= MOST:
        less_W2 = less_W2[less_W2[:, 0] >= more_W2[0, 0]]
    return common(more_W2, less_W2) == len(less_W2)
