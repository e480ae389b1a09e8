"""The ring loses nothing silently: what it takes comes out as it went in, and what it cannot take is counted."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.handover.ring import MAX_RING_BYTES, MIN_SLOTS, Geometry, Ring

GEOMETRY = Geometry(max_requests=8, max_rows=32, features=6, dense=2, hook_points=2)


def put(ring: Ring, step: int, rows: int = 3, events: bytes = b"") -> bool:
    slot = ring.reserve()
    if slot is None:
        ring.count_dropped()
        return False
    slot.requests_Q[:1] = [(4, 10, rows)]
    slot.fires_N[:2] = [(0, 1, 0.5), (2, 3, 1.5)]
    slot.dense_TP[:rows] = step
    slot.norm_TH[:rows] = 7.0
    slot.events[: len(events)] = np.frombuffer(events, np.uint8)
    ring.commit(
        slot,
        step=step,
        time_unix_nano=123,
        requests=1,
        rows=rows,
        scored_rows=rows,
        fires=2,
        silent=False,
        events=len(events),
    )
    return True


def test_a_step_comes_out_of_another_mapping_as_it_went_in():
    engine = Ring.create(GEOMETRY)
    exporter = Ring(engine.fd, GEOMETRY, create=False)
    assert exporter.peek() is None
    assert put(engine, 5, events=b'["hello"]')
    raw = exporter.peek()
    assert raw is not None
    assert (raw.step, raw.time_unix_nano, raw.rows, raw.scored_rows, raw.silent) == (5, 123, 3, 3, False)
    assert raw.requests_Q.tolist() == [(4, 10, 3)]
    assert raw.fires_N.tolist() == [(0, 1, 0.5), (2, 3, 1.5)]
    assert raw.dense_TP.shape == (3, 2)
    assert (raw.dense_TP == 5).all()
    assert raw.events == b'["hello"]'
    exporter.release()
    assert exporter.peek() is None


def test_a_full_ring_drops_the_newest_step_and_counts_it():
    ring = Ring.create(GEOMETRY)
    reader = Ring(ring.fd, GEOMETRY, create=False)
    for step in range(ring.slots):
        assert put(ring, step)
    assert not put(ring, 99, rows=3)
    assert ring.dropped_steps == 1
    raw = reader.peek()
    assert raw is not None
    assert raw.step == 0
    reader.release()
    assert put(ring, 100)


def test_a_second_exporter_goes_on_where_the_first_stopped():
    ring = Ring.create(GEOMETRY)
    first = Ring(ring.fd, GEOMETRY, create=False)
    put(ring, 1)
    put(ring, 2)
    first.peek()
    first.release()
    second = Ring(ring.fd, GEOMETRY, create=False)
    raw = second.peek()
    assert raw is not None
    assert raw.step == 2


def test_another_geometry_is_refused_with_the_sizes():
    ring = Ring.create(GEOMETRY)
    other = Geometry(max_requests=8, max_rows=4096, features=6, dense=2, hook_points=2)
    with pytest.raises(ConfigRefused, match="expected"):
        Ring(ring.fd, other, create=False)


@settings(max_examples=300, deadline=None)
@given(
    max_requests=st.integers(1, 8192),
    max_rows=st.integers(1, 1 << 18),
    features=st.integers(0, 4096),
    dense_share=st.floats(0, 1),
    hook_points=st.integers(0, 16),
)
@example(max_requests=256, max_rows=131072, features=2048, dense_share=0.25, hook_points=8)
@example(max_requests=8, max_rows=241, features=64, dense_share=0.25, hook_points=4)  # slots that fill it to the byte
def test_no_ring_is_larger_than_its_bound_and_one_that_cannot_be_is_refused(
    max_requests, max_rows, features, dense_share, hook_points
):
    geometry = Geometry(max_requests, max_rows, features, int(features * dense_share), hook_points)
    try:
        ring = Ring.create(geometry)
    except ConfigRefused as refused:
        assert refused.reason == RefusalReason.RING_GEOMETRY
        assert features or hook_points, "what is not armed fits always"
        return
    size = os.fstat(ring.fd).st_size
    os.close(ring.fd)
    assert size <= MAX_RING_BYTES
    assert ring.slots >= MIN_SLOTS
    slot = ring.reserve()
    assert slot is not None
    # A row whose features all fire fits.
    assert len(slot.fires_N) >= features - geometry.dense


def test_untouched_slots_cost_no_memory():
    ring = Ring.create(Geometry(max_requests=256, max_rows=8192, features=1024, dense=16, hook_points=4))
    assert os.fstat(ring.fd).st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("steps", [3000])
def test_two_processes_pass_steps_at_full_speed_without_losing_or_tearing_one(steps):
    """The reader checks that each slot's arrays agree with its header, which a torn read would break."""
    ring = Ring.create(GEOMETRY)
    code = f"""
import time
from latentwatch.handover.ring import Geometry, Ring
ring = Ring({ring.fd}, Geometry(**{asdict(GEOMETRY)}), create=False)
seen, torn = 0, 0
while seen < {steps}:
    raw = ring.peek()
    if raw is None:
        time.sleep(0.0002)
        continue
    torn += raw.step != seen or not (raw.dense_TP == raw.step % 2048).all()
    ring.release()
    seen += 1
print(seen, torn)
"""
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[ring.fd], stdout=subprocess.PIPE, text=True)
    for step in range(steps):
        while (slot := ring.reserve()) is None:
            pass
        slot.dense_TP[:3] = step % 2048
        ring.commit(
            slot, step=step, time_unix_nano=0, requests=0, rows=3, scored_rows=3, fires=0, silent=False, events=0
        )
    output, _ = child.communicate(timeout=60)
    assert output.split() == [str(steps), "0"]
