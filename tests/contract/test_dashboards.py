"""The dashboards: as generated, by the rules of Grafana's linter that matter, and every query answered by live data.

No Grafana is at hand: what is not tested is how it draws.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.health.cause import COVERAGE_GOAL
from latentwatch.collector.service import CollectorSettings, ForwardSettings, Service
from latentwatch.drift.detection import Budget
from latentwatch.errors import ConfigRefused
from latentwatch.export.metrics import METRICS, sample_names
from latentwatch.watchlist import file as watchlist_file

from tests.support.drift import random_baseline
from tests.support.engines import ROOT
from tests.support.live_page import Traffic, toy_watchlist
from tests.support.stack import RULES, ask, eventually, prometheus
from tests.support.streams import hello, received
from tests.support.wire import in_loop

BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "dashboards/grafana").glob("*.json"))}
PANELS = [
    pytest.param(panel, id=f"{name}-{panel['title']}")
    for name, board in BOARDS.items()
    for panel in board["panels"]
    if panel["type"] != "row"
]
QUERIES = [
    pytest.param(name, target["expr"], target["instant"], id=f"{name}-{panel['title']}-{target['refId']}")
    for name, board in BOARDS.items()
    for panel in board["panels"]
    for target in panel.get("targets", [])
]
WATCHED = toy_watchlist(64)
SPARSE = next(feature.id for feature in WATCHED.features if feature.limit and not feature.dense)
"""A dense feature has no firing rate."""
EXPRESSIONS = [query.values[1] for query in QUERIES]


# -- as generated


def test_the_files_are_what_the_generator_writes() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "dashboards/generate.py"), "--check"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_each_board_has_a_file_of_its_own() -> None:
    modules = {path.stem for path in (ROOT / "dashboards/boards").glob("*.py")}
    assert modules - {"__init__", "parts", "queries"} == set(BOARDS)


def test_there_are_four_with_fixed_addresses_that_the_alerts_link_to() -> None:
    assert set(BOARDS) == {"overview", "feature", "requests", "health"}
    uids = {board["uid"] for board in BOARDS.values()}
    assert uids == {f"latentwatch-{name}" for name in BOARDS}
    alerts = (RULES / "alerts.yaml").read_text()
    links = re.findall(r"dashboard_url: '?/d/([\w-]+)(?:\?(\S+))?", alerts)
    assert {uid for uid, _ in links} <= uids and links
    for uid, variables in links:
        board = BOARDS[uid.removeprefix("latentwatch-")]
        known = {variable["name"] for variable in board["templating"]["list"]}
        assert set(re.findall(r"var-(\w+)=", variables)) <= known


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_a_dashboard_fits_into_a_config_map_and_names_no_data_source(board: dict[str, Any]) -> None:
    """Client-side `kubectl apply` keeps a copy in an annotation of at most 256 KiB."""
    assert len(json.dumps(board, indent=1)) < 200_000
    assert board["tags"] == ["latentwatch"] and board["description"] and board["schemaVersion"] >= 39
    sources = re.findall(r'"uid": "(\$\{?\w+\}?|\w+)"', json.dumps(board))
    assert set(sources) <= {"${datasource}"} | {board["uid"]}
    assert board["templating"]["list"][0]["type"] == "datasource"


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_panels_have_ids_of_their_own_and_lie_side_by_side(board: dict[str, Any]) -> None:
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for one, other in combinations((panel["gridPos"] for panel in board["panels"]), 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in board["panels"])


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_grafanas_own_types_know_all_that_a_dashboard_says(board: dict[str, Any]) -> None:
    """A board read into the SDK's types and written again has lost what they do not know, a mistyped option too."""
    register_default_plugins()
    again = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
    known_to_prometheus = {"annotations.list.titleFormat", "annotations.list.step"}
    assert paths(board) - paths(again) <= known_to_prometheus


def paths(value: Any, at: str = "") -> set[str]:
    """Every path to a value, without the places in lists."""
    if isinstance(value, list):
        return set().union(*(paths(one, at) for one in value))
    if isinstance(value, dict):
        return set().union(*(paths(one, f"{at}.{name}".lstrip(".")) for name, one in value.items()))
    return {at}


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_it_shows_and_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith((".", "?"))
    assert panel["fieldConfig"]["defaults"]["unit"]
    letters = [target["refId"] for target in panel["targets"]]
    assert all(letters) and len(set(letters)) == len(letters)
    assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_rates_follow_the_zoom_and_every_selector_the_variables(expression: str) -> None:
    assert set(re.findall(r"\[([^\]]+)\]", expression)) <= {"$__rate_interval", "$__range"}
    for selector in re.findall(r"(?<![\w:])(?:latentwatch|process)_\w+\{([^}]*)\}", expression):
        assert 'job=~"$job"' in selector and 'instance=~"$instance"' in selector
    for selector in re.findall(r"(?:model|feature):\w+:\w+\{([^}]*)\}", expression):
        assert 'model_name=~"$model_name"' in selector


def test_no_query_asks_for_a_metric_that_nobody_exports() -> None:
    rules = [
        rule for path in RULES.glob("*.yaml") for g in yaml.safe_load(path.read_text())["groups"] for rule in g["rules"]
    ]
    known = sample_names() | {rule["record"] for rule in rules if "record" in rule} | {"up", "ALERTS"}
    text = " ".join([*EXPRESSIONS, *(a["expr"] for board in BOARDS.values() for a in board["annotations"]["list"])])
    asked = set(re.findall(r"(?:(?:model|feature):\w+:\w+|(?<![\w:])(?:latentwatch|process)_\w+|\bup\b|ALERTS)", text))
    assert asked <= known, sorted(asked - known)


def test_every_metric_has_a_place_on_a_dashboard() -> None:
    text = " ".join(EXPRESSIONS)
    assert not [metric.name for metric in METRICS if not re.search(rf"\b{metric.name}(_bucket)?\b", text)]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ('latentwatch_tokns_total{job=~"$job"}', "metric_unknown"),
        ("sum(latentwatch_tokns_total)", "metric_unknown"),
        ('model:latentwatch_coverage:ratio_rate7d{model_name="m"}', "metric_unknown"),
        ('rate(latentwatch_tokens_total{job=~"$job",replica="r"}[5m])', "label_unknown"),
    ],
)
def test_no_board_is_written_with_a_metric_or_label_that_nobody_exports(
    monkeypatch: pytest.MonkeyPatch, expression: str, reason: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "dashboards"))
    checked = importlib.import_module("boards.queries").checked
    with pytest.raises(ConfigRefused) as refused:
        checked(expression)
    assert refused.value.reason == reason and expression in str(refused.value)


def test_the_page_the_alerts_and_the_error_budget_have_one_objective() -> None:
    budget = f"{1 - COVERAGE_GOAL:.6g}"
    alerts = (RULES / "alerts.yaml").read_text()
    assert set(re.findall(r"model:latentwatch_coverage:\w+ < 1 - [\d.]+ \* ([\d.]+)", alerts)) == {budget}
    assert any(expression.endswith(f"/ {budget}") for expression in EXPRESSIONS)


# -- on live data


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Prometheus that has scraped a collector under load, through an incident, for some seconds."""
    folder = tmp_path_factory.mktemp("live")
    watched = watchlist_file.write(WATCHED, folder / "toy.safetensors")
    baseline = dataclasses.replace(
        random_baseline(WATCHED.features, sha256=watched.sha256), created_seconds=time.time() - 86_400
    )
    settings = CollectorSettings(
        folder / "toy.safetensors",
        (f"unix://{folder}/c.sock",),
        "127.0.0.1:0",
        state=folder / "state",
        drift=DriftSettings(baseline, Budget(window_seconds=1.0)),
        forward=ForwardSettings(f"unix://{folder}/g.sock", "pod-0"),
    )
    service = Service(settings)
    gateway = Service(CollectorSettings(folder / "toy.safetensors", (f"unix://{folder}/g.sock",), "127.0.0.1:0"))
    who = hello(model_name="llama", watchlist_sha256=watched.sha256)
    traffic = Traffic(watched, running=6)
    traffic.incident, traffic.cached_share = True, 0.3
    ended = threading.Event()

    async def greet() -> None:
        await gateway.start()
        await service.start()
        service.core.ingest.hello(who, time.time())

    async def step(sequence: int, batch: Any) -> None:
        service.core.ingest.observe(who, received(sequence, batch), time.time())

    def feed() -> None:
        for sequence, batch in enumerate(traffic.steps(), start=1):
            in_loop(step(sequence, batch))
            if ended.wait(0.02):
                return

    in_loop(greet())
    thread = threading.Thread(target=feed)
    thread.start()
    with prometheus(
        folder, {"latentwatch": [made.http_url.removeprefix("http://") for made in (service, gateway)]}
    ) as url:
        firing = 'ALERTS{alertname="LatentwatchCriticalExceedance",alertstate="firing"}'
        eventually(lambda: ask(url, "query", query=firing)["result"])
        yield url
    ended.set()
    thread.join()
    in_loop(service.stop())
    in_loop(gateway.stop())


def answered(ask_again: Callable[[], object], what: str) -> None:
    """Fails with `what` where there is no answer for a minute."""
    deadline = time.monotonic() + 60
    while not ask_again():
        assert time.monotonic() < deadline, f"no answer to {what}"
        time.sleep(0.2)


def substituted(text: str) -> str:
    """Grafana's macros and variables, as with everything chosen."""
    values = {
        "$__rate_interval": "10s",
        "$__range": "60s",
        "$job": "latentwatch",
        "$instance": ".*",
        "$model_name": ".*",
        "$feature": SPARSE,
    }
    for name, value in values.items():
        text = text.replace(name, value)
    assert "$" not in text, text
    return text


@pytest.mark.e2e
@pytest.mark.parametrize(("board", "expression", "instant"), QUERIES)
def test_every_query_has_an_answer_on_live_data(live: str, board: str, expression: str, instant: bool) -> None:
    asked = substituted(expression)
    # Rates want two scrapes of a series, drift an end of a window, and a busy machine serves both late.
    answered(lambda: ask(live, "query", query=asked)["result"], asked)
    if not instant:
        now = time.time()
        assert ask(live, "query_range", query=asked, start=now - 30, end=now, step=1)["result"], asked


@pytest.mark.e2e
@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_every_variable_has_values_and_every_annotation_an_answer(live: str, board: dict[str, Any]) -> None:
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
            match = {"match[]": substituted(metric)}
            answered(lambda label=label, match=match: ask(live, f"label/{label}/values", **match), variable["name"])
    for annotation in board["annotations"]["list"]:
        asked = substituted(annotation["expr"])
        answered(lambda asked=asked: ask(live, "query", query=asked)["result"], annotation["name"])


@pytest.mark.e2e
def test_exemplars_of_the_exceedance_panels_carry_request_ids(live: str) -> None:
    now = time.time()
    found = ask(live, "query_exemplars", query="latentwatch_exceedances_total", start=now - 300, end=now)
    assert any(exemplar["labels"].get("request_id") for series in found for exemplar in series["exemplars"])
