"""The chart's PrometheusRules and dashboards are what dashboards/ holds, and Prometheus' own tool takes them."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml
from helm_python import chart as helm_chart
from latentwatch.export.dashboards import Links, linked

from tests.support import chart
from tests.support.engines import ROOT
from tests.support.programs import program

RULES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "dashboards" / "rules").glob("*.yaml")}


def rendered(**over: object) -> dict[str, chart.Object]:
    found = chart.objects(chart.least(prometheusRule={"enabled": True, **over}))
    return {
        one["metadata"]["name"].removeprefix(f"{chart.RELEASE}-latentwatch-"): one["spec"]
        for one in chart.of_kind(found, "PrometheusRule")
    }


def test_the_rules_are_those_of_the_repository():
    assert rendered() == RULES


def test_promtool_accepts_what_is_rendered(tmp_path: Path):
    for name, spec in rendered(runbookUrl="https://wiki.example.org/latentwatch", disabled=["Watchdog"]).items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    files = [str(path) for path in tmp_path.iterdir()]
    ran = subprocess.run([program("promtool"), "check", "rules", *files], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("value", "annotation", "here", "there"),
    [
        ("runbookUrl", "runbook_url", "dashboards/runbook.md", "https://wiki.example.org/latentwatch"),
        ("grafanaUrl", "dashboard_url", "/d/", "https://grafana.example.org/d/"),
    ],
)
def test_an_address_changes_every_link_of_its_kind_and_nothing_else(value, annotation, here, there):
    changed = rendered(**{value: there.removesuffix("/d/")})
    for name, spec in changed.items():
        for rule in alerts(spec):
            link = rule["annotations"].get(annotation)
            if link is not None:
                assert link.startswith(there)
                rule["annotations"][annotation] = here + link.removeprefix(there)
        assert spec == RULES[name]


def test_the_page_and_the_objective_are_those_of_the_verb_that_writes_the_rules():
    """A chart's template and the package's own code, over every rule."""
    links = Links(page="https://page.example.org", unseen_by_design=0.8)
    texts = {path.stem: path.read_text() for path in (ROOT / "dashboards" / "rules").glob("*.yaml")}
    there = {name: yaml.safe_load(linked(text, links)) for name, text in texts.items()}
    assert rendered(pageUrl=links.page, unseenByDesign=0.8) == there
    assert there != RULES


def test_a_disabled_alert_is_left_out_and_no_other():
    left = [rule["alert"] for spec in rendered(disabled=["Watchdog"]).values() for rule in alerts(spec)]
    assert left == [rule["alert"] for spec in RULES.values() for rule in alerts(spec) if rule["alert"] != "Watchdog"]


def alerts(spec: chart.Object) -> list[chart.Object]:
    return [rule for group in spec["groups"] for rule in group["rules"] if "alert" in rule]


def test_the_dashboards_are_those_of_the_repository():
    """Below the 256 KiB that `kubectl apply` can hold in an annotation."""
    files = {f"latentwatch-{path.name}": path.read_text() for path in (ROOT / "dashboards" / "grafana").glob("*.json")}
    found = chart.objects(chart.least(dashboards={"enabled": True}))
    maps = [one for one in chart.of_kind(found, "ConfigMap") if one["metadata"]["labels"].get("grafana_dashboard")]
    assert files
    assert {name: json.loads(text) for one in maps for name, text in one["data"].items()} == {
        name: json.loads(text) for name, text in files.items()
    }
    assert max(len(text) for one in maps for text in one["data"].values()) < 200_000


def test_the_packaged_chart_holds_the_files_themselves(tmp_path: Path):
    """In the repository they are links, which nothing outside it could follow."""
    archive = helm_chart.package(chart.HELM, destination=tmp_path)
    with tarfile.open(archive) as packed:
        members = {member.name.removeprefix("latentwatch/"): member for member in packed.getmembers()}
    dashboards = {f"files/dashboards/{path.name}" for path in (ROOT / "dashboards" / "grafana").glob("*.json")}
    assert {f"files/rules/{name}.yaml" for name in RULES} | dashboards <= set(members)
    assert all(member.isfile() for member in members.values())
    assert not [name for name in members if "tests/" in name and not name.startswith("templates/")]
    assert not {"Containerfile", "Containerfile.vllm"} & set(members)
