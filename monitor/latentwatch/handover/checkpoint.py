"""What an exporter leaves to the next one, whenever it dies: its state, and the batches that nobody else has yet.

It lies in the engine's shared memory, so that the death of the exporter's process costs none of it. A commit writes the
new state beside the old one and the new batches behind those that are there, then stores one word that says where both
are: whoever reads it finds all of one commit and nothing of the next.

Layout: two areas for the state, of which one is current, then two halves for the batches, of which one is current. What
begins anew does so in the other one. Batches that are durable elsewhere are marked in place.

One process uses it at a time. Pages that nothing was ever written to cost no memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from latentwatch.arrays import Array

LOG_BYTES: Final = 8 << 20
"""Of batches: seconds of scores, minutes of books, while no collector acknowledges and no spool takes them."""
_STATE_BYTES: Final = 1 << 16
_REQUEST_BYTES: Final = 4096
_MAX_STATE_BYTES: Final = 8 << 20
_RENEW_BYTES: Final = 1 << 18
"""A log is begun anew above this where little of it is still needed, so that few of its pages are ever touched."""
_STATE: Final = struct.Struct("<QQQ")  # bytes of the state, which half, where its batches end
_ENTRY: Final = struct.Struct("<QQII")  # done, sequence, tokens, bytes


class Logged(NamedTuple):
    """One batch."""

    sequence: int
    tokens: int
    message: bytes


class _Place(NamedTuple):
    at: int
    size: int


def checkpoint_bytes(max_requests: int) -> int:
    """What a checkpoint takes, by how many requests the engine runs at once; whole pages."""
    return 2 * (_state_bytes(max_requests) + LOG_BYTES)


def _state_bytes(max_requests: int) -> int:
    return min(_MAX_STATE_BYTES, _STATE_BYTES + max_requests * _REQUEST_BYTES)


class Checkpoint:
    """See above. `load` once, then `commit` after each step."""

    def __init__(self, memory: memoryview, committed: Array, numbered: Array) -> None:
        """
        Args:   memory: of checkpoint_bytes(), zeros at first.   committed: uint64 [1], commits so far.
                numbered: uint64 [1], the highest number of a batch that was to be committed; whatever becomes of the
                rest, no exporter may give it again.
        """
        self._committed = committed
        self._numbered = numbered
        area = len(memory) // 2 - LOG_BYTES
        self.max_state_bytes = area - _STATE.size
        self._areas = (memory[:area], memory[area : 2 * area])
        self._halves = (memory[2 * area : 2 * area + LOG_BYTES], memory[2 * area + LOG_BYTES :])
        self._half = self._end = 0
        self._live: dict[int, _Place] = {}
        self._live_bytes = 0

    def load(self) -> tuple[bytes, list[Logged]] | None:
        """The last state that was committed and the batches that are not done, oldest first; None before the first."""
        commits = int(self._committed[0])
        if not commits:
            return None
        area = self._areas[commits % 2]
        size, half, end = _STATE.unpack_from(area)
        if size > self.max_state_bytes or half > 1 or end > LOG_BYTES:
            raise ValueError(f"a state of {size} bytes with {end} of batches in half {half}")
        self._half, self._end = half, end
        at, found = 0, []
        while at < self._end:
            done, sequence, _, nbytes = _ENTRY.unpack_from(self._halves[self._half], at)
            if not done:
                found.append(self._entry(at))
                self._note(sequence, at, nbytes)
            at += _ENTRY.size + nbytes
        return bytes(area[_STATE.size : _STATE.size + size]), found

    def restart(self) -> None:
        """Forget what `load` found, or could not read: the next commit says all there is."""
        self._half, self._end, self._live, self._live_bytes = 0, 0, {}, 0

    @property
    def numbered(self) -> int:
        """The highest number that a batch has had."""
        return int(self._numbered[0])

    def make_room(
        self, new: Sequence[Logged], shorter: Callable[[Logged], Logged]
    ) -> tuple[list[Logged], list[Logged]]:
        """Room for new batches. `commit` must follow, with the first list, before anything else is asked for.

        Where all do not fit, the oldest are made `shorter`; where that is not enough, the oldest are let go.

        Returns (the new batches, some of them shorter; those that were let go, new or not).
        """
        nbytes = sum(_ENTRY.size + len(batch.message) for batch in new)
        wasted = self._end > _RENEW_BYTES and self._live_bytes + nbytes < self._end // 4
        if self._end + nbytes <= LOG_BYTES and not wasted:
            return list(new), []
        old = [self._entry(place.at) for place in self._live.values()]
        fitting, let_go = _fitting([*old, *new], LOG_BYTES // 2, shorter)
        # Into the other half: until the next commit this one is what the next exporter would read.
        self._half, self._end, self._live, self._live_bytes = 1 - self._half, 0, {}, 0
        numbers = {batch.sequence for batch in new}
        for batch in fitting:
            if batch.sequence not in numbers:
                self._append(batch)
        return [batch for batch in fitting if batch.sequence in numbers], let_go

    def commit(self, state: bytes, new: Sequence[Logged] = (), *, numbered: int = 0) -> None:
        """Note a state of at most `max_state_bytes`, and the batches that belong to it, together or not at all.

        Args: numbered: the highest number that a batch was given; noted in any case.
        """
        for batch in new:
            self._append(batch)
        self._numbered[0] = max(self.numbered, numbered)
        commits = int(self._committed[0]) + 1
        area = self._areas[commits % 2]
        area[_STATE.size : _STATE.size + len(state)] = state
        _STATE.pack_into(area, 0, len(state), self._half, self._end)
        self._committed[0] = commits

    def done(self, sequence: int) -> None:
        """This batch is durable elsewhere, or counted: the next exporter need not send it."""
        place = self._live.pop(sequence, None)
        if place is not None:
            struct.pack_into("<Q", self._halves[self._half], place.at, 1)
            self._live_bytes -= place.size

    def done_to(self, sequence: int) -> None:
        """The same of all up to and including this number."""
        while self._live and (first := next(iter(self._live))) <= sequence:
            self.done(first)

    def _append(self, batch: Logged) -> None:
        half, at = self._halves[self._half], self._end
        _ENTRY.pack_into(half, at, 0, batch.sequence, batch.tokens, len(batch.message))
        half[at + _ENTRY.size : at + _ENTRY.size + len(batch.message)] = batch.message
        self._note(batch.sequence, at, len(batch.message))
        self._end = at + _ENTRY.size + len(batch.message)

    def _note(self, sequence: int, at: int, nbytes: int) -> None:
        self._live[sequence] = _Place(at, _ENTRY.size + nbytes)
        self._live_bytes += _ENTRY.size + nbytes

    def _entry(self, at: int) -> Logged:
        half = self._halves[self._half]
        _, sequence, tokens, nbytes = _ENTRY.unpack_from(half, at)
        return Logged(sequence, tokens, bytes(half[at + _ENTRY.size : at + _ENTRY.size + nbytes]))


def _fitting(
    batches: list[Logged], room: int, shorter: Callable[[Logged], Logged]
) -> tuple[list[Logged], list[Logged]]:
    """(batches that take no more than `room`, those of the oldest that had to be let go)."""
    size = sum(_ENTRY.size + len(batch.message) for batch in batches)
    for i, batch in enumerate(batches):
        if size <= room:
            break
        batches[i] = shorter(batch)
        size += len(batches[i].message) - len(batch.message)
    first = 0
    while size > room:
        size -= _ENTRY.size + len(batches[first].message)
        first += 1
    return batches[first:], batches[:first]
