"""Every alert's life: what a burst makes of it, what a steady stream, and how often it begins when its collector dies.

An alert that begins twice is two notifications of one cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from tests.support.alert_lives import (
    BEGIN,
    BURST,
    STEADY,
    WHERE,
    Case,
    Kill,
    Trouble,
    Values,
    clock,
    counter,
    gauge,
    input_series,
    once,
    promtool,
    stuck_clock,
)
from tests.support.stack import RULES

SCORED = 'latentwatch_tokens_total{model_name="m",engine="0",state="scored",reason="none",phase="prompt"}'
FEATURE = 'model_name="m",feature="f.1"'
INFO = 'latentwatch_feature_info{feature="f.1",label="One",severity="critical",hook_point="resid_post.1",kind="sae"}'
LIMITS = {
    f'latentwatch_drift_limit_log10_evalue{{model_name="m",kind="{kind}"}}': gauge(7.9, 7.9)
    for kind in ("rate", "shape")
}


def tokens(state: str, reason: str) -> str:
    return f'latentwatch_tokens_total{{model_name="m",engine="0",state="{state}",reason="{reason}",phase="prompt"}}'


def exceedance(severity: str, *, steady: bool = False) -> dict[str, Values]:
    name = f'latentwatch_exceedances_total{{{FEATURE},severity="{severity}"}}'
    return {name: counter(0.1) if steady else once(3), INFO: gauge(1, 1)}


def drift(severity: str) -> dict[str, Values]:
    return LIMITS | {
        f'latentwatch_drift_log10_evalue{{{FEATURE},severity="{severity}",kind="rate"}}': gauge(9.5, 1),
        f'latentwatch_drift_log10_evalue{{{FEATURE},severity="{severity}",kind="shape"}}': gauge(8.5, 1),
        INFO: gauge(1, 1),
    }


def health_cause(cause: str, alert: str) -> str:
    return f'latentwatch_health_cause{{cause="{cause}",level="problem",alert="{alert}"}}'


CASES = [
    Case("LatentwatchCriticalExceedance", "critical", exceedance("critical", steady=True), once_is_enough=True),
    Case("LatentwatchWarningExceedance", "warning", exceedance("warning", steady=True), once_is_enough=True),
    Case("LatentwatchDrift", "critical", drift("critical")),
    Case("LatentwatchDrift", "warning", drift("warning")),
    Case(
        "LatentwatchDriftCommon",
        "warning",
        {
            'latentwatch_drift_common_log10_evalue{model_name="m"}': gauge(9, 1),
            'latentwatch_drift_limit_log10_evalue{model_name="m",kind="common"}': gauge(7.9, 7.9),
        },
    ),
    Case(
        "LatentwatchBaselineStale",
        "warning",
        {'latentwatch_drift_armed{model_name="m",reason="baseline_mismatch"}': gauge(0, 1)},
    ),
    Case(
        "LatentwatchBaselineOld",
        "warning",
        {'latentwatch_drift_baseline_created_timestamp_seconds{model_name="m"}': clock(lambda at: at - 40 * 86400)},
    ),
    Case("LatentwatchCoverageLow", "critical", {SCORED: counter(5, 100), tokens("dropped", "ring_full"): counter(5)}),
    # Hardly more than the month's budget, and for long.
    Case("LatentwatchCoverageLow", "warning", {SCORED: counter(980, 1000), tokens("dropped", "lost"): counter(20)}),
    Case(
        "LatentwatchUnseenByDesign", "warning", {SCORED: counter(1, 1), tokens("unseen", "kv_connector"): counter(900)}
    ),
    Case("LatentwatchCollectorDown", "critical", {}, {f"up{{{WHERE}}}": gauge(0, 1)}),
    Case(
        "LatentwatchReplicaSilent",
        "warning",
        {'latentwatch_replica_last_seen_timestamp_seconds{replica="p/0"}': stuck_clock()},
    ),
    Case(
        "LatentwatchEngineNotArmed",
        "warning",
        {'latentwatch_engine_armed{replica="p/0",reason="watchlist_width"}': gauge(0, 1)},
    ),
    Case(
        "LatentwatchModelDiffers",
        "warning",
        {'latentwatch_engine_model_info{replica="p/0",match="differs"}': gauge(1, 0)},
    ),
    Case(
        "LatentwatchWatchlistMismatch",
        "critical",
        {'latentwatch_streams_refused_total{reason="watchlist_mismatch"}': counter(0.05)},
    ),
    Case(
        "LatentwatchStreamRefused",
        "warning",
        {'latentwatch_streams_refused_total{reason="protocol_version"}': counter(0.05)},
    ),
    Case(
        "LatentwatchModelUnwatched",
        "warning",
        {SCORED: counter(0, 100)},
        {
            f'vllm:{kind}_tokens_total{{cluster="k",namespace="serving",model_name="m"}}': counter(100, 100)
            for kind in ("prompt", "generation")
        },
    ),
    Case(
        "LatentwatchTokensDropped", "warning", {SCORED: counter(9000, 9000), tokens("dropped", "ring_full"): counter(1)}
    ),
    Case(
        "LatentwatchRequestsUntracked",
        "warning",
        {"latentwatch_requests_evicted_total": counter(0.2)},
        once_is_enough=True,
    ),
    Case(
        "LatentwatchIngestLagHigh",
        "warning",
        {
            'latentwatch_ingest_lag_seconds_bucket{le="5.0"}': counter(0, 10),
            'latentwatch_ingest_lag_seconds_bucket{le="10.0"}': counter(10, 10),
            'latentwatch_ingest_lag_seconds_bucket{le="+Inf"}': counter(10, 10),
        },
    ),
    Case(
        "LatentwatchAccountingBroken",
        "warning",
        {"latentwatch_accounting_excess_tokens_total": counter(0.2)},
        once_is_enough=True,
    ),
    Case(
        "LatentwatchStateNotSaved",
        "warning",
        {"latentwatch_state_durable": gauge(0, 1), "latentwatch_state_write_failures_total": counter(0.5)},
    ),
    Case(
        "LatentwatchEvidenceLost",
        "warning",
        {'latentwatch_evidence_dropped_total{kind="request",reason="queue_full"}': counter(0.2)},
        once_is_enough=True,
    ),
    Case("LatentwatchFilesSetAside", "warning", {"latentwatch_evidence_damaged_files": gauge(2, 0)}),
    Case("LatentwatchNoEngine", "warning", {health_cause("no_engine", "LatentwatchNoEngine"): gauge(1, 0)}),
    Case("LatentwatchHealth", "warning", {health_cause("ingest_late", "LatentwatchHealth"): gauge(1, 0)}),
]
KILLED = [case for case in CASES if case.alert not in ("LatentwatchCollectorDown", "LatentwatchModelUnwatched")]
ALERTS = [
    rule
    for path in sorted(RULES.glob("*.yaml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule and rule["alert"] != "Watchdog"
]


def case_id(case: Case) -> str:
    return f"{case.alert}-{case.severity}"


def test_every_alert_has_a_life_here():
    assert sorted(map(case_id, CASES)) == sorted(f"{rule['alert']}-{rule['labels']['severity']}" for rule in ALERTS)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_burst_is_an_alert_only_where_once_is_enough_and_a_steady_stream_is_one(case: Case, tmp_path: Path):
    found = promtool(
        tmp_path,
        case,
        [
            ("a burst", input_series(case, Trouble(BEGIN, BURST)), int(case.once_is_enough)),
            ("a steady stream", input_series(case, Trouble(BEGIN, STEADY)), 1),
        ],
    )
    assert not found, found


def kills(points: Iterable[float], *, long: float) -> list[Kill]:
    """For half a minute and for long, the long ones without their state as well."""
    short = [Kill(BEGIN + at, 30) for at in points]
    return [*short, *(Kill(kill.begin, long, stateless) for kill in short for stateless in (False, True))]


@pytest.mark.parametrize("case", KILLED, ids=case_id)
def test_a_collector_that_is_killed_at_any_point_of_an_alerts_life_is_no_second_alert(case: Case, tmp_path: Path):
    """Killed before it fires, while it fires and after the trouble is over, for 30 seconds and for 10 minutes."""
    # Long enough for the longest `for`, which begins anew where the collector is away for longer than it looks back.
    lasts = STEADY + 1200
    trouble, points = Trouble(BEGIN, lasts), (60, 360, lasts - 30, lasts + 360)
    tests = [(str(kill), input_series(case, trouble, kill), 1) for kill in kills(points, long=600)]
    found = promtool(tmp_path, case, tests)
    assert not found, found


@pytest.mark.parametrize("severity", ["critical", "warning"])
def test_one_exceedance_and_a_kill_at_any_point_is_one_alert(severity: str, tmp_path: Path):
    """Three requests at once and never again; the collector dies at any step of the alert's life, for long or short."""
    name = {"critical": "LatentwatchCriticalExceedance", "warning": "LatentwatchWarningExceedance"}[severity]
    case = Case(name, severity, exceedance(severity), once_is_enough=True)
    trouble, points = Trouble(BEGIN, STEADY), range(30, 1620, 240)
    tests = [(str(kill), input_series(case, trouble, kill), 1) for kill in kills(points, long=900)]
    found = promtool(tmp_path, case, tests)
    assert not found, found


def test_an_event_that_has_to_go_on_is_counted_over_less_than_its_for_or_says_why():
    """The window of a counter that is longer than `for` meets it by one burst."""
    text = (RULES / "alerts.yaml").read_text()
    minutes = {"m": 1, "h": 60, "d": 1440}
    for rule in ALERTS:
        windows = re.findall(r"(?:increase|rate)\([^[]*\[(\d+)([mhd])\]", rule["expr"])
        windows += re.findall(r":(?:ratio_rate|count)(\d+)([mhd])", rule["expr"])
        longest = max((int(number) * minutes[unit] for number, unit in windows), default=0)
        lasting = int(rule.get("for", "0m")[:-1])
        said = _comment_before(text, rule)
        if not longest:
            continue
        if lasting:
            assert longest < lasting or "Longer than its `for`" in said, rule["alert"]
        else:
            assert re.search(r"is enough|no `for`", said), rule["alert"]


def _comment_before(text: str, rule: dict[str, object]) -> str:
    blocks = re.findall(r"((?:^ *#.*\n)*)^ *- alert: (\w+)\n((?:.*\n)*?)(?= *(?:#|- |\n))", text, re.MULTILINE)
    severity = rule["labels"]["severity"]  # type: ignore[index]
    return next(comment for comment, name, body in blocks if name == rule["alert"] and f"severity: {severity}" in body)


def test_no_alert_takes_a_label_from_a_series_beside_the_one_that_is_wrong():
    """A join that brings labels makes another alert of the same cause, once the other series is gone."""
    for path in RULES.glob("*.yaml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                assert not re.search(r"group_(left|right)\s*\(\s*\w", rule["expr"]), rule
                assert "feature_info" not in rule["expr"], rule
