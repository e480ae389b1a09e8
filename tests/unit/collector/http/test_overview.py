"""What the page says first: two verdicts that never claim more than was seen, and the abnormal features on top."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from latentwatch.collector.core import Core
from latentwatch.collector.http.features import features_of, share_interval
from latentwatch.collector.http.overview import _by_abnormality, overview
from latentwatch.collector.http.verdicts import Coverage, Engine, Verdict, is_anything_wrong, is_everything_seen
from latentwatch.names import Severity, TokenState
from latentwatch.watchlist.file import Limit

from tests.support.streams import Schedule, Tokens, hello, probe, received, sparse, watchlist

ENGINE = Engine("pod-0/0", "toy", "0", "connected", "", "", 0.0, 0, "0.32.0", "0.1.0", "same", "")
SEEN = Verdict("ok", "Everything is seen", "")


def coverage(recent: float | None, **missing: int) -> Coverage:
    tokens = {"scored": 100, "inherited": 0, "unseen": sum(missing.values()), "dropped": 0}
    return Coverage(tokens, missing, recent, recent, 1.0)


def engine(**changes) -> Engine:
    return dataclasses.replace(ENGINE, **changes)


@pytest.mark.parametrize(
    ("recent", "engines", "level", "headline"),
    [
        (None, [], "waiting", "Waiting for an engine"),
        (1.0, [ENGINE], "ok", "Everything is seen"),
        (None, [ENGINE], "ok", "Everything is seen"),
        (0.9995, [ENGINE], "ok", "Everything is seen"),
        (0.9899, [ENGINE], "attention", "98.99 % of tokens seen"),
        (0.5, [ENGINE], "problem", "50 % of tokens seen"),
        (1.0, [ENGINE, engine(replica="b", state="disconnected")], "attention", "b is away"),
        (1.0, [engine(state="disconnected", last_seen_seconds_ago=300)], "problem", "No engine is connected"),
        (1.0, [ENGINE, engine(replica="b", state="not armed")], "problem", "b is not scoring"),
    ],
)
def test_everything_is_seen_only_when_every_engine_scores_every_token(recent, engines, level, headline):
    found = is_everything_seen(coverage(recent, prefix_cache=3), engines, 6)
    assert (found.level, found.headline) == (level, headline) and found.detail


def test_a_share_just_below_one_is_not_rounded_up_to_all():
    found = is_everything_seen(coverage(0.99999), [ENGINE], 6)
    assert "99.99 %" in found.detail


@pytest.mark.parametrize(
    ("exceeded", "seen", "level", "headline"),
    [
        ({}, SEEN, "ok", "Nothing is wrong"),
        ({Severity.INFO: 5, Severity.NONE: 7}, SEEN, "ok", "Nothing is wrong"),
        ({Severity.WARNING: 2}, SEEN, "attention", "2 warning exceedances"),
        ({Severity.WARNING: 2, Severity.CRITICAL: 1}, SEEN, "problem", "1 critical exceedance"),
        ({}, Verdict("problem", "", ""), "waiting", "Nothing wrong in what was seen"),
        ({}, Verdict("waiting", "", ""), "waiting", "Nothing to judge yet"),
        ({Severity.CRITICAL: 1}, Verdict("problem", "", ""), "problem", "1 critical exceedance"),
    ],
)
def test_nothing_is_wrong_only_when_everything_was_seen_and_nothing_exceeded(exceeded, seen, level, headline):
    found = is_anything_wrong({**dict.fromkeys(Severity, 0), **exceeded}, dict.fromkeys(Severity, 0), [], [], seen, 6)
    assert (found.level, found.headline) == (level, headline) and found.detail


@pytest.mark.parametrize(
    ("exceeded", "drifting", "level", "headline"),
    [
        ({}, ["warned"], "attention", "1 feature drifts"),
        ({}, ["warned", "critical"], "problem", "2 features drift"),
        ({Severity.WARNING: 3}, ["critical"], "problem", "1 feature drifts"),
        ({Severity.WARNING: 3}, ["warned"], "attention", "3 warning exceedances"),
        ({Severity.CRITICAL: 1}, ["critical"], "problem", "1 critical exceedance"),
    ],
)
def test_a_drift_is_something_wrong_too(exceeded, drifting, level, headline):
    features = {feature.id: feature for feature in FEATURES}
    none = dict.fromkeys(Severity, 0)
    found = is_anything_wrong({**none, **exceeded}, none, [], [features[name] for name in drifting], SEEN, 6)
    assert (found.level, found.headline) == (level, headline)


FEATURES = (
    sparse("quiet"),
    sparse("near", limit=Limit("max", 10.0)),
    sparse("warned", limit=Limit("max", 1.0), severity=Severity.WARNING),
    probe("critical", limit=Limit("max", 1.0), severity=Severity.CRITICAL),
)


@pytest.fixture
def busy() -> Core:
    made = Core(watchlist(FEATURES))
    made.ingest.hello(hello(), 1000.0)
    act = np.zeros((6, 4), np.float32)
    act[2, 1], act[3, 2], act[4, 3] = 9.0, 5.0, 2.0
    state = np.array([TokenState.SCORED] * 5 + [TokenState.UNSEEN])
    batches = Schedule.one_step([Tokens(1, 2, act, state, np.ones((6, 1), np.float32))]).batches(FEATURES)
    made.ingest.observe(hello(), received(1, batches[0]), 1000.0)
    return made


def test_features_that_exceeded_come_first_the_severe_ones_before_the_others(busy):
    shown = overview(busy.lookup, 1001.0, most_features=10)
    assert [f.feature for f in shown.features] == ["critical", "warned", "near", "quiet"]
    assert [f.recent_exceedances for f in shown.features] == [1, 1, 0, 0]
    assert [f.feature for f in overview(busy.lookup, 1001.0, most_features=2).features] == ["critical", "warned"]


@pytest.mark.parametrize(
    ("search", "first", "shown", "found"),
    [
        ("", 2, ["near", "quiet"], 4),
        ("", 4, [], 4),
        ("  near ", 0, ["near"], 1),
        ("R", 0, ["critical", "warned", "near", "quiet"], 4),
        ("CRIT", 0, ["critical"], 1),
        ("chess", 0, [], 0),
    ],
)
def test_features_are_searched_and_paged_in_the_order_of_the_page(busy, search, first, shown, found):
    view = overview(busy.lookup, 1001.0, most_features=10, first_feature=first, search=search)
    assert ([f.feature for f in view.features], view.features_found, view.features_total) == (shown, found, 4)


def test_an_id_finds_its_feature_alone():
    features = [sparse(name) for name in ("l1.f7", "l1.f77")]
    made = Core(watchlist(features))
    assert [overview(made.lookup, 0.0, most_features=9, search=text).features_found for text in ("l1.f7", "L1.F7")] == [
        1,
        2,
    ]


def test_a_window_without_tokens_is_a_gap_and_one_without_a_fire_is_zero(busy):
    shown = {f.feature: f for f in overview(busy.lookup, 1001.0, most_features=10).features}
    assert shown["quiet"].series[-1] == 0.0 and shown["quiet"].series[-2] is None
    assert shown["warned"].series[-1] == 5.0 and shown["critical"].series[-1] == 2.0
    assert shown["warned"].fired_ratio == pytest.approx(1 / 5) and shown["critical"].fired_ratio is None


def test_coverage_counts_what_was_missed_and_why(busy):
    shown = overview(busy.lookup, 1001.0, most_features=0)
    assert shown.coverage.tokens == {"scored": 5, "inherited": 0, "unseen": 1, "dropped": 0}
    assert shown.coverage.missing == {"prefix_cache": 1}
    assert shown.coverage.recent_seen_ratio == pytest.approx(5 / 6)
    assert (shown.tokens_seen[-1], shown.tokens_missed[-1]) == (5, 1)
    assert shown.seen.headline == "83.33 % of tokens seen" and "prefix cache" in shown.seen.detail


def test_what_drifts_stands_before_what_is_only_near_and_behind_what_exceeded_at_its_severity(busy):
    peak_F, exceeded_F = np.full(4, 0.5), np.array([0, 0, 1, 0])
    ranked = _by_abnormality(FEATURES, exceeded_F, peak_F, {"near", "critical"})
    assert [FEATURES[i].id for i in ranked] == ["critical", "warned", "near", "quiet"]


def test_one_request_that_exceeded_two_limits_is_one_entry_with_both(busy):
    (flagged,) = overview(busy.lookup, 1001.0, most_features=0).flagged
    assert [each.feature for each in flagged.exceedances] == ["critical", "warned"]
    assert busy.lookup.requests_over(990.0, Severity.CRITICAL) == 1
    assert busy.lookup.requests_over(1001.0, Severity.CRITICAL) == 0


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (12, 4300, 0.0016, 0.0049), (5, 3, 0.4385, 1.0)],
)
def test_an_interval_of_a_share_is_wilsons(count, of, low, high):
    assert share_interval(count, of) == pytest.approx((low, high), abs=1e-4)


def test_a_limit_says_how_often_it_was_exceeded_among_the_requests_that_ended(busy):
    by_id = {feature.id: feature for feature in features_of(busy.lookup, 1001.0).features}
    warned = by_id["warned"].reliability
    assert by_id["quiet"].reliability is None and share_interval(0, 0) == (None, None)
    assert (warned.exceedances, warned.requests, warned.seen_ratio, warned.promised_ratio) == (1, 1, 1.0, None)
