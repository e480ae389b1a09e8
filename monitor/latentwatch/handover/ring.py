"""The shared-memory ring between the engine process (one producer) and its exporter (one consumer).

A ring is an anonymous memory file (memfd) that both processes map: nothing is left behind on any disk, whoever dies.
The producer never waits: where no slot is free the step is dropped and counted. Each side writes only its own cursor,
an aligned 64-bit store, after the slot's content; on x86-64 and on Arm under CPython (whose interpreter loop contains
barriers) the other side sees the content first.

Between header and slots lies the exporter's checkpoint (checkpoint.py): what one that dies leaves to the next.

A slot holds one engine step, at fixed places sized by `Geometry`, so that the producer writes with plain array copies
and allocates nothing. Pages of a slot that no step ever fills are never touched and cost no memory.

Legend: Q requests in the step, T computed rows, N fired activations, P dense features, H hook points.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from latentwatch.arrays import F32, Array
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.handover.checkpoint import Checkpoint, checkpoint_bytes
from latentwatch.handover.memory_file import memory_file
from latentwatch.step.batch import FIRE_DTYPE

MAGIC: Final = 0x4C57_5249_4E47_0002
_PAGE: Final = 4096
HEADER_BYTES: Final = _PAGE
MAX_RING_BYTES: Final = 192 << 20
"""Most of the 256 MiB of host memory that the whole plugin may use. No ring is larger, whatever its geometry."""
MAX_SLOTS: Final = 1024
"""Seconds of decoding: an exporter that the system leaves without a core for a while must not cost a step."""
MIN_SLOTS: Final = 5
"""One waits in the exporter until the next step decides it, two are left for steps without rows."""
MAX_FIRES: Final = 1 << 18
"""Activations a step may hold: 1,024 features at 3 % on 8,192 tokens."""
EVENT_BYTES: Final = 1 << 16
"""Room for the openings and closings of one step, as JSON lines of about 150 bytes; more wait for the next step."""

REQUEST_DTYPE = np.dtype([("slot", "<i4"), ("start", "<i4"), ("count", "<i4")])
"""One request of the step: its place in the exporter's tables, the position of its first row, its rows."""

# Words of the ring's header page (uint64), each cursor on a cache line of its own.
_MAGIC, _SLOTS, _STRIDE, _HEAD, _TAIL, _DROPPED_STEPS, _CLOSED, _RESTARTS, _ATTACHED, _TRYING, _TRIES = (
    0, 1, 2, 8, 16, 24, 26, 27, 32, 33, 34,
)  # fmt: skip
_COMMITTED: Final = 40
"""The checkpoint's word: see checkpoint.py."""
# Words of a slot's header (int64).
_STEP, _TIME, _REQUESTS, _ROWS, _SCORED_ROWS, _FIRES, _SILENT, _EVENTS = range(8)
_SLOT_HEADER_BYTES = 128


@dataclass(frozen=True)
class Geometry:
    """What one slot can hold; fixed when the engine starts."""

    max_requests: int
    max_rows: int
    features: int
    dense: int
    hook_points: int

    @property
    def max_fires(self) -> int:
        """Activations that a slot holds: fewer than a step may have, where the ring would be too large otherwise."""
        most = min(MAX_FIRES, self.max_rows * max(1, self.features - self.dense))
        return max(0, min(most, (self._room // MIN_SLOTS - _PAGE - _slot_bytes(self, 0)) // FIRE_DTYPE.itemsize))

    @property
    def slots(self) -> int:
        """Steps that the ring holds."""
        return min(MAX_SLOTS, self._room // self.slot_bytes)

    @property
    def slot_bytes(self) -> int:
        return _slot_bytes(self, self.max_fires)

    @property
    def checkpoint_bytes(self) -> int:
        """What the exporter's checkpoint takes, between the header and the slots."""
        return checkpoint_bytes(self.max_requests)

    @property
    def ring_bytes(self) -> int:
        """The whole ring."""
        return HEADER_BYTES + self.checkpoint_bytes + self.slots * self.slot_bytes

    def check(self) -> None:
        """Raises ConfigRefused: MIN_SLOTS steps, with room for a row's activations, exceed MAX_RING_BYTES."""
        if self.slots < MIN_SLOTS or self.max_fires < self.features - self.dense:
            raise ConfigRefused(
                "shared-memory ring",
                found=f"{MIN_SLOTS} steps of {self.max_rows} rows with {self.dense} probes and {self.hook_points} hook "
                f"points take more than {MAX_RING_BYTES >> 20} MiB",
                instead="Serve with a smaller --max-num-batched-tokens, or watch fewer probes or hook points.",
                reason=RefusalReason.RING_GEOMETRY,
            )

    @property
    def _room(self) -> int:
        return MAX_RING_BYTES - HEADER_BYTES - self.checkpoint_bytes


class Slot:
    """Array views onto one slot's memory, made once."""

    def __init__(self, memory: memoryview, geometry: Geometry) -> None:
        g, at = geometry, _SLOT_HEADER_BYTES
        self.header = np.frombuffer(memory, np.int64, _SLOT_HEADER_BYTES // 8)

        def take(dtype: npt.DTypeLike, *shape: int) -> Array:
            nonlocal at
            count = int(np.prod(shape))
            view = np.frombuffer(memory, dtype, count, offset=at).reshape(shape)
            at = _aligned(at + view.nbytes)
            return view

        self.requests_Q = take(REQUEST_DTYPE, g.max_requests)
        self.events = take(np.uint8, EVENT_BYTES)
        self.norm_TH = take(np.float32, g.max_rows, g.hook_points)
        self.dense_TP = take(np.float16, g.max_rows, g.dense)
        self.fires_N = take(FIRE_DTYPE, g.max_fires)
        self.bytes = at


@dataclass(frozen=True)
class RawStep:
    """One step as the engine handed it over: views into the ring, valid until the consumer releases the slot."""

    step: int
    time_unix_nano: int
    requests_Q: Array
    rows: int
    scored_rows: int
    """Rows whose activations all fitted; those behind are dropped{triples_full}."""
    silent: bool
    """The score op left no trace in this step."""
    fires_N: Array
    dense_TP: npt.NDArray[np.float16]
    norm_TH: F32
    """Infinite where the residual stream of the row was not finite."""
    events: bytes


class Ring:
    """Both ends. The engine calls reserve() and commit(), the exporter peek() and release()."""

    def __init__(self, fd: int, geometry: Geometry, *, create: bool) -> None:
        """Map the ring behind `fd`. Raises ConfigRefused: what `fd` holds is not a ring of this geometry; or it would
        be larger than MAX_RING_BYTES.
        """
        geometry.check()
        self.fd = fd
        self.geometry = geometry
        slots, stride, size = geometry.slots, geometry.slot_bytes, geometry.ring_bytes
        if create:
            os.ftruncate(fd, size)
        found = os.fstat(fd).st_size
        if found == size:
            self._map = mmap.mmap(fd, size)
            self._header = np.frombuffer(self._map, np.uint64, HEADER_BYTES // 8)
            if create:
                self._header[[_MAGIC, _SLOTS, _STRIDE]] = (MAGIC, slots, stride)
        if found != size or self._header[: _STRIDE + 1].tolist() != [MAGIC, slots, stride]:
            raise ConfigRefused(
                "shared-memory ring",
                found=f"{found} bytes, expected {size} for {geometry}",
                instead="Start engine and exporter from the same latentwatch version.",
                reason=RefusalReason.RING_GEOMETRY,
            )
        memory = memoryview(self._map)
        first = HEADER_BYTES + geometry.checkpoint_bytes
        self.checkpoint = Checkpoint(memory[HEADER_BYTES:first], self._header[_COMMITTED : _COMMITTED + 1])
        """What the exporter notes there; its process uses it, and nobody else."""
        self._slots = [Slot(memory[first + i * stride : first + (i + 1) * stride], geometry) for i in range(slots)]
        self._head = int(self._header[_HEAD])
        self._read = int(self._header[_TAIL])

    @classmethod
    def create(cls, geometry: Geometry) -> Ring:
        """A new ring in anonymous shared memory; a child is given `fd` by name. Raises OSError."""
        return cls(memory_file("latentwatch-ring"), geometry, create=True)

    @property
    def slots(self) -> int:
        return len(self._slots)

    # The engine's end: never waits, never allocates.

    def reserve(self, *, leave_free: int = 0) -> Slot | None:
        """The next free slot to write, or None where the exporter is too far behind.

        Args: leave_free: slots to leave for steps that matter more than this one.
        """
        if self._head - int(self._header[_TAIL]) >= len(self._slots) - leave_free:
            return None
        return self._slots[self._head % len(self._slots)]

    def commit(
        self,
        slot: Slot,
        *,
        step: int,
        time_unix_nano: int,
        requests: int,
        rows: int,
        scored_rows: int,
        fires: int,
        silent: bool,
        events: int,
    ) -> None:
        """Publish the slot that reserve() gave."""
        slot.header[:8] = (step, time_unix_nano, requests, rows, scored_rows, fires, silent, events)
        self._head += 1
        self._header[_HEAD] = self._head

    def count_dropped(self) -> None:
        """Book a step that found no free slot."""
        self._header[_DROPPED_STEPS] += np.uint64(1)

    def count_restart(self) -> None:
        """Book that the exporter had to be started again."""
        self._header[_RESTARTS] += np.uint64(1)

    def close(self) -> None:
        """The engine will write no more; the exporter drains and ends."""
        self._header[_CLOSED] = 1

    # The exporter's end.

    def attach(self, read: int | None = None) -> None:
        """Tell the engine that steps are read from here on.

        Args: read: how many steps were read by the exporters before, where they said so; else those whose slots they
        gave back.
        """
        if read is not None:
            self._read = read
        died_here = int(self._header[_TRYING]) == self._read + 1
        self._header[_TRIES] = self._header[_TRIES] + np.uint64(1) if died_here else 0
        self._header[_TRYING] = 0
        self._header[_ATTACHED] = 1

    @property
    def read(self) -> int:
        """Steps that were released since the ring was made."""
        return self._read

    @property
    def tries(self) -> int:
        """How many exporters in a row died between the peek() at the oldest unread step and its release()."""
        return int(self._header[_TRIES])

    def peek(self) -> RawStep | None:
        """The oldest unread step, or None. Its arrays are views: copy what must outlive release()."""
        if int(self._header[_HEAD]) == self._read:
            return None
        self._header[_TRYING] = self._read + 1
        return self._step(self._read)

    def last(self) -> RawStep:
        """The step that was released as waiting, by this exporter or the one before."""
        return self._step(self._read - 1)

    def _step(self, place: int) -> RawStep:
        slot = self._slots[place % len(self._slots)]
        step, time_unix_nano, requests, rows, scored, fires, silent, events = slot.header[:8].tolist()
        return RawStep(
            step=step,
            time_unix_nano=time_unix_nano,
            requests_Q=slot.requests_Q[:requests],
            rows=rows,
            scored_rows=scored,
            silent=bool(silent),
            fires_N=slot.fires_N[:fires],
            dense_TP=slot.dense_TP[:scored],
            norm_TH=slot.norm_TH[:scored],
            events=slot.events[:events].tobytes(),
        )

    def release(self, *, waits: bool = False) -> None:
        """The step of the last peek() is read: its slot goes back to the engine, but for one that `waits` until the
        next is released. Say so in the checkpoint first.
        """
        self._read += 1
        self._header[_TAIL] = self._read - waits
        self._header[_TRYING] = 0
        self._header[_TRIES] = 0

    @property
    def dropped_steps(self) -> int:
        return int(self._header[_DROPPED_STEPS])

    @property
    def restarts(self) -> int:
        return int(self._header[_RESTARTS])

    @property
    def attached(self) -> bool:
        """Whether an exporter has ever taken up this ring."""
        return bool(self._header[_ATTACHED])

    @property
    def closed(self) -> bool:
        return bool(self._header[_CLOSED])


def _aligned(offset: int) -> int:
    return (offset + 63) & ~63


def _slot_bytes(geometry: Geometry, fires: int) -> int:
    g = geometry
    sizes = (
        g.max_requests * REQUEST_DTYPE.itemsize,
        EVENT_BYTES,
        g.max_rows * g.hook_points * 4,
        g.max_rows * g.dense * 2,
        fires * FIRE_DTYPE.itemsize,
    )
    # Whole pages, so that an untouched slot costs no memory.
    return (_SLOT_HEADER_BYTES + sum(_aligned(size) for size in sizes) + _PAGE - 1) & ~(_PAGE - 1)
