"""The judge of a run: what passes, and each single fault that fails it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from latentwatch.demo.run.outcome import PAGER, Run
from latentwatch.demo.run.watch import EngineTokens, Sample
from latentwatch.demo.run.webhook import Page
from latentwatch.facts import ExceedanceView

from tests.support.demo_run import BEGAN, a_run, an_exceedance


def broken(run: Run) -> set[str]:
    return {check.name for check in run.checks() if not check.passed}


def settled(run: Run, **states: int) -> Run:
    """The run with another last reading."""
    last = run.samples[-1]
    return replace(run, samples=[*run.samples[:-1], replace(last, states={**last.states, **states})])


def exceeded(run: Run, exceedances: list[ExceedanceView]) -> Run:
    """The run with other exceedances, listed and counted."""
    counts = Counter((e.feature, e.severity) for e in exceedances)
    last = replace(run.samples[-1], exceeded=counts)
    return replace(run, exceedances=exceedances, samples=[*run.samples[:-1], last])


def exceedance(run: Run, *, feared: bool, severity: str = "critical") -> ExceedanceView:
    answer = next(answer for answer in run.answers if answer.prompt.feared is feared)
    return an_exceedance(BEGAN + 20, answer.response_id, "probe.0", "Deceiving", severity=severity)


def test_a_run_as_it_should_be_passes_every_check() -> None:
    run = a_run()
    assert broken(run) == set()
    assert run.passed


def test_one_token_too_few_or_too_many_fails_the_accounting() -> None:
    run = a_run()
    scored = run.settled.states["scored"]
    assert broken(settled(run, scored=scored - 1)) == {"every token accounted for"}
    assert broken(settled(run, scored=scored + 1)) == {"every token accounted for"}


def test_a_dropped_token_fails_even_where_the_sum_holds() -> None:
    run = a_run()
    assert broken(settled(run, scored=run.settled.states["scored"] - 1, dropped=1)) == {"nothing dropped"}


def test_an_engine_that_scored_nothing_fails_even_where_the_sum_holds() -> None:
    run = a_run()
    fed = run.engine.fed
    assert "tokens were scored" in broken(settled(run, scored=0, inherited=0, unseen=fed))


def test_a_critical_exceedance_on_an_ordinary_request_fails_even_within_the_window() -> None:
    run = a_run()
    false_alarm = exceedance(run, feared=False)
    begin, end = run.incident
    assert begin < false_alarm.seconds < end
    run = exceeded(run, [*run.exceedances, false_alarm])
    assert broken(run) == {"no critical exceedance outside"}
    assert run.as_json()["exceedances"]["critical_outside"] == 1


def test_a_warning_on_an_ordinary_request_is_counted_outside_and_passes() -> None:
    run = a_run()
    run = exceeded(run, [*run.exceedances, exceedance(run, feared=False, severity="warning")])
    assert run.passed
    assert run.as_json()["exceedances"]["outside"] == 1


def test_an_incident_that_nobody_saw_fails() -> None:
    run = exceeded(a_run(), [])
    assert {"the incident was seen", "the page arrived"} <= broken(run)


def test_a_page_that_never_came_fails_where_paging_runs_and_not_where_it_is_left_out() -> None:
    assert broken(replace(a_run(), pages=[])) == {"the page arrived"}
    assert replace(a_run(), pages=[], paging="--no-prometheus was given").passed


def test_a_page_about_anything_else_fails() -> None:
    run = a_run()
    other = Page(BEGAN, PAGER, "firing", BEGAN, {"alertname": "LatentwatchCollectorDown"}, {})
    assert broken(replace(run, pages=[other, *run.pages])) == {"no other page"}


def test_seconds_count_from_the_moment_the_client_held_the_first_anomalous_token() -> None:
    run = a_run()
    first = min((run.by_id[e.response_id].token_times[5], e) for e in run.exceedances)[0]
    seen = next(sample.at for sample in run.samples if sample.critical)
    assert run.seconds_to_metrics == pytest.approx(seen - first)
    assert run.seconds_to_page == pytest.approx(run.pages[0].at - first)


def test_an_exceedance_in_the_prompt_counts_from_the_sending_of_its_request() -> None:
    run = a_run()
    early = replace(exceedance(run, feared=True), position=3)
    run = exceeded(run, [early])
    assert run.moments is not None
    assert run.moments.token_at == run.by_id[early.response_id].sent_at


def test_the_figures_have_the_agreed_names_and_are_plain_json() -> None:
    figures = json.loads(json.dumps(a_run().as_json()))
    assert {"engine", "scored", "inherited", "unseen", "dropped"} <= set(figures["tokens"])
    assert {"inside", "outside", "critical_outside"} <= set(figures["exceedances"])
    assert figures["seconds_to_metrics"] > 0
    assert figures["seconds_to_page"] > figures["seconds_to_metrics"]
    assert figures["passed"] is True


def test_a_step_that_was_not_shown_is_null_and_says_why() -> None:
    figures = a_run(paging="--no-prometheus was given").as_json()
    assert figures["seconds_to_page"] is None
    assert figures["paging"] == "--no-prometheus was given"


def test_an_exceedance_that_the_api_does_not_list_fails() -> None:
    run = a_run()
    assert broken(replace(run, exceedances=run.exceedances[1:])) == {"every exceedance listed"}


def test_a_false_alarm_before_the_incident_does_not_count_as_its_detection() -> None:
    run = a_run()
    early = {("probe.0", "critical"): 1}
    samples = [
        replace(s, exceeded=dict(Counter(s.exceeded) + Counter(early))) if s.at > BEGAN + 5 else s for s in run.samples
    ]
    page = replace(run.pages[0], at=BEGAN + 7)
    fooled = replace(run, samples=samples, pages=[page, *run.pages])
    assert fooled.seconds_to_metrics == run.seconds_to_metrics
    assert fooled.seconds_to_page == run.seconds_to_page


def test_a_run_without_any_traffic_is_judged_and_not_an_error() -> None:
    run = replace(
        a_run(), answers=[], exceedances=[], scores={}, samples=[Sample(at=BEGAN)], engine=EngineTokens(0, 0, 0)
    )
    assert not run.passed
    assert run.incident == run.incident_planned
