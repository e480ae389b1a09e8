"""A wrong value is refused by the schema, in words that name it; every value is described and does something."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helm_python.errors import HelmRenderError, HelmValuesError
from latentwatch import __version__

from tests.support import chart

SCHEMA = json.loads((chart.HELM / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((chart.HELM / "values.yaml").read_text())

WRONG = [
    ({"mod": "gateway"}, "additional properties 'mod' not allowed"),
    ({"mode": "daemonset"}, "at '/mode': value must be one of 'gateway', 'sidecar'"),
    ({"image": {"repository": ""}}, "at '/image/repository'"),
    ({"image": {"repository": "registry.example/latentwatch:0.1.0"}}, "at '/image/repository'"),
    ({"image": {"tag": "latest"}}, "at '/image/tag'"),
    ({"image": {"digest": "sha256:abc"}}, "at '/image/digest'"),
    ({"image": {"pullPolicy": "always"}}, "at '/image/pullPolicy'"),
    ({"imagePullSecrets": ["registry"]}, "at '/imagePullSecrets/0': got string, want object"),
    ({"watchlist": {"secret": {"name": "x"}}}, "at '/watchlist'"),
    (
        {"watchlist": {"image": {"reference": "r/w@sha256:0", "path": "w.safetensors"}}},
        "at '/watchlist': maxProperties: got 2, want 1",
    ),
    ({"watchlist": {"configMap": {"key": "../w"}}}, "at '/watchlist/configMap/key'"),
    ({"httpToken": {"key": "token"}}, "at '/httpToken': properties 'name' required, if 'key' exists"),
    ({"tls": {"enabled": True}}, "at '/tls/issuer/name': minLength: got 0, want 1"),
    ({"tls": {"engineCertificates": True, "issuer": {"name": "ca"}}}, "at '/tls/enabled': value must be true"),
    ({"tls": {"issuer": {"kind": "Vault"}}}, "at '/tls/issuer/kind'"),
    ({"mode": "sidecar", "tls": {"enabled": True, "existingSecret": "t"}}, "at '/tls/enabled': value must be false"),
    ({"mode": "sidecar", "engineToken": {"name": "t", "key": "t"}}, "at '/engineToken': maxProperties: got 2, want 0"),
    ({"runAsUser": 0}, "at '/runAsUser': minimum: got 0, want 1"),
    ({"runAsUser": "10001"}, "at '/runAsUser': got string, want integer"),
    ({"serviceAccount": {"automount": True}}, "at '/serviceAccount': additional properties 'automount' not allowed"),
    ({"collector": {"replicas": 2}}, "at '/collector': additional properties 'replicas' not allowed"),
    ({"collector": {"httpPort": 80}}, "at '/collector/httpPort': minimum"),
    ({"collector": {"bindAddress": "127.0.0.1"}}, "at '/collector/bindAddress'"),
    ({"collector": {"resources": {"limits": {"memory": "1Gib"}}}}, "at '/collector/resources/limits/memory'"),
    ({"collector": {"resources": {"limit": {}}}}, "at '/collector/resources': additional properties 'limit'"),
    ({"collector": {"extraEnv": {"TZ": "UTC"}}}, "at '/collector/extraEnv': got object, want array"),
    ({"collector": {"tolerations": [{"effects": "NoSchedule"}]}}, "at '/collector/tolerations/0'"),
    ({"collector": {"podLabels": {"team": 7}}}, "at '/collector/podLabels/team': got number, want string"),
    ({"mode": "sidecar", "persistence": {"enabled": True}}, "at '/persistence/enabled'"),
    ({"baseline": {"configMap": {"name": "b"}}}, "at '/baseline/configMap': missing property 'key'"),
    ({"canaryKey": {"name": "canary"}}, "at '/canaryKey'"),
    ({"evidence": {"days": 0}}, "at '/evidence/days': exclusiveMinimum: got 0, want 0"),
    ({"evidence": {"keep": "some"}}, "at '/evidence/keep': value must be one of 'exceeded', 'all'"),
    ({"injection": {"method": "webhook"}}, "at '/injection/method'"),
    ({"vllm": {"enabled": True}}, "at '/vllm/model': minLength"),
    ({"vllm": {"replicas": 1.5}}, "at '/vllm/replicas': got number, want integer"),
    ({"vllm": {"huggingFaceToken": {"name": "hf"}}}, "at '/vllm/huggingFaceToken'"),
    ({"vllm": {"strategy": {"type": "Rolling"}}}, "at '/vllm/strategy/type'"),
    ({"monitor": {"interval": "15"}}, "at '/monitor/interval'"),
    ({"monitor": {"job": "vllm"}}, "at '/monitor/job'"),
    (
        {"monitor": {"targetLabels": {"k8s-cluster": "a"}}},
        "at '/monitor/targetLabels': additional properties 'k8s-cluster'",
    ),
    ({"prometheusRule": {"runbookUrl": "wiki"}}, "at '/prometheusRule/runbookUrl'"),
    ({"prometheusRule": {"grafanaUrl": "https://grafana.example.org/"}}, "at '/prometheusRule/grafanaUrl'"),
    ({"networkPolicy": {"httpFrom": [{}]}}, "at '/networkPolicy/httpFrom/0': minProperties"),
    ({"networkPolicy": {"httpFrom": [{"namespace": "x"}]}}, "at '/networkPolicy/httpFrom/0'"),
    ({"podDisruptionBudget": {"vllm": {"maxUnavailable": "some"}}}, "at '/podDisruptionBudget/vllm/maxUnavailable'"),
    ({"nameOverride": "Latent_Watch"}, "at '/nameOverride'"),
]


@pytest.mark.parametrize(
    ("over", "says"), WRONG, ids=lambda value: json.dumps(value) if isinstance(value, dict) else ""
)
def test_a_wrong_value_is_refused_by_name(over, says):
    with pytest.raises(HelmValuesError, match=re.escape(says)):
        chart.objects(chart.least(**over))


def test_the_defaults_ask_for_the_two_values_that_only_the_operator_knows():
    with pytest.raises(HelmValuesError) as refused:
        chart.objects({})
    assert "'/image/repository'" in str(refused.value)
    assert "'/watchlist'" in str(refused.value)


def test_an_alert_that_does_not_exist_cannot_be_disabled():
    with pytest.raises(HelmRenderError, match='there is no alert "LatentwatchCoverage"; there are Latent'):
        chart.objects(chart.least(prometheusRule={"enabled": True, "disabled": ["LatentwatchCoverage"]}))


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for below in node.values():
            yield from nodes(below)
    elif isinstance(node, list):
        for below in node:
            yield from nodes(below)


def test_a_claim_that_is_too_small_for_the_evidence_is_refused():
    with pytest.raises(HelmRenderError, match=r"persistence\.size: 10Gi is too small for evidence\.gib: 10"):
        chart.objects(chart.least(evidence={"enabled": True}, persistence={"enabled": True, "size": "10Gi"}))


def test_a_receiver_that_the_network_policy_shuts_out_is_refused():
    with pytest.raises(HelmRenderError, match=r"otlp\.url: the network policy lets the collector connect to nothing"):
        chart.objects(chart.least(otlp={"url": "http://otel:4317"}))


def test_a_gateway_that_should_forward_is_refused():
    with pytest.raises(HelmRenderError, match=r"forward\.to: a gateway forwards to none"):
        chart.objects(chart.least(forward={"to": "other:4319"}))


def test_a_gateway_that_would_listen_to_anybody_is_refused_until_it_is_said():
    alone = {key: value for key, value in chart.least().items() if key != "engineToken"}
    with pytest.raises(HelmRenderError, match="give engineToken or tls, or say collector.insecure: true"):
        chart.objects(alone)
    said = chart.objects({**alone, "collector": {"insecure": True}})
    (container,) = chart.the(said, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert "--insecure" in container["args"]


def test_every_object_of_the_schema_is_closed():
    """Beside those that Kubernetes itself checks, of which we list no property."""
    closed = [node for node in nodes(SCHEMA) if node.get("type") == "object" and "properties" in node]
    assert len(closed) > 25
    for node in closed:
        assert node["additionalProperties"] is False, sorted(node["properties"])


def leaves(default: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Values that are set one by one, with schema and defaults walked together."""
    properties = schema.get("properties")
    if not default or not properties:
        yield path
        return
    assert default.keys() == properties.keys() - {"global"}, f"{path}: values.yaml and its schema differ"
    for key, below in default.items():
        yield from leaves(below, properties[key], f"{path}.{key}".lstrip("."))


LEAVES = list(leaves(DEFAULTS, SCHEMA))
TEMPLATES = "".join(file.read_text() for file in (chart.HELM / "templates").rglob("*") if file.is_file())


def test_every_value_is_read_by_a_template():
    assert len(LEAVES) > 80
    assert [path for path in LEAVES if not is_read(path)] == []


def is_read(path: str) -> bool:
    """By its name, or with the object that it is in."""
    keys = path.split(".")
    whole = (".Values." + ".".join(keys[:n]) for n in range(len(keys), 0, -1))
    return any(re.search(rf"{re.escape(name)}(?![\w.])", TEMPLATES) for name in whole)


def test_the_chart_is_of_this_version():
    about = yaml.safe_load((chart.HELM / "Chart.yaml").read_text())
    assert about["appVersion"] == __version__


def test_long_names_stay_within_what_kubernetes_takes():
    values = chart.least(vllm={"enabled": True, "model": "m"}, prometheusRule={"enabled": True})
    for release in ("r" * 53, "a.b-" + "c" * 40):
        for one in chart.objects(values, release=release):
            assert len(one["metadata"]["name"]) <= 63
