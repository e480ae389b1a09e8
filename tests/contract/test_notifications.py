"""What a person is told: receivers pass amtool, templates say what the document shows, links come from one setting."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from latentwatch.cli import main
from latentwatch.export.dashboards import Links, linked

from tests.support.engines import ROOT
from tests.support.programs import program

DASHBOARDS = ROOT / "dashboards"
DOCUMENT = (ROOT / "docs" / "alerting.md").read_text()
RECEIVERS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(receivers:.*?)```", DOCUMENT, re.DOTALL)]
PAGE, WIKI = "https://latentwatch.example.org", "https://wiki.example.org/latentwatch"
GRAFANA = "https://grafana.example.org"


def exceeded(feature: str, label: str, requests: int) -> dict[str, object]:
    """An alert as `latentwatch rules` and Prometheus make it."""
    asked = f"model_name=assistant&feature={feature}"
    return {
        "status": "firing",
        "labels": {"alertname": "LatentwatchCriticalExceedance", "severity": "critical", "feature": feature},
        "annotations": {
            "summary": f"assistant: {label} went over its critical limit in {requests} request(s)",
            "description": f"In the last hour {requests} request(s) to model assistant drove feature {feature}, at "
            "resid_post.12 over its critical limit.",
            "request_url": f"{PAGE}/latest-request?{asked}",
            "page_url": f"{PAGE}/#feature={feature}",
            "runbook_url": f"{WIKI}#latentwatchcriticalexceedance",
            "dashboard_url": f"{GRAFANA}/d/latentwatch-feature?var-model_name=assistant&var-feature={feature}",
            "also": "Over warning limits in that hour: f.1041 (17)",
        },
    }


def rendered(tmp_path: Path, data: object) -> str:
    (tmp_path / "data.json").write_text(json.dumps(data))
    text = '{{ template "latentwatch.title" . }}\n{{ template "latentwatch.text" . }}'
    argv = [program("amtool"), "template", "render", f"--template.glob={DASHBOARDS}/alertmanager.tmpl"]
    argv += [f"--template.data={tmp_path}/data.json", f"--template.text={text}"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def incident(status: str = "firing") -> dict[str, object]:
    alerts = [
        exceeded("p.jailbreak", "Complying with a jailbreak", 24) | {"status": status},
        exceeded("p.deceive", "Deceiving the user", 9) | {"status": status},
    ]
    return {
        "receiver": "pager",
        "status": status,
        "alerts": alerts,
        "groupLabels": {"alertname": "LatentwatchCriticalExceedance", "model_name": "assistant"},
        "commonLabels": {"alertname": "LatentwatchCriticalExceedance", "severity": "critical"},
        "commonAnnotations": {"runbook_url": f"{WIKI}#latentwatchcriticalexceedance"},
        "externalURL": "http://alertmanager",
    }


def test_the_document_shows_what_amtool_renders(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```text\n(.*?)```", DOCUMENT, re.DOTALL)
    assert rendered(tmp_path, incident()).strip() == shown.strip()


def test_what_is_over_says_so_with_its_last_count(tmp_path: Path) -> None:
    said = rendered(tmp_path, incident("resolved"))
    assert said.startswith("[over] assistant: Complying with a jailbreak went over its critical limit in 24 request(s)")
    assert "* over: assistant: Deceiving the user went over its critical limit in 9 request(s)" in said


@pytest.mark.parametrize("receivers", RECEIVERS, ids=lambda one: str(sorted(one["receivers"][0])[-1]))
def test_amtool_accepts_every_receiver_of_the_document(receivers: dict[str, object], tmp_path: Path) -> None:
    config = yaml.safe_load((DASHBOARDS / "alertmanager.yml").read_text())
    (receiver,) = receivers["receivers"]  # type: ignore[misc]
    config["receivers"] = [one for one in config["receivers"] if one["name"] != receiver["name"]] + [receiver]
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "alertmanager.tmpl").write_text((DASHBOARDS / "alertmanager.tmpl").read_text())
    argv = [program("amtool"), "check-config", str(tmp_path / "alertmanager.yml")]
    ran = subprocess.run(argv, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_receiver_that_people_use_is_shown() -> None:
    kinds = {kind for one in RECEIVERS for kind in one["receivers"][0]}
    assert {"pagerduty_configs", "slack_configs", "opsgenie_configs"} <= kinds


def test_every_link_is_absolute_once_it_is_said_where_things_are(tmp_path: Path) -> None:
    places = ["--page", PAGE, "--grafana", GRAFANA, "--runbook", WIKI, "--unseen-by-design", "0.8"]
    assert main(["rules", "--out", str(tmp_path / "rules"), *places]) == 0
    files = sorted((tmp_path / "rules").glob("*.yaml"))
    ran = subprocess.run([program("promtool"), "check", "rules", *map(str, files)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rules = [rule for path in files for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    begins = {
        "runbook_url": f"{WIKI}#",
        "dashboard_url": f"{GRAFANA}/d/",
        "page_url": f"{PAGE}/",
        "request_url": f"{PAGE}/",
    }
    links = [
        (name, rule["annotations"][name]) for rule in rules for name in begins if name in rule.get("annotations", {})
    ]
    assert len(links) > 60
    for name, link in links:
        assert link.startswith(begins[name]), link
    assert (f"{PAGE}/#feature={{{{ urlquery $labels.feature }}}}") in [link for _, link in links]
    assert [rule["expr"].count("> 0.8") for rule in rules if rule.get("alert") == "LatentwatchUnseenByDesign"] == [2]


def test_nothing_but_links_changes() -> None:
    text = (DASHBOARDS / "rules" / "alerts.yaml").read_text()
    assert linked(text, Links()) == text


@pytest.mark.parametrize(
    "wrong", [["--page", "latentwatch.example.org"], ["--unseen-by-design", "95"], ["--grafana", "/grafana"]]
)
def test_an_address_that_a_notification_could_not_follow_is_refused(wrong: list[str], tmp_path: Path) -> None:
    assert main(["rules", "--out", str(tmp_path), *wrong]) == 2
    assert not list(tmp_path.iterdir())
