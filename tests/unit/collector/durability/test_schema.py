"""A state that is not what was written is refused in words, whatever is wrong with it."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.collector.core import Core
from latentwatch.collector.durability import schema
from latentwatch.collector.durability.journal import DurableSink
from latentwatch.errors import StateRefused, StreamRefused
from latentwatch.names import Outcome

from tests.support.streams import hello, received, watchlist
from tests.unit.collector.durability.test_journal import FEATURES, SMALL, batches, same


def core() -> Core:
    return Core(watchlist(FEATURES), SMALL, forward_boot_id="f" * 32)


def seen() -> Core:
    """A collector with something in every part of its state."""
    made = core()
    made.ingest.hello(hello(), 1000.0)
    made.ingest.refused("protocol_version")
    steps = batches(1)
    for sequence, batch in enumerate(steps[: 3 * len(steps) // 4], start=1):
        made.ingest.observe(hello(), received(sequence, batch), 1000.0 + sequence)
        made.ingest.tick(1000.0 + 60 * sequence)
    return made


TREE, ARRAYS = schema.to_tree(seen().state())


def test_a_state_comes_back_as_it_was_and_holds_plain_values_only():
    other = core()
    other.restore(schema.from_tree(json.loads(json.dumps(TREE)), ARRAYS))
    same(seen(), other)


def test_a_sum_comes_back_however_large_it_grew():
    """What one message says is bounded; what a hundred thousand of them say together is not."""
    one, other = seen(), core()
    one._state.totals.lost_sequences = one._state.totals.excess_tokens = 2**63
    one._state.engines["toy", "0"].requests[Outcome.LOST] += 2**70
    tree, arrays = schema.to_tree(one.state())
    other.restore(schema.from_tree(json.loads(json.dumps(tree)), arrays))
    same(one, other)


def paths(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(inner, *path, key)


PATHS = list(paths(TREE))
STRANGE = (None, -1, 2**70, float("nan"), "", "x", [], {}, [1], {"$array": "a0"}, {"$array": "none"}, {"$array": []})


def restored(tree: Any, arrays: dict[str, np.ndarray]) -> None:
    """What a start does: whatever it cannot use is one of the causes of StateRefused."""
    try:
        state = schema.from_tree(tree, arrays)
    except (ValueError, TypeError):
        return
    made = core()
    try:
        made.restore(state)
    except (ValueError, IndexError):
        return
    # And what gets in breaks nothing later, but for what a stream or a report is refused for.
    made.lookup.snapshot(1000.0)
    made.lookup.exceedances(100)
    made.lookup.anomalies(100)
    for serial in made.lookup.latest(100):
        made.lookup.request(serial)
    for second in (2000.0, 90_000.0):
        with contextlib.suppress(StreamRefused):
            made.ingest.hello(hello(), second)
        made.ingest.tick(second)
    with contextlib.suppress(StreamRefused):
        made.state()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_value_of_another_type_or_size_is_met_with_more_than_a_refusal(data):
    tree = copy.deepcopy(TREE)
    *parents, last = data.draw(st.sampled_from(PATHS))
    place = tree
    for key in parents:
        place = place[key]
    if data.draw(st.booleans()) and isinstance(place, dict):
        del place[last]
    else:
        place[last] = data.draw(st.sampled_from(STRANGE))
    restored(tree, ARRAYS)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_array_of_another_type_or_shape_gets_in(data):
    name = data.draw(st.sampled_from(sorted(ARRAYS)))
    array = ARRAYS[name]
    other = data.draw(
        st.sampled_from([array[None], array.astype("<f4") if array.dtype.names is None else array["feature"]])
        if array.dtype.names is None or "feature" in array.dtype.names
        else st.just(array[None])
    )
    if other.dtype == array.dtype and other.shape == array.shape:
        return
    with pytest.raises((ValueError, TypeError)):
        core().restore(schema.from_tree(TREE, {**ARRAYS, name: other}))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_array_of_another_length_or_content_is_met_with_more_than_a_refusal(data):
    name = data.draw(st.sampled_from(sorted(ARRAYS)))
    array = ARRAYS[name].copy()
    if data.draw(st.booleans()) and len(array):
        array = array[: data.draw(st.integers(0, len(array) - 1))]
    elif array.nbytes:
        raw = array.reshape(-1).view(np.uint8)
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    restored(TREE, {**ARRAYS, name: array})


def test_a_start_says_which_file_does_not_hold_together(tmp_path: Path, monkeypatch, caplog):
    DurableSink(core(), tmp_path, 1000.0).close(1001.0)
    monkeypatch.setattr(schema, "from_tree", lambda *_: schema.CoreState())
    assert DurableSink(core(), tmp_path, 1002.0).facts.files_aside == 1
    assert "checkpoint-" in caplog.text and "does not hold together" in caplog.text


def test_a_state_of_another_schema_is_refused_though_its_format_is_the_same(tmp_path: Path, monkeypatch):
    """A change that somebody forgot to number."""
    DurableSink(core(), tmp_path, 1000.0).close(1001.0)
    monkeypatch.setattr(schema, "fingerprint", lambda: "another")
    with pytest.raises(StateRefused, match="its schema is") as refused:
        DurableSink(core(), tmp_path, 1002.0)
    assert refused.value.reason == "state_header"
