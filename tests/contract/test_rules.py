"""The rules, the runbook and the sample Alertmanager configuration say one thing, and Prometheus' own tools agree."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from latentwatch.collector.metrics_families import REFUSALS
from latentwatch.export.metrics import METRICS, sample_names
from latentwatch.names import BY_DESIGN, Reason

from tests.support.programs import program
from tests.support.stack import alertmanager

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
RULE_FILES = sorted((DASHBOARDS / "rules").glob("*.yaml"))
TEST_FILES = sorted((DASHBOARDS / "rules" / "tests").glob("*.yaml"))
RUNBOOK = (DASHBOARDS / "runbook.md").read_text()
RULES = [rule for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]


def alert_id(rule: dict[str, object]) -> str:
    return f"{rule['alert']}-{rule['labels']['severity']}"


def test_promtool_accepts_every_rule_file() -> None:
    ran = subprocess.run([program("promtool"), "check", "rules", *map(str, RULE_FILES)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_rules_are_silent_before_and_say_the_exact_text_after(path: Path) -> None:
    ran = subprocess.run([program("promtool"), "test", "rules", str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_is_tested_both_silent_and_firing() -> None:
    """Watchdog has no silent state."""
    cases = [
        case
        for path in TEST_FILES
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    fires = {(c["alertname"], a["exp_labels"]["severity"]) for c in cases for a in c["exp_alerts"]}
    silent = {c["alertname"] for c in cases if not c["exp_alerts"]}
    assert fires == {(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS}
    assert silent | {"Watchdog"} == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", ALERTS, ids=alert_id)
def test_every_alert_tells_a_person_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "none")
    needed = {"summary", "description", "runbook_url", "dashboard_url"}
    links = {"page_url", "request_url", "also"} if "Exceedance" in str(rule["alert"]) else {"page_url"}
    assert needed <= set(rule["annotations"]) <= needed | links
    assert rule["annotations"]["runbook_url"] == f"dashboards/runbook.md#{str(rule['alert']).lower()}"


@pytest.mark.parametrize("name", sorted({rule["alert"] for rule in ALERTS}))
def test_every_alert_has_a_runbook_entry_with_meaning_impact_and_first_steps(name: str) -> None:
    match = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", RUNBOOK, re.DOTALL | re.MULTILINE)
    assert match, f"runbook.md has no heading '## {name}'"
    for part in ("**Meaning.**", "**Impact.**", "**First five minutes.**"):
        assert part in match[1], f"the entry of {name} lacks {part}"


def test_the_runbook_has_no_entry_for_an_alert_that_does_not_exist() -> None:
    named = set(re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE))
    assert named == {rule["alert"] for rule in ALERTS}


def test_the_runbook_links_only_to_its_own_headings() -> None:
    headings = re.findall(r"^#+ (.+)$", RUNBOOK, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK)) <= anchors


def test_every_metric_in_the_rules_and_the_runbook_is_one_that_the_product_exports() -> None:
    text = "\n".join(rule["expr"] for rule in RULES) + RUNBOOK
    used = set(re.findall(r"(?<![\w:])latentwatch_\w+", text))
    assert used, "the rules name no metric"
    assert used <= sample_names(), f"not exported: {sorted(used - sample_names())}"


def test_the_rules_match_on_labels_that_the_metrics_have() -> None:
    """A misspelt label matches nothing, and an alert on it is silent for ever."""
    labels = {sample: set(metric.labels) for metric in METRICS for sample in metric.samples}
    for name, matchers in re.findall(r"(?<![\w:])(latentwatch_\w+)\{([^}]*)\}", "\n".join(r["expr"] for r in RULES)):
        assert set(re.findall(r"(\w+)=", matchers)) <= labels[name], f"{name}{{{matchers}}}"


def test_the_runbook_explains_every_reason_for_which_tokens_go_unwatched() -> None:
    for reason in Reason:
        if reason is not Reason.NONE:
            assert re.search(rf"(unseen|dropped): {reason.name.lower()} \|", RUNBOOK), (
                f"no row for {reason.name.lower()}"
            )


def test_the_runbook_explains_every_reason_for_which_a_stream_is_refused() -> None:
    (entry,) = re.findall(r"^## LatentwatchStreamRefused\n(.*?)^## ", RUNBOOK, re.DOTALL | re.MULTILINE)
    explained = set(re.findall(r"\w+", " ".join(re.findall(r"^\| ([\w, ]+) \|", entry, re.MULTILINE))))
    assert set(REFUSALS) - {"watchlist_mismatch", "superseded"} <= explained


def test_recording_rules_are_named_level_metric_operation() -> None:
    for rule in RULES:
        if "record" in rule:
            assert re.fullmatch(
                r"(model|feature|instance|instance_feature):latentwatch_\w+:[a-z0-9_]+", rule["record"]
            ), rule["record"]


def test_the_objective_of_coverage_leaves_out_what_is_unseen_by_design_and_nothing_else() -> None:
    names = sorted(reason.name.lower() for reason in BY_DESIGN)
    (pattern,) = {
        found
        for rule in RULES
        if str(rule.get("record", "")).startswith("model:latentwatch_coverage")
        for found in re.findall(r'reason!="([^"]*)"', rule["expr"])
    }
    assert pattern.split("|") == names


def test_the_recorded_night_went_as_it_should() -> None:
    """`make bench-night`: one incident one page, one traffic change one notification, a rollout none."""
    path = Path(__file__).parents[1] / "bench" / "results" / "night.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    assert len(rows) >= 5 or not path.exists()
    assert [row["line"] for row in rows if not row["ok"]] == []


def test_amtool_accepts_the_sample_configuration() -> None:
    ran = subprocess.run(
        [program("amtool"), "check-config", str(DASHBOARDS / "alertmanager.yml")], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_inhibition_is_bound_to_the_thing_that_broke() -> None:
    """Without `equal`, one dead collector silences every model."""
    for rule in yaml.safe_load((DASHBOARDS / "alertmanager.yml").read_text())["inhibit_rules"]:
        assert {"cluster", "namespace"} < set(rule["equal"])
        sources, targets = " ".join(rule["source_matchers"]), " ".join(rule["target_matchers"])
        assert "CriticalExceedance" not in targets, (
            "a critical exceedance that arrives is real, whatever else is broken"
        )
        if "Exceedance" in targets:
            assert "CriticalExceedance" in sources, "only the page about the same model says what the ticket would"


def test_a_real_alertmanager_inhibits_only_on_the_model_that_broke(tmp_path: Path) -> None:
    config = yaml.safe_load((DASHBOARDS / "alertmanager.yml").read_text()) | {"templates": []}
    with alertmanager(tmp_path, config) as served:
        url = f"{served}/api/v2/alerts"
        posted = [
            {"alertname": "LatentwatchCoverageLow", "severity": "critical", "model_name": "a"},
            {"alertname": "LatentwatchCoverageLow", "severity": "warning", "model_name": "a"},
            {"alertname": "LatentwatchCoverageLow", "severity": "warning", "model_name": "b"},
            {"alertname": "LatentwatchTokensDropped", "severity": "warning", "model_name": "a", "reason": "lost"},
            {"alertname": "LatentwatchCollectorDown", "severity": "critical", "job": "latentwatch"},
            {"alertname": "LatentwatchReplicaSilent", "severity": "warning", "replica": "pod-0/0"},
            {"alertname": "LatentwatchCriticalExceedance", "severity": "critical", "model_name": "a", "feature": "f.1"},
            {"alertname": "LatentwatchWarningExceedance", "severity": "warning", "model_name": "a", "feature": "f.2"},
            {"alertname": "LatentwatchWarningExceedance", "severity": "warning", "model_name": "b", "feature": "f.2"},
            {"alertname": "LatentwatchDrift", "severity": "critical", "model_name": "a", "cause": "model"},
            {"alertname": "LatentwatchDrift", "severity": "critical", "model_name": "a", "cause": "traffic"},
            {"alertname": "LatentwatchDrift", "severity": "warning", "model_name": "b", "cause": "traffic"},
        ]
        post(url, [{"labels": labels} for labels in posted])
        suppressed = eventually_suppressed(url, count=4)
    assert suppressed == {
        ("LatentwatchCoverageLow", "a", "warning"),
        ("LatentwatchTokensDropped", "a", "warning"),
        ("LatentwatchWarningExceedance", "a", "warning"),
        ("LatentwatchDrift", "a", "critical"),
    }


def post(url: str, body: object) -> None:
    """POST, until the server that was just started answers."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for attempt in range(100):
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            if attempt == 99:
                raise
            time.sleep(0.1)


def eventually_suppressed(url: str, *, count: int) -> set[tuple[str, str, str]]:
    """(alertname, model, severity) of the suppressed alerts, once there are `count` or after 10 seconds."""
    for _ in range(100):
        with urllib.request.urlopen(url, timeout=5) as answer:
            alerts = json.load(answer)
        suppressed = [alert["labels"] for alert in alerts if alert["status"]["state"] == "suppressed"]
        if len(suppressed) >= count:
            break
        time.sleep(0.1)
    return {(a["alertname"], a.get("model_name", ""), a["severity"]) for a in suppressed}
