"""A batch that means nothing is refused before it changes a state, with the value that is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from latentwatch.errors import StreamRefused
from latentwatch.step.batch import StepBatch
from latentwatch.step.checks import validate
from latentwatch.transport import codec
from latentwatch.transport.sink import ReceivedBatch

from tests.support.wire import batch, batches

SPARSE = np.array([True, False, True, False])


def check(value: StepBatch) -> None:
    """As it comes to a state: over the wire."""
    received = codec.decode_request(codec.encode_batch(1, value))
    assert isinstance(received, ReceivedBatch)
    validate(received.batch, sparse_F=SPARSE, hook_points=1)


def changed(name: str, at: int = 1, **changes: object) -> StepBatch:
    """A batch of which one record of a column holds other values."""
    column = getattr(batch(1), name).copy()
    for field, value in changes.items():
        column[field][at] = value
    return replace(batch(1), **{name: column})


def without_rows(**changes: object) -> StepBatch:
    """Its second segment is changed, and there are no scores that could contradict it."""
    value = changed("segments_S", **changes)
    return replace(value, fires_N=value.fires_N[:0], dense_RP=value.dense_RP[:0], norm_RH=value.norm_RH[:0])


def test_a_batch_as_an_exporter_makes_it_is_taken():
    check(batch(1))
    check(batch(1, rows=0))
    check(StepBatch(step=1, time_unix_nano=1))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (without_rows(state=0), "segment state 0"),
        (without_rows(state=250), "segment state 250"),
        (changed("segments_S", reason=99), "segment reason 99"),
        (changed("segments_S", phase=3), "segment phase 3"),
        (without_rows(count=0), "no positions of a request"),
        (without_rows(count=-8, state=4), "no positions of a request"),
        (changed("segments_S", start=-1), "no positions of a request"),
        (changed("segments_S", start=2**31 - 1), "no positions of a request"),
        (changed("segments_S", reason=1), "a reason must stand"),
        (changed("segments_S", at=0, reason=0), "a reason must stand"),
        (changed("fires_N", at=-1, row=8), "an activation names row 8 of 8"),
        (changed("fires_N", feature=1), "dense or beyond"),
        (changed("fires_N", feature=4), "dense or beyond"),
        (changed("fires_N", at=0, row=7, feature=2), "not sorted"),
        (changed("fires_N", act=np.inf), "column act holds NaN or infinity"),
        (batch(1, probes=1), "dense scores have shape"),
        (batch(1, hooks=2), "norms have shape"),
        (replace(batch(1), norm_RH=np.full((8, 1), np.nan, np.float32)), "column norm"),
        (replace(batch(1), dense_RP=np.full((8, 2), np.nan, np.float16)), "column dense"),
    ],
)
def test_a_batch_that_means_nothing_is_refused_with_the_offending_value(value, found):
    with pytest.raises(StreamRefused, match=found) as refused:
        check(value)
    assert refused.value.reason == "malformed_batch" and refused.value.instead


@given(batches())
@settings(deadline=None, max_examples=200)
def test_whatever_comes_is_taken_or_refused(value):
    try:
        check(value)
    except StreamRefused as refused:
        assert refused.reason == "malformed_batch"
