"""Who may ask a collector of the chart over HTTP, and as whom."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from latentwatch.collector.http.hosts import Hosts
from latentwatch.secrets import MIN_TOKEN_CHARACTERS

from tests.support import chart

SIDECAR = chart.values(chart.HELM / "ci" / "sidecar-vllm-values.yaml")


def arguments(found: list[chart.Object]) -> list[str]:
    """Of the collector, wherever it runs."""
    texts = [argument for container in _containers(found) for argument in container.get("args", [])]
    return [text for text in texts if text.startswith("--http")]


def _containers(found: Any) -> list[dict[str, Any]]:
    if isinstance(found, dict):
        own = [*found.get("containers", []), *found.get("initContainers", [])] if "containers" in found else []
        return [*own, *(one for value in found.values() for one in _containers(value))]
    return [one for value in found for one in _containers(value)] if isinstance(found, list) else []


@pytest.mark.parametrize("chosen", [chart.least(monitor={"enabled": True}), SIDECAR], ids=["gateway", "sidecar"])
def test_by_default_a_token_is_asked_for_that_the_chart_makes_and_gives_to_prometheus(chosen):
    found = chart.objects(chosen)
    secret = chart.the(found, "Secret", "-http")
    assert len(base64.b64decode(secret["data"]["token"])) >= MIN_TOKEN_CHARACTERS
    assert "--http-token-file=/etc/latentwatch/http-token/token" in arguments(found)
    assert secret["metadata"]["name"] in json.dumps(chart.the(found, "Deployment"))
    monitor = next(one for one in found if one["kind"] in ("ServiceMonitor", "PodMonitor"))
    (endpoint,) = monitor["spec"].get("endpoints") or monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": secret["metadata"]["name"], "key": "token"}


def test_two_installations_have_two_tokens():
    made = {chart.the(chart.objects(chart.least()), "Secret", "-http")["data"]["token"] for _ in range(2)}
    assert len(made) == 2


def test_a_token_of_your_own_takes_its_place_and_only_who_asks_for_it_is_open():
    own = chart.objects(chart.least(httpToken={"name": "mine", "key": "t"}))
    assert not chart.of_kind(own, "Secret")
    assert "--http-token-file=/etc/latentwatch/http-token/t" in arguments(own)
    opened = chart.objects(chart.least(httpOpen=True))
    assert not chart.of_kind(opened, "Secret")
    assert not [text for text in arguments(opened) if "token" in text]


def test_the_token_for_evidence_is_no_second_token_of_readers():
    """Who shows it reads anyway, and every reader's token is one more that a browser may hold."""
    evidence = {"enabled": True, "token": {"name": "e", "key": "token"}}
    given = arguments(chart.objects(chart.least(evidence=evidence, httpToken={"name": "h", "key": "token"})))
    assert [text for text in given if "token" in text] == ["--http-token-file=/etc/latentwatch/http-token/token"]


@pytest.mark.parametrize("chosen", [chart.least(), SIDECAR], ids=["gateway", "sidecar"])
def test_every_name_by_which_the_cluster_asks_is_one_of_the_collector(chosen):
    found = chart.objects(chart.merged(chosen, {"collector": {"httpHosts": ["lw.example.org"]}}))
    given = [text.partition("=")[2] for text in arguments(found) if text.startswith("--http-host=")]
    hosts = Hosts(given)
    hosts.bound("0.0.0.0", "0.0.0.0")
    (test,) = (one for one in _containers(found) if one["name"] == "test")
    asked = test["args"][0].removeprefix("http://")
    service = asked.partition(":")[0]
    names = [asked, f"{service}.serving", f"{service}.serving.svc", f"{service}.serving.svc.cluster.local:9464"]
    # What a kubelet, a Prometheus and a port-forward ask.
    names += ["10.0.0.7:9464", "[fd00::7]:9464", "127.0.0.1:9464", "localhost:8080", "lw.example.org"]
    assert [name for name in names if not hosts.is_ours(name)] == []
    assert not hosts.is_ours(f"{service}.attacker.example")
