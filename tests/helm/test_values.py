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
    ({"image": {"digest": "sha256:abc"}}, "at '/image/digest'"),
    ({"image": {"pullPolicy": "always"}}, "at '/image/pullPolicy'"),
    ({"imagePullSecrets": ["registry"]}, "at '/imagePullSecrets/0': got string, want object"),
    ({"watchlist": {"secret": {"name": "x"}}}, "at '/watchlist'"),
    ({"watchlist": {"configMap": {"key": "../w"}}}, "at '/watchlist/configMap/key'"),
    ({"httpToken": {"key": "token"}}, "at '/httpToken': properties 'name' required, if 'key' exists"),
    ({"tls": {"issuer": {"kind": "Vault"}}}, "at '/tls/issuer/kind'"),
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
    ({"baseline": {"configMap": {"name": "b"}}}, "at '/baseline/configMap': missing property 'key'"),
    ({"canaryKey": {"name": "canary"}}, "at '/canaryKey'"),
    ({"evidence": {"days": 0}}, "at '/evidence/days': exclusiveMinimum: got 0, want 0"),
    ({"evidence": {"keep": "some"}}, "at '/evidence/keep': value must be one of 'exceeded', 'all'"),
    ({"injection": {"method": "webhook"}}, "at '/injection/method'"),
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


COMMON = {
    "no image": ({"image": {"repository": ""}}, "image.repository is empty: no image is published. Build one"),
    "a tag in the name": (
        {"image": {"repository": "registry.example:5000/latentwatch:0.1.0"}},
        'image.repository is "registry.example:5000/latentwatch:0.1.0": its tag goes into image.tag',
    ),
    "latest": ({"image": {"tag": "latest"}}, "image.tag is latest: a rollback has to be one. Give a version"),
    "latest of vLLM": ({"vllm": {"image": {"tag": "latest"}}}, "vllm.image.tag is latest"),
    "two watchlists": (
        {"watchlist": {"image": {"reference": "r/w@sha256:0", "path": "w.safetensors"}}},
        "watchlist has configMap, image: give one of them, and null for the others",
    ),
    "no model": ({"vllm": {"enabled": True}}, "vllm.enabled without vllm.model: which model is it to serve?"),
    "TLS without a certificate": (
        {"tls": {"enabled": True}},
        "tls.enabled without a certificate: give tls.existingSecret",
    ),
    "certificates for engines, no TLS": (
        {"tls": {"engineCertificates": True, "issuer": {"name": "ca"}}},
        "tls.engineCertificates without tls.enabled",
    ),
    "certificates for engines, no issuer": (
        {"tls": {"enabled": True, "existingSecret": "t", "engineCertificates": True}},
        "tls.engineCertificates without tls.issuer.name",
    ),
    "TLS of a sidecar": (
        {"mode": "sidecar", "tls": {"enabled": True, "existingSecret": "t"}},
        "tls.enabled with mode: sidecar: nothing crosses the network",
    ),
    "a token of a sidecar": (
        {"mode": "sidecar", "engineToken": {"name": "t", "key": "t"}},
        "engineToken with mode: sidecar: nothing crosses the network",
    ),
    "a claim of a sidecar": (
        {"mode": "sidecar", "persistence": {"enabled": True}},
        "persistence.enabled with mode: sidecar: one claim cannot serve the sidecars of several pods",
    ),
    "a name and no certificate": ({"httpTls": {"serverName": "a.b"}}, "httpTls.serverName without httpTls.secretName"),
    "an Ingress without a name": ({"ingress": {"enabled": True}}, "ingress.host: give the name under which people ask"),
    "an Ingress for a sidecar": (
        {"mode": "sidecar", "ingress": {"enabled": True, "host": "a.b"}},
        "ingress.enabled: a sidecar has no Service of its own",
    ),
    "a route without a gateway": (
        {"httpRoute": {"enabled": True, "hostnames": ["a.b"]}},
        "httpRoute: give the gateway",
    ),
}
"""Mistakes of which people are told in words, by what they did."""


@pytest.mark.parametrize("mistake", COMMON)
def test_a_common_mistake_is_refused_in_words(mistake):
    over, says = COMMON[mistake]
    with pytest.raises(HelmRenderError, match=re.escape(says)):
        chart.objects(chart.least(**over))


def test_several_mistakes_are_said_at_once():
    with pytest.raises(HelmRenderError) as refused:
        chart.objects(chart.least(image={"repository": ""}, vllm={"enabled": True}))
    assert "image.repository is empty" in str(refused.value) and "which model is it to serve" in str(refused.value)


def test_the_defaults_ask_for_the_two_values_that_only_the_operator_knows():
    with pytest.raises(HelmRenderError) as refused:
        chart.objects({})
    assert str(refused.value).count("\n- ") == 2
    assert "image.repository is empty" in str(refused.value) and "watchlist is empty" in str(refused.value)


@pytest.mark.parametrize(
    "host", ["https://lw.example.org", "lw.example.org:8443", "lw.example.org/x", "LW.example.org"]
)
def test_a_host_is_a_name_and_nothing_more(host):
    for over in ({"ingress": {"enabled": True, "host": host}}, {"httpRoute": {"hostnames": [host]}}):
        with pytest.raises(HelmValuesError, match="host"):
            chart.objects(chart.least(**over))


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
    with pytest.raises(HelmRenderError, match=r"give engineToken or tls, or say collector\.insecure: true"):
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
