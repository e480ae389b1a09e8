"""The core's books: every token once, every request closed once, every bound counted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.client_ids import bounded_id
from latentwatch.collector.config import Bounds
from latentwatch.collector.core import Core
from latentwatch.collector.http.overview import overview
from latentwatch.collector.metrics_families import Families
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.collector.snapshot import RequestView
from latentwatch.errors import ConfigRefused, StreamRefused
from latentwatch.names import Outcome, Phase, Reason, Severity, TokenState
from latentwatch.step.batch import SEGMENT_DTYPE, UNANNOUNCED, EngineCounters, StepBatch
from latentwatch.transport.hello import Hello
from latentwatch.transport.sink import ReceivedBatch
from latentwatch.watchlist.file import Limit

from tests.support.streams import Piece, Schedule, Tokens, hello, probe, received, sparse, step_batch, tokens, watchlist

FEATURES = (
    sparse("jailbreak", limit=Limit("max", 3.0), severity=Severity.CRITICAL),
    sparse("weather"),
    sparse("bos", limit=Limit("max", 0.1), skip=1),
    probe("deceive", limit=Limit("rolling_mean", 1.0, 4)),
)
PHASES = {Phase.PROMPT: "prompt", Phase.OUTPUT: "output"}


def core(**bounds: float) -> Core:
    return Core(watchlist(FEATURES), Bounds(**bounds))


def connected(**bounds: float) -> tuple[Core, Hello]:
    made = core(**bounds)
    made.ingest.hello(hello(), 1000.0)
    return made, hello()


def feed(made: Core, who: Hello, batches: list[StepBatch], *, first: int = 1, now: float = 1000.0) -> None:
    for sequence, batch in enumerate(batches, start=first):
        made.ingest.observe(who, received(sequence, batch), now)


def some_requests(seed: int, count: int = 6) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [
        tokens(rng, FEATURES, handle=i, total=int(rng.integers(2, 60)), prompt_tokens=int(rng.integers(1, 30)))
        for i in range(1, count + 1)
    ]


def state_totals(made: Core) -> dict[TokenState, int]:
    totals = sum(engine.tokens for engine in made.lookup.snapshot(0).engines).sum(axis=(1, 2))
    return {state: int(totals[state]) for state in TokenState}


def views_of(made: Core, name: str) -> list[RequestView]:
    return [view for serial in made.lookup.find(name) if (view := made.lookup.request(serial))]


# -- accounting


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), longest=st.integers(1, 30), lost=st.sets(st.integers(0, 40), max_size=6))
def test_every_token_of_a_closed_request_is_counted_once_even_when_messages_are_lost(seed, longest, lost):
    """Invariant I1, with any steps missing except those that open or close a request."""
    requests = some_requests(seed)
    for r in requests:
        r.prompt_tokens = min(r.prompt_tokens, r.total)
    batches = Schedule.random(np.random.default_rng(seed), requests, longest).batches(FEATURES)
    made, who = connected()
    for sequence, batch in enumerate(batches, start=1):
        if sequence - 1 not in lost or batch.opened or batch.closed:
            made.ingest.observe(who, received(sequence, batch), 1000.0)
    totals = state_totals(made)
    assert sum(totals.values()) == sum(r.total for r in requests)
    for r in requests:
        (view,) = views_of(made, r.request_id)
        assert sum(view.tokens.values()) == r.total == view.total_tokens
    assert made.lookup.snapshot(0).collector.accounting_excess_tokens == 0


def test_tokens_that_no_message_told_of_are_dropped_as_lost_in_the_phase_they_belong_to():
    made, who = connected()
    request = tokens(np.random.default_rng(0), FEATURES, handle=1, total=20, prompt_tokens=8, unseen_share=0)
    first, last = (
        step_batch([Piece(request, 0, 5)], FEATURES, opened=[request.opened()]),
        step_batch([Piece(request, 18, 20)], FEATURES, closed=[request.closed()]),
    )
    feed(made, who, [first, last])
    lost = made.lookup.snapshot(0).engines[0].tokens[TokenState.DROPPED, Reason.LOST]
    assert {PHASES[p]: int(lost[p]) for p in Phase} == {"prompt": 3, "output": 10}


def test_more_tokens_than_the_engine_counted_are_an_error_and_never_a_negative_loss():
    made, who = connected()
    request = tokens(np.random.default_rng(0), FEATURES, handle=1, total=20, prompt_tokens=8)
    closed = dataclasses.replace(request.closed(), total_tokens=15)
    feed(made, who, [step_batch([Piece(request, 0, 20)], FEATURES, opened=[request.opened()], closed=[closed])])
    assert made.lookup.snapshot(0).collector.accounting_excess_tokens == 5
    assert sum(state_totals(made).values()) == 20


def test_a_request_that_began_before_this_collector_is_not_reconciled():
    """A restarted collector cannot know what the one before it had counted."""
    made, who = connected()
    request = tokens(np.random.default_rng(0), FEATURES, handle=1, total=20, prompt_tokens=8)
    feed(made, who, [step_batch([Piece(request, 10, 20)], FEATURES, closed=[request.closed()])], first=77)
    assert sum(state_totals(made).values()) == 10
    (view,) = views_of(made, request.request_id)
    assert not view.opening_seen and view.outcome == "finished"


def test_a_request_whose_only_message_is_its_end_is_counted():
    made, who = connected()
    request = tokens(np.random.default_rng(0), FEATURES, handle=1, total=20, prompt_tokens=8)
    feed(made, who, [step_batch([], FEATURES, closed=[request.closed()])])
    assert made.lookup.snapshot(0).engines[0].requests[Outcome.FINISHED] == 1


def test_a_request_says_how_long_it_took_once_it_ended_and_only_where_its_beginning_was_seen():
    made, who = connected()
    seen, late, *_ = some_requests(2)
    made.ingest.observe(who, received(1, step_batch([], FEATURES, opened=[seen.opened()])), 1000.0)
    (view,) = views_of(made, seen.request_id)
    assert view.duration_seconds is None
    made.ingest.observe(who, received(2, step_batch([Piece(late, 0, 2)], FEATURES)), 1001.0)
    ends = step_batch([], FEATURES, closed=[seen.closed(), late.closed()])
    made.ingest.observe(who, received(3, ends), 1012.5)
    assert [view.duration_seconds for view in views_of(made, seen.request_id)] == [12.5]
    assert [view.duration_seconds for view in views_of(made, late.request_id)] == [None]


# -- sequence numbers


def test_a_batch_that_comes_again_changes_nothing_but_the_duplicate_count():
    made, who = connected()
    batches = Schedule.one_step(some_requests(1)).batches(FEATURES)
    feed(made, who, batches)
    before = made.lookup.snapshot(0)
    made.ingest.goodbye(who, 1001.0)
    assert made.ingest.hello(who, 1002.0) == len(batches)
    feed(made, who, batches)
    after = made.lookup.snapshot(0)
    assert after.collector.duplicates == len(batches)
    np.testing.assert_array_equal(after.engines[0].tokens, before.engines[0].tokens)
    assert after.engines[0].requests == before.engines[0].requests


def test_a_heartbeat_that_does_not_know_the_widths_is_taken():
    """An idle or unarmed engine still says that it is there."""
    made, who = connected()
    request = some_requests(1)[0]
    made.ingest.observe(who, received(1, StepBatch(step=0, time_unix_nano=0)), 1005.0)
    made.ingest.observe(who, received(2, StepBatch(step=0, time_unix_nano=0, opened=(request.opened(),))), 1005.0)
    snapshot = made.lookup.snapshot(0)
    assert snapshot.replicas[0].last_seen_seconds == 1005.0 and snapshot.engines[0].open_requests == 1


def test_a_gap_in_the_sequence_is_counted_but_not_one_before_the_first_message_seen():
    made, who = connected()
    batch = step_batch([], FEATURES)
    for sequence in (10, 11, 15):
        made.ingest.observe(who, received(sequence, batch), 1000.0)
    assert made.lookup.snapshot(0).collector.lost_sequences == 3


def test_each_boot_has_its_own_sequence():
    made, first = connected()
    second = hello(boot_id="1" * 32)
    batch = step_batch([], FEATURES)
    made.ingest.observe(first, received(5, batch), 1000.0)
    assert made.ingest.hello(second, 1001.0) == 0
    made.ingest.observe(second, received(1, batch), 1001.0)
    made.ingest.observe(first, received(5, batch), 1002.0)
    assert made.lookup.snapshot(0).collector.duplicates == 1


# -- refusals


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"watchlist_sha256": "cd" * 32}, "watchlist_mismatch"),
        ({"watchlist_sha256": ""}, "watchlist_mismatch"),
        ({"replica": ""}, "replica_name"),
        ({"replica": "x" * 254}, "replica_name"),
        ({"replica": "a\nb"}, "replica_name"),
        ({"model_name": "m\ud800"}, "replica_name"),
        ({"engine": "0" * 65}, "replica_name"),
        ({"not_armed_text": "x" * 513}, "replica_name"),
    ],
)
def test_a_hello_that_cannot_be_served_is_refused_by_reason_and_leaves_no_trace(changes, reason):
    made = core()
    with pytest.raises(StreamRefused) as refused:
        made.ingest.hello(hello(**changes), 1000.0)
    assert refused.value.reason == reason and refused.value.instead
    snapshot = made.lookup.snapshot(0)
    assert not snapshot.replicas and not snapshot.models and not snapshot.engines


def test_an_engine_that_could_not_arm_is_accepted_and_shown_with_its_reason():
    made = core()
    made.ingest.hello(hello(armed=False, watchlist_sha256="cd" * 32, not_armed_reason="watchlist_width"), 1000.0)
    (replica,) = made.lookup.snapshot(0).replicas
    assert not replica.armed and replica.not_armed_reason == "watchlist_width" and replica.connected


def test_a_malformed_batch_changes_nothing_and_may_be_sent_again_whole():
    made, who = connected()
    request = some_requests(2)[0]
    good = Schedule.one_step([request]).batches(FEATURES)[0]
    with pytest.raises(StreamRefused, match="dense scores"):
        made.ingest.observe(who, ReceivedBatch(1, dataclasses.replace(good, dense_RP=good.dense_RP[:-1]), b""), 1000.0)
    assert sum(state_totals(made).values()) == 0 and made.lookup.snapshot(0).collector.messages == 0
    made.ingest.observe(who, received(1, good), 1000.0)
    assert sum(state_totals(made).values()) == request.total


def test_a_batch_without_a_hello_is_refused():
    with pytest.raises(StreamRefused) as refused:
        core().ingest.observe(hello(), received(1, step_batch([], FEATURES)), 1000.0)
    assert refused.value.reason == "unknown_boot"


def test_one_boot_cannot_change_its_model_midway():
    made, _ = connected()
    with pytest.raises(StreamRefused) as refused:
        made.ingest.hello(hello(model_name="other"), 1001.0)
    assert refused.value.reason == "boot_changed"


def test_replicas_and_models_are_bounded():
    made = core(replicas=2, models=1)
    made.ingest.hello(hello(replica="a"), 0.0)
    with pytest.raises(StreamRefused) as refused:
        made.ingest.hello(hello(replica="b", model_name="other"), 0.0)
    assert refused.value.reason == "too_many_models"
    made.ingest.hello(hello(replica="b"), 0.0)
    with pytest.raises(StreamRefused) as refused:
        made.ingest.hello(hello(replica="c"), 0.0)
    assert refused.value.reason == "too_many_replicas"


def test_made_up_refusal_reasons_do_not_become_endless_series():
    made = core()
    for i in range(100):
        made.ingest.refused(f"reason_{i}")
    refused = made.lookup.snapshot(0).collector.streams_refused
    assert len(refused) <= 65 and sum(refused.values()) == 100


def test_a_bound_of_zero_is_refused():
    with pytest.raises(ConfigRefused):
        Bounds(open_requests=0)


# -- ends that no engine announced


def open_one(made: Core, who: Hello, now: float = 1000.0) -> Tokens:
    request = tokens(np.random.default_rng(0), FEATURES, handle=1, total=20, prompt_tokens=8)
    feed(made, who, [step_batch([Piece(request, 0, 10)], FEATURES, opened=[request.opened()])], now=now)
    assert made.lookup.snapshot(0).engines[0].open_requests == 1
    return request


def test_a_new_boot_ends_the_requests_of_the_one_before_as_lost():
    made, who = connected()
    request = open_one(made, who)
    made.ingest.hello(hello(boot_id="1" * 32), 1001.0)
    engine = made.lookup.snapshot(0).engines[0]
    assert engine.requests[Outcome.LOST] == 1 and engine.open_requests == 0
    assert views_of(made, request.request_id)[0].outcome == "lost"


@pytest.mark.parametrize(("silence", "lost"), [(599.0, 0), (601.0, 1)])
def test_a_stream_that_stays_away_ends_its_requests_after_ten_minutes(silence, lost):
    made, who = connected()
    open_one(made, who)
    made.ingest.goodbye(who, 1000.0)
    made.ingest.tick(1000.0 + silence)
    assert made.lookup.snapshot(0).engines[0].requests[Outcome.LOST] == lost


def test_a_stream_that_comes_back_in_time_goes_on_with_its_requests():
    made, who = connected()
    request = open_one(made, who)
    made.ingest.goodbye(who, 1000.0)
    made.ingest.hello(who, 1500.0)
    made.ingest.tick(1700.0)
    rest = step_batch([Piece(request, 10, 20)], FEATURES, closed=[request.closed()])
    made.ingest.observe(who, received(2, rest), 1700.0)
    engine = made.lookup.snapshot(0).engines[0]
    assert engine.requests == {Outcome.FINISHED: 1, Outcome.ABORTED: 0, Outcome.LOST: 0}


def test_a_request_that_its_engine_forgot_is_closed_after_an_hour():
    made, who = connected()
    open_one(made, who)
    made.ingest.observe(who, received(2, step_batch([], FEATURES)), 4000.0)
    made.ingest.tick(4599.0)
    assert made.lookup.snapshot(0).engines[0].open_requests == 1
    made.ingest.tick(4601.0)
    assert made.lookup.snapshot(0).engines[0].requests[Outcome.LOST] == 1


def test_a_replica_that_was_replaced_leaves_the_health_series_but_not_the_totals():
    made, who = connected()
    open_one(made, who)
    made.ingest.goodbye(who, 1000.0)
    made.ingest.tick(1000.0 + 3601.0)
    snapshot = made.lookup.snapshot(0)
    assert not snapshot.replicas and snapshot.engines[0].tokens.sum() == 10


# -- bounds


def test_the_request_that_was_quiet_longest_gives_up_its_slot_and_its_tokens_stay_counted():
    made, who = connected(open_requests=3)
    requests = some_requests(5, count=5)
    for i, request in enumerate(requests):
        batch = step_batch([Piece(request, 0, 1)], FEATURES, opened=[request.opened()])
        made.ingest.observe(who, received(i + 1, batch), 1000.0 + 60 * i)
    snapshot = made.lookup.snapshot(0)
    assert snapshot.collector.requests_evicted == 2 and snapshot.engines[0].open_requests == 3
    assert not made.lookup.find(requests[0].request_id) and made.lookup.find(requests[4].request_id)
    assert sum(state_totals(made).values()) == 5


def test_requests_beyond_the_slots_are_counted_without_driving_out_those_that_run():
    made, who = connected(open_requests=2)
    requests = some_requests(6, count=5)
    feed(made, who, Schedule.one_step(requests).batches(FEATURES))
    assert sum(state_totals(made).values()) == sum(r.total for r in requests)
    assert made.lookup.snapshot(0).collector.requests_evicted == 3
    for request in requests[:2]:
        (view,) = views_of(made, request.request_id)
        assert sum(view.tokens.values()) == request.total
    assert not any(views_of(made, request.request_id) for request in requests[2:])
    assert made.lookup.snapshot(0).engines[0].requests[Outcome.FINISHED] == 5


def test_closed_summaries_are_bounded_and_those_with_an_exceedance_stay_longer():
    made, who = connected(closed_requests=3, flagged_requests=1)
    quiet = np.zeros((5, len(FEATURES)), np.float32)
    loud = quiet.copy()
    loud[2, 0] = 7.0
    norm, scored = np.ones((5, 1), np.float32), np.ones(5, int)
    requests = [Tokens(i, 2, loud if i in (1, 2) else quiet, scored, norm) for i in range(1, 9)]
    for i, request in enumerate(requests):
        feed(made, who, Schedule.one_step([request]).batches(FEATURES), first=i + 1)
    held = [r.handle for r in requests if views_of(made, r.request_id)]
    assert held == [2, 6, 7, 8]
    assert made.lookup.snapshot(0).collector.summaries_evicted == 4


def test_a_summary_keeps_the_most_abnormal_features_and_says_how_many_it_left_out():
    made, who = connected(summary_features=1)
    request = tokens(np.random.default_rng(3), FEATURES, handle=1, total=50, prompt_tokens=20, fire_rate=0.9)
    feed(made, who, Schedule.one_step([request]).batches(FEATURES))
    (view,) = views_of(made, request.request_id)
    assert len(view.features) == 1 and view.features_left_out == 3
    assert view.exceeded_features >= 1 and view.features[0].exceeded


def test_events_are_bounded_and_the_evicted_ones_counted():
    made, who = connected(exceedances=4)
    requests = some_requests(7, count=20)
    feed(made, who, Schedule.one_step(requests).batches(FEATURES))
    snapshot = made.lookup.snapshot(0)
    total = int(snapshot.models[0].exceedances_F.sum())
    assert total > 4 and len(made.lookup.exceedances(100)) == 4
    assert snapshot.collector.exceedances_evicted == total - 4


# -- exceedances


def one_loud_request(values: list[float], prompt_tokens: int = 2) -> Tokens:
    act = np.zeros((len(values), len(FEATURES)), np.float32)
    act[:, 0] = values
    return Tokens(9, prompt_tokens, act, np.ones(len(values), int), np.ones((len(values), 1), np.float32))


def test_one_exceedance_per_request_and_feature_at_the_first_crossing_with_a_peak_that_follows():
    made, who = connected()
    request = one_loud_request([0, 1, 0, 3.5, 0, 9, 4, 0])
    made.ingest.observe(
        who, received(1, step_batch([Piece(request, 0, 5)], FEATURES, opened=[request.opened()])), 1000.0
    )
    (event,) = made.lookup.exceedances(10)
    assert (event.position, event.value, event.limit, event.peak) == (3, 3.5, 3.0, 3.5)
    assert (event.feature, event.severity, event.phase) == ("jailbreak", Severity.CRITICAL, "output")
    assert event.request_id == request.request_id and event.response_id == "chatcmpl-9"
    made.ingest.observe(who, received(2, step_batch([Piece(request, 5, 8)], FEATURES)), 1001.0)
    assert made.lookup.exceedances(10)[0].peak == 9.0
    made.ingest.observe(who, received(3, step_batch([], FEATURES, closed=[request.closed()])), 1002.0)
    (event,) = made.lookup.exceedances(10)
    assert event.peak == 9.0 and event.value == 3.5
    assert made.lookup.snapshot(0).models[0].exceedances_F.tolist() == [1, 0, 0, 0]


def test_a_value_on_the_limit_does_not_exceed_it():
    made, who = connected()
    feed(made, who, Schedule.one_step([one_loud_request([0, 3.0])]).batches(FEATURES))
    assert not made.lookup.exceedances(10)


def test_the_exemplar_is_the_latest_exceedance_with_its_trace():
    made, who = connected()
    request = one_loud_request([0, 5])
    opened = dataclasses.replace(request.opened(), traceparent="00-" + "ab" * 16 + "-" + "cd" * 8 + "-01")
    feed(made, who, [step_batch([Piece(request, 0, 2)], FEATURES, opened=[opened])], now=1234.0)
    exemplar = made.lookup.snapshot(0).models[0].latest[0]
    assert exemplar == dataclasses.replace(
        exemplar, request_id=request.request_id, trace_id="ab" * 16, value=5.0, seconds=1234.0
    )


def test_an_id_of_any_length_is_kept_as_its_digest_and_found_by_itself():
    made, who = connected()
    request = one_loud_request([0, 5])
    request.request_id = "x" * 5000
    feed(made, who, Schedule.one_step([request]).batches(FEATURES))
    (view,) = views_of(made, request.request_id)
    assert view.request_id == bounded_id(request.request_id) and len(view.request_id) < 80
    assert not views_of(made, request.request_id + "y") and views_of(made, view.request_id) == [view]


# -- statistics


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), longest=st.sampled_from([1, 5, 40]))
def test_the_snapshot_does_not_depend_on_how_the_scheduler_cut_the_steps(seed, longest):
    requests = some_requests(seed)
    for r in requests:
        r.prompt_tokens = min(r.prompt_tokens, r.total)
    seen = []
    for schedule in (
        Schedule.one_step(requests),
        Schedule.random(np.random.default_rng(seed), requests, longest),
    ):
        made, who = connected()
        feed(made, who, schedule.batches(FEATURES))
        seen.append(made.lookup.snapshot(0))
    whole, cut = (s.models[0] for s in seen)
    for name in ("fired_F", "requests_F", "exceedances_F"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name), name)
    np.testing.assert_array_equal(cut.statistic.counts_FB, whole.statistic.counts_FB)
    np.testing.assert_allclose(cut.statistic.sum_F, whole.statistic.sum_F)
    np.testing.assert_array_equal(cut.norm.counts_FB, whole.norm.counts_FB)
    np.testing.assert_array_equal(seen[1].engines[0].tokens, seen[0].engines[0].tokens)


def test_a_request_in_which_a_sparse_feature_never_fired_counts_as_zero_and_an_unscored_one_not_at_all():
    made, who = connected()
    silent, unscored = one_loud_request([0, 0, 0]), one_loud_request([0, 0, 0])
    unscored.handle, unscored.state_T = 10, np.full(3, TokenState.UNSEEN)
    feed(made, who, Schedule.one_step([silent, unscored]).batches(FEATURES))
    statistic = made.lookup.snapshot(0).models[0].statistic
    assert statistic.counts_FB[0].tolist() == [1] + [0] * 10
    assert statistic.counts_FB[3].sum() == 0, "a rolling mean over 4 tokens has no value after 3"


def test_counters_of_the_engine_are_shown_as_they_are():
    made, who = connected()
    made.ingest.observe(
        who, received(1, step_batch([], FEATURES, counters=EngineCounters(steps=7, reconnects=2))), 1000.0
    )
    assert made.lookup.snapshot(0).replicas[0].counters == EngineCounters(steps=7, reconnects=2)


def test_ingest_lag_of_a_clock_that_runs_ahead_counts_as_none():
    made, who = connected()
    made.ingest.observe(who, received(1, step_batch([], FEATURES, time_unix_nano=int(999.5e9))), 1000.0)
    made.ingest.observe(who, received(2, step_batch([], FEATURES, time_unix_nano=int(2000e9))), 1000.0)
    lag = made.lookup.snapshot(0).collector.ingest_lag
    assert sum(lag.counts) == 2 and lag.sum == pytest.approx(0.5)


def test_a_snapshot_does_not_move_when_more_arrives():
    made, who = connected()
    before = made.lookup.snapshot(0)
    feed(made, who, Schedule.one_step(some_requests(8)).batches(FEATURES))
    assert before.engines[0].tokens.sum() == 0 and before.models[0].fired_F.sum() == 0


@pytest.mark.parametrize(
    ("said", "label"),
    [("same", "same"), ("differs", "differs"), ("unknown", "unknown"), ("not_stated", "not_stated"), ("", "unknown")],
)
def test_whether_it_serves_the_watchlists_model_is_a_metric_and_a_line_on_the_page(said, label):
    """Empty: an engine of before that was asked nothing, or one that is not armed."""
    made = Core(watchlist(FEATURES))
    made.ingest.hello(hello(model_match=said, model_text="the values of x are others"), 1000.0)
    snapshot = made.lookup.snapshot(1001.0)
    families = {
        family.metric.name: family for family in Families(made.watchlist).of(snapshot, ProcessFacts(1.0, 2, 3.0))
    }
    shown = families["latentwatch_engine_model_info"]
    assert (shown.labels, list(shown.values)) == ((("pod-0/0", label),), [1])
    page = overview(made.lookup, 1001.0, most_features=1)
    assert (page.engines[0].model_match, page.engines[0].model_text) == (label, "the values of x are others")
    assert ("another model" in page.seen.headline) == (label == "differs")


def test_tokens_of_requests_that_nobody_announced_are_in_their_state_and_make_no_request():
    made, who = connected()
    lost = np.array(
        [
            (UNANNOUNCED, 0, 700, TokenState.DROPPED, Reason.RING_FULL, Phase.PROMPT),
            (UNANNOUNCED, 0, 300, TokenState.DROPPED, Reason.RING_FULL, Phase.OUTPUT),
        ],
        SEGMENT_DTYPE,
    )
    feed(made, who, [StepBatch(step=1, time_unix_nano=1, segments_S=lost)])
    (engine,) = made.lookup.snapshot(0).engines
    assert engine.tokens[TokenState.DROPPED, Reason.RING_FULL].tolist()[Phase.PROMPT :] == [700, 300]
    assert made.lookup.snapshot(0).collector.open_requests == 0
