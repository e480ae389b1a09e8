"""Per-request statistics against a reference that walks tokens one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.aggregate.features import FeatureTable
from latentwatch.aggregate.requests import RequestStates
from latentwatch.names import Phase, TokenState
from latentwatch.step.batch import StepBatch
from latentwatch.watchlist.file import Feature, Limit

from tests.support.streams import Piece, Schedule, Tokens, probe, sparse, step_batch, tokens

FEATURES = (
    sparse("plain"),
    sparse("limited", limit=Limit("max", 3.0)),
    sparse("skips", limit=Limit("max", 3.0), skip=3),
    sparse("prompt_only", limit=Limit("max", 3.0, phase="prompt")),
    sparse("output_only", limit=Limit("max", 1.0, phase="output"), skip=2),
    sparse("rolling_sparse", limit=Limit("rolling_mean", 0.6, 4)),
    probe("dense"),
    probe("dense_limited", limit=Limit("max", 2.5), skip=1),
    probe("dense_prompt", limit=Limit("max", 2.5, phase="prompt")),
    probe("rolling", limit=Limit("rolling_mean", 0.75, 5)),
    probe("rolling_too", limit=Limit("rolling_mean", 0.5, 5)),
    probe("rolling_output", limit=Limit("rolling_mean", 0.5, 3, phase="output"), skip=2),
    probe("rolling_long", limit=Limit("rolling_mean", 0.1, 64, phase="prompt")),
)


class Reference:
    """One feature of one request, token by token, in plain Python."""

    def __init__(self, feature: Feature, request: Tokens, column: int) -> None:
        self.max, self.max_position, self.fired = math.nan, -1, 0
        self.statistic, self.statistic_position = math.nan, -1
        self.exceedance: tuple[int, float] | None = None
        limit = feature.limit
        window: list[float] = []
        for position in range(request.total):
            act = float(request.act_TF[position, column])
            if not request.seen_T[position] or position < feature.skip_first_positions:
                window.clear()
                continue
            fires = feature.dense or act != 0
            if fires and not act <= self.max:
                self.max, self.max_position = act, position
            self.fired += fires and not feature.dense
            phase = "prompt" if position < request.prompt_tokens else "output"
            if limit and limit.phase not in ("any", phase):
                window.clear()
                continue
            if limit and limit.statistic == "rolling_mean":
                window.append(act)
                if len(window) >= limit.window_tokens:
                    self._take(sum(window[-limit.window_tokens :]) / limit.window_tokens, position, limit)
            elif fires:
                self._take(act, position, limit)

    def _take(self, value: float, position: int, limit: Limit | None) -> None:
        if not np.float32(value) <= np.float32(self.statistic):
            self.statistic, self.statistic_position = value, position
        if limit and value > limit.value and self.exceedance is None:
            self.exceedance = (position, value)


def run(batches: Sequence[StepBatch], handles: Sequence[int], slots: int = 16):
    """States after the batches, and every exceedance by (handle, feature). Slots are given backwards."""
    states = RequestStates(FeatureTable.of(FEATURES), slots)
    slot_of = {handle: slots - 1 - i for i, handle in enumerate(handles)}
    exceedances: dict[tuple[int, int], tuple[int, float, int]] = {}
    fired = np.zeros(len(FEATURES), np.int64)
    peak = np.full(len(FEATURES), -np.inf, np.float32)
    for batch in batches:
        slot_S = np.array([slot_of[int(h)] for h in batch.segments_S["handle"]], np.int64)
        view = states.update(batch, slot_S, 1000.0)
        fired += view.fired_F
        peak = np.maximum(peak, view.peak_F)
        for slot, c in zip(view.exceeding_slots, view.exceedances, strict=True):
            key = (handles[slots - 1 - int(slot)], int(c["feature"]))
            assert key not in exceedances, "a request exceeds a feature's limit once"
            exceedances[key] = (int(c["position"]), float(c["value"]), int(c["phase"]))
    return {h: features_of(states, slot_of[h]) for h in handles}, exceedances, fired, peak


def features_of(states: RequestStates, slot: int) -> dict[str, np.ndarray]:
    found = states.features_of(np.array([slot]))
    return {name.removesuffix("_nF"): getattr(found, name)[0] for name in found.__dataclass_fields__}


def make_requests(seed: int, lengths: Sequence[tuple[int, int]]) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [
        tokens(rng, FEATURES, handle=100 + 7 * i, total=total, prompt_tokens=min(prompt, total))
        for i, (total, prompt) in enumerate(lengths)
    ]


REQUESTS = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 80)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lengths=REQUESTS, longest=st.sampled_from([1, 2, 7, 40]))
def test_statistics_do_not_depend_on_how_the_scheduler_cut_and_mixed_the_steps(seed, lengths, longest):
    """vLLM cuts by load; if a statistic moved with the cuts, load would read as behaviour."""
    requests = make_requests(seed, lengths)
    handles = [r.handle for r in requests]
    whole, whole_exceedances, whole_fired, whole_peak = run(Schedule.one_step(requests).batches(FEATURES), handles)
    cut, cut_exceedances, cut_fired, cut_peak = run(
        Schedule.random(np.random.default_rng(seed), requests, longest).batches(FEATURES), handles
    )
    assert cut_exceedances == whole_exceedances
    np.testing.assert_array_equal(cut_fired, whole_fired)
    np.testing.assert_array_equal(cut_peak, whole_peak)
    for handle in handles:
        for name, expected in whole[handle].items():
            np.testing.assert_array_equal(cut[handle][name], expected, name)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lengths=REQUESTS, longest=st.sampled_from([1, 3, 17, 90]))
def test_statistics_equal_a_walk_over_the_tokens(seed, lengths, longest):
    requests = make_requests(seed, lengths)
    schedule = Schedule.random(np.random.default_rng(seed), requests, longest)
    got, exceedances, fired, _ = run(schedule.batches(FEATURES), [r.handle for r in requests])
    expected_fired = np.zeros(len(FEATURES), np.int64)
    for request in requests:
        for i, feature in enumerate(FEATURES):
            expected, found = Reference(feature, request, i), got[request.handle]
            where = f"{feature.id} of {request.handle}"
            expected_fired[i] += expected.fired
            assert int(found["fired"][i]) == expected.fired, where
            assert int(found["max_position"][i]) == expected.max_position, where
            np.testing.assert_equal(float(found["max"][i]), expected.max, where)
            assert int(found["statistic_position"][i]) == expected.statistic_position, where
            np.testing.assert_equal(found["statistic"][i], np.float32(expected.statistic), where)
            assert bool(found["exceeded"][i]) == (expected.exceedance is not None), where
            exceedance = exceedances.get((request.handle, i))
            if expected.exceedance is None:
                assert exceedance is None, where
            else:
                phase = Phase.PROMPT if expected.exceedance[0] < request.prompt_tokens else Phase.OUTPUT
                assert exceedance == (*expected.exceedance, phase), where
    np.testing.assert_array_equal(fired, expected_fired)


def test_a_cleared_slot_shows_nothing_of_its_earlier_request():
    first, second = make_requests(3, [(80, 40), (30, 10)])
    states = RequestStates(FeatureTable.of(FEATURES), 1)
    slot = np.array([0])
    for request in (first, second):
        states.clear(slot)
        batch = step_batch([Piece(request, 0, request.total)], FEATURES)
        states.update(batch, np.zeros(len(batch.segments_S), np.int64), 1000.0)
    alone, *_ = run([step_batch([Piece(second, 0, second.total)], FEATURES)], [second.handle])
    for name, expected in alone[second.handle].items():
        np.testing.assert_array_equal(features_of(states, 0)[name], expected, name)


def test_a_rolling_mean_has_no_value_before_its_window_is_full():
    features = (probe("p", limit=Limit("rolling_mean", -100.0, 8)),)
    rng = np.random.default_rng(0)
    request = tokens(rng, features, handle=1, total=8, prompt_tokens=8, unseen_share=0)
    request.state_T[:] = TokenState.SCORED
    states = RequestStates(FeatureTable.of(features), 1)
    before = states.update(step_batch([Piece(request, 0, 7)], features), np.zeros(1, np.int64), 1000.0)
    assert not len(before.exceedances) and math.isnan(states.statistic(0, 0))
    after = states.update(step_batch([Piece(request, 7, 8)], features), np.zeros(1, np.int64), 1000.0)
    assert [int(c["position"]) for c in after.exceedances] == [7]


def test_sums_stay_exact_over_the_largest_scores_that_float16_holds():
    """65504 in, 2**-24 out: a float32 sum, or one that carries rounding, would lose the small one."""
    features = (probe("p", limit=Limit("rolling_mean", 1e9, 2)),)
    tiny, total = 2.0**-24, 4096
    request = Tokens(
        1, total, np.full((total, 1), 65504.0, np.float32), np.ones(total, int), np.ones((total, 1), np.float32)
    )
    request.act_TF[-2:] = tiny
    states = RequestStates(FeatureTable.of(features), 1)
    for start in range(0, total, 1000):
        states.update(
            step_batch([Piece(request, start, min(total, start + 1000))], features), np.zeros(1, np.int64), 1000.0
        )
    assert states._rolling[0]._sum[0, 0] == 2 * tiny


@pytest.mark.parametrize("rows", [1, 300])
def test_a_step_without_scores_changes_nothing(rows):
    request = make_requests(1, [(rows, 1)])[0]
    request.state_T[:] = 3
    got, exceedances, fired, peak = run([step_batch([Piece(request, 0, rows)], FEATURES)], [request.handle])
    assert not exceedances and not fired.any() and np.isneginf(peak).all()
    assert np.isnan(got[request.handle]["max"]).all()


@pytest.mark.parametrize(
    "feature",
    [
        sparse("s", limit=Limit("max", 3.0)),
        probe("d", limit=Limit("max", 3.0)),
        probe("r", limit=Limit("rolling_mean", 3.0, 2)),
        sparse("rs", limit=Limit("rolling_mean", 3.0, 2)),
    ],
    ids=["sparse", "dense", "rolling", "rolling_sparse"],
)
def test_a_score_at_the_limit_is_within_it_and_the_next_one_above_is_not(feature):
    """The limit is the largest value that pages nobody: calibration picks it as one that was seen in normal traffic."""
    next_above = np.nextafter(np.float16(3.0), np.float16(np.inf))
    for value, expected in ((3.0, []), (next_above, [1] if feature.limit.statistic == "rolling_mean" else [0])):
        act = np.full((2, 1), value, np.float32)
        request = Tokens(1, 2, act, np.ones(2, int), np.ones((2, 1), np.float32))
        states = RequestStates(FeatureTable.of((feature,)), 1)
        found = states.update(step_batch([Piece(request, 0, 2)], (feature,)), np.zeros(1, np.int64), 1000.0).exceedances
        assert [int(exceedance["position"]) for exceedance in found] == expected


def test_an_activation_beyond_float16_counts_as_its_largest_value_in_a_rolling_mean():
    """An infinity would stay in the sum for ever, as NaN once it leaves the window."""
    features = (sparse("r", limit=Limit("rolling_mean", 1.0, 2)),)
    act = np.array([[1e6], [0.0], [0.0], [4.0]], np.float32)
    request = Tokens(1, 4, act, np.ones(4, int), np.ones((4, 1), np.float32))
    states = RequestStates(FeatureTable.of(features), 1)
    found = states.update(step_batch([Piece(request, 0, 4)], features), np.zeros(1, np.int64), 1000.0)
    assert [int(exceedance["position"]) for exceedance in found.exceedances] == [1]
    assert states.statistic(0, 0) == 65504 / 2
