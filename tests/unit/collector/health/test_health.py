"""Every cause of the health table, walked through the four places that it feeds: /healthz?verbose, the live page, the
doctor and the alert rules."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from latentwatch.cli import doctor
from latentwatch.collector.health.recent_counts import RECENT_SECONDS, RecentCounts
from latentwatch.collector.health.table import CAUSES
from latentwatch.collector.health.watch import HealthWatch
from latentwatch.collector.http.app import make_app
from latentwatch.names import TokenState
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from tests.support.health import ALSO, BROKEN, NOW, Asked, LookupOf, Shown, core, well
from tests.support.programs import program

RULES = Path(__file__).parents[4] / "dashboards/rules"
RULES_READ = [
    rule
    for path in ("recording.yaml", "alerts.yaml")
    for group in yaml.safe_load((RULES / path).read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES_READ if "alert" in rule}
QUERIED = set(re.findall(r"(?<![\w:])latentwatch_\w+", " ".join(map(str, RULES_READ))))
OUTSIDE = {
    "LatentwatchCriticalExceedance": "what is watched, not the monitor",
    "LatentwatchWarningExceedance": "what is watched, not the monitor",
    "LatentwatchDrift": "what is watched, not the monitor",
    "LatentwatchDriftCommon": "what is watched, not the monitor",
    "LatentwatchUnseenByDesign": "a choice of the deployment, with an objective of its own",
    "LatentwatchCollectorDown": "a collector that is down says nothing",
    "LatentwatchModelUnwatched": "only vLLM's own metrics tell",
    "Watchdog": "of the alerting path itself",
}
"""Alerts that are on no cause, and why."""
ALWAYS = {"gate_missing"}
SILENT = ("baseline_none", "state_in_memory")


class Collector:
    """Shows first one thing and then another, at the same moment."""

    def __init__(self) -> None:
        self._core = core()
        self.well = well(self._core)
        self._lookup = LookupOf(self._core)
        self._shown = self.well
        self._lookup.shown = self.well.snapshot
        health = HealthWatch(self._lookup, lambda: self._shown.process)
        health.record(NOW)

        async def forget(_: object) -> bool:
            return True

        app = make_app(
            self._lookup, clock=lambda: NOW, process=lambda: self._shown.process, forget=forget, health=health
        )
        self.client = TestClient(app)

    def show(self, shown: Shown, *, unseen: bool = False) -> None:
        self._shown, self._lookup.shown = shown, shown.snapshot
        windows = self._core.lookup.recent(NOW)[1]
        by_state = windows.tokens_by_state.copy()
        by_state[-1, TokenState.DROPPED] += 5000 * unseen
        self._lookup.recent = lambda _: (NOW, dataclasses.replace(windows, tokens_by_state=by_state))


@pytest.fixture(scope="module")
def collector() -> Collector:
    return Collector()


@pytest.fixture
def made(collector: Collector) -> Collector:
    collector.show(collector.well)
    return collector


def broken(made: Collector, name: str) -> str:
    """Have it be so, and nothing else; words that say who and how much."""
    change, words = BROKEN[name]
    made.show(change(made.well), unseen=change is BROKEN["coverage_low"][0])
    return words


def test_every_cause_has_a_case_and_an_alert_or_a_reason_for_none():
    assert BROKEN.keys() == CAUSES.keys()
    for cause in CAUSES.values():
        assert bool(cause.alert) != bool(cause.why_no_alert) and (not cause.alert or cause.alert in ALERTS)
        assert cause.headline[0].isupper() and cause.instead[-1] in ".?" and not cause.headline.endswith(".")


def test_every_alert_is_on_a_cause_or_is_said_not_to_be():
    assert {cause.alert for cause in CAUSES.values() if cause.alert} | OUTSIDE.keys() == ALERTS.keys()


def test_a_collector_that_is_well_says_so_everywhere(made):
    answer = made.client.get("/healthz?verbose").json()
    assert {cause["name"] for cause in answer["causes"]} == ALWAYS and answer["checked"] == sorted(CAUSES)
    assert made.client.get("/v1/overview").json()["seen"]["headline"] == "Everything is seen"
    findings = [*doctor._collector(Asked(made.client), "")]
    assert doctor.exit_code(findings, strict=True) == 0
    assert any(finding.check == "health" and finding.status == "ok" for finding in findings)


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_is_in_healthz_with_who_and_how_much_and_nothing_else_is(made, name):
    words = broken(made, name)
    found = {cause["name"]: cause for cause in made.client.get("/healthz?verbose").json()["causes"]}
    assert found.keys() - ALSO.get(name, set()) == {name} | (ALWAYS if name != "no_engine" else set())
    assert words in found[name]["found"] and found[name]["instead"]


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_is_told_to_the_page_which_does_not_say_that_all_is_well(made, name):
    words = broken(made, name)
    view = made.client.get("/v1/overview").json()
    assert any(cause["name"] == name and words in cause["found"] for cause in view["causes"])
    wrong = CAUSES[name].level in ("problem", "attention")
    assert (view["seen"]["level"] != "ok") == wrong


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_is_a_finding_of_the_doctor_that_fails_as_its_level_says(made, name):
    words = broken(made, name)
    findings = [*doctor.check(Asked(made.client), None, None, None, {})]
    (finding,) = [finding for finding in findings if finding.check == name]
    assert words in finding.found and finding.part == CAUSES[name].part
    expected = {"problem": "failed", "attention": "warning", "unknown": "unknown", "notice": "skipped"}
    assert finding.status == expected[CAUSES[name].level]
    if finding.status == "failed":
        failed = {doctor.EXIT_CODES[one.part] for one in findings if one.status == "failed"}
        assert doctor.exit_code(findings) == min(failed)
    if name == "no_engine":
        (coverage,) = [finding for finding in findings if finding.check == "coverage"]
        assert coverage.status == "skipped" and "%" not in coverage.found


def test_each_cause_fires_its_alert_by_what_is_on_metrics_and_a_collector_that_is_well_fires_none(made, tmp_path):
    """With Prometheus' own rules engine, on the series that this collector shows."""
    before = _samples(made.client.get("/metrics").text)
    tests = [_promtool("well", before, before, dict.fromkeys(ALERTS.keys() - {"Watchdog"}, 0))]
    for name, cause in CAUSES.items():
        if cause.alert:
            broken(made, name)
            after = _samples(made.client.get("/metrics").text)
            tests.append(_promtool(name, before, after, {cause.alert: 1}, MINUTE.get(name, 99)))
    path = tmp_path / "walk.yaml"
    files = [str(RULES / "recording.yaml"), str(RULES / "alerts.yaml")]
    path.write_text(json.dumps({"rule_files": files, "evaluation_interval": "1m", "tests": tests}))
    ran = subprocess.run([program("promtool"), "test", "rules", str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def _samples(text: str) -> dict[str, tuple[str, float]]:
    """Kind and value by series, as a scrape stores them; those that some rule asks for."""
    found = {}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if name not in QUERIED:
                continue
            said = {**labels, "job": "latentwatch", "instance": "c0:9464"}
            series = name + "{" + ",".join(f'{k}="{v}"' for k, v in said.items()) + "}"
            kind = "counter" if family.type == "counter" or name.endswith(("_bucket", "_count", "_sum")) else "gauge"
            found[series] = ("time" if "timestamp_seconds" in name else kind, value)
    return found


MINUTE = {"engine_silent": 108}
"""At which the alert fires, where it is not 99. The scene's engine was last heard in minute 95."""


def _promtool(name: str, before: dict, after: dict, firing: dict[str, int], minute: int = 99) -> dict[str, object]:
    """A unit test of promtool: 40 minutes as before, then as after; these alerts fire at this minute.

    Counts go on rising as they rose, and times stay where they stopped.
    """
    series = [{"series": 'up{job="latentwatch",instance="c0:9464"}', "values": "1x130"}]
    for one, (kind, value) in after.items():
        _, was = before.get(one, (kind, 0.0 if kind == "counter" else value))
        first, later = f"{was}x39", f"{value}x80"
        if kind == "counter":
            later = f"{value}+{max(0.0, value - was)}x80"
        elif kind == "time":
            first = f"{was}+60x39"
            later = f"{was + 2400}+60x80" if value == was else f"{value}x80"
        series.append({"series": one, "values": f"{first if one in before else '_x39'} {later}"})
    asked = [
        {
            "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) > bool 0 or vector(0)',
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": "{}", "value": fires}],
        }
        for alert, fires in firing.items()
    ]
    return {"name": name, "interval": "1m", "input_series": series, "promql_expr_test": asked}


def test_a_count_is_of_now_for_ten_minutes_and_what_was_before_the_first_record_is_not():
    recent, key = RecentCounts(), ("refused", "boot_changed")
    recent.record({key: 40.0}, 0.0)
    recent.record({key: 43.0}, 15.0)
    assert recent.rises({key: 44.0}, 20.0) == {key: 4.0}
    recent.record({key: 44.0}, 15.0 + RECENT_SECONDS)
    assert recent.rises({key: 44.0}, 16.0 + RECENT_SECONDS) == {key: 1.0}


def test_a_counter_of_an_engine_that_began_again_counts_from_zero():
    recent, key = RecentCounts(), ("exporter_restarts", "pod-0/0")
    recent.record({key: 5.0}, 0.0)
    assert recent.rises({key: 2.0}, 1.0) == {key: 2.0}
    assert recent.rises({key: 2.0, ("exporter_restarts", "pod-1/0"): 9.0}, 1.0) == {key: 2.0}


def test_a_clock_that_is_set_back_forgets_what_was_lately():
    recent, key = RecentCounts(), ("requests_evicted", "")
    recent.record({key: 0.0}, 1000.0)
    recent.record({key: 5.0}, 1010.0)
    recent.record({key: 5.0}, 10.0)
    assert recent.rises({key: 5.0}, 20.0) == {}
