"""What a server of somebody else's needs, in each form that the release leaves, and how the live page is reached."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.support import chart
from tests.support.chart import strategic_merge

ASKED: dict[str, Any] = {
    "engineToken": {"name": "latentwatch-engines", "key": "token"},
    "tls": {"enabled": True, "existingSecret": "latentwatch-tls"},
    "spool": {"enabled": True, "mib": 2048},
}
SIDECAR = {"mode": "sidecar", "spool": {"enabled": True}}


def forms(**over: Any) -> dict[str, Any]:
    """Each form, parsed, by its file's name."""
    data = chart.the(chart.objects(chart.least(**over)), "ConfigMap", "-vllm-patch")["data"]
    return {name: yaml.safe_load(text) for name, text in data.items()}


def deployment(container: chart.Object, **spec: Any) -> chart.Object:
    labels = {"app": "vllm"}
    pod = {"containers": [container], **spec}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "theirs", "labels": {"latentwatch/watch": "true"}},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }


def expected(over: dict[str, Any]) -> chart.Object:
    pod: chart.Object = forms(**over)["patch.yaml"]["spec"]["template"]
    return pod


@pytest.mark.parametrize("over", [ASKED, SIDECAR], ids=["gateway", "sidecar"])
def test_a_kustomize_component_is_whole_in_one_file_and_makes_what_the_patch_makes(over):
    component = forms(**over)["kustomization.yaml"]
    assert (component["apiVersion"], component["kind"]) == ("kustomize.config.k8s.io/v1alpha1", "Component")
    (entry,) = component["patches"]
    assert entry["target"] == {
        "group": "apps", "version": "v1", "kind": "Deployment", "labelSelector": "latentwatch/watch=true",
    }  # fmt: skip
    patch = yaml.safe_load(entry["patch"])
    # Without these Kustomize takes it for no patch; the name gives way to that of the target.
    assert (patch["apiVersion"], patch["kind"], patch["metadata"]) == ("apps/v1", "Deployment", {"name": "any"})
    assert patch["spec"]["template"] == expected(over)
    made = strategic_merge(deployment({"name": "vllm", "image": "vllm"}), {"spec": patch["spec"]})
    assert chart.problems(made) == []


def test_values_of_production_stack_have_what_the_patch_has_in_its_own_keys():
    """Keys of an entry of its modelSpec: each is one that its template reads."""
    spec, pod = forms(**ASKED)["production-stack.yaml"], expected(ASKED)
    assert set(spec) == {"podLabels", "initContainer", "env", "extraVolumeMounts", "extraVolumes"}
    init, server = pod["spec"]["initContainers"][0], pod["spec"]["containers"][0]
    assert spec["podLabels"] == pod["metadata"]["labels"]
    assert spec["env"] == server["env"] and spec["extraVolumeMounts"] == server["volumeMounts"]
    assert spec["extraVolumes"] == pod["spec"]["volumes"]
    assert set(spec["initContainer"]) <= {"name", "image", "command", "args", "env", "resources", "extraVolumeMounts"}
    assert spec["initContainer"]["extraVolumeMounts"] == init["volumeMounts"]
    assert {key: init[key] for key in ("name", "image", "command", "resources")} == {
        key: spec["initContainer"][key] for key in ("name", "image", "command", "resources")
    }


def test_where_production_stack_has_no_room_for_it_there_is_no_such_form():
    """One init container: the plugin's. A sidecar would be a second."""
    assert "production-stack.yaml" not in forms(**SIDECAR)
    assert "production-stack.yaml" not in forms(injection={"method": "image"})


@pytest.mark.parametrize("over", [ASKED, SIDECAR], ids=["gateway", "sidecar"])
def test_llm_d_and_kserve_get_the_same_container_volumes_and_init_containers(over):
    made, pod = forms(**over), expected(over)["spec"]
    (server,) = pod["containers"]
    decode = made["llm-d.yaml"]["decode"]
    assert (decode["initContainers"], decode["volumes"]) == (pod["initContainers"], pod["volumes"])
    assert decode["containers"] == [server]
    predictor = made["kserve.yaml"]["spec"]["predictor"]
    assert (predictor["initContainers"], predictor["volumes"]) == (pod["initContainers"], pod["volumes"])
    assert predictor["model"] == {"env": server["env"], "volumeMounts": server["volumeMounts"]}
    assert predictor["labels"] == expected(over)["metadata"]["labels"]


def test_a_spool_is_a_folder_of_the_servers_pod_and_of_no_other():
    found = chart.objects(chart.least(spool={"enabled": True, "mib": 2048, "volume": {"hostPath": {"path": "/s"}}}))
    collector = chart.the(found, "Deployment", "-collector")
    assert "spool" not in yaml.safe_dump(collector)
    patch = yaml.safe_load(chart.the(found, "ConfigMap", "-vllm-patch")["data"]["patch.yaml"])["spec"]["template"][
        "spec"
    ]
    (server,) = patch["containers"]
    set_ = {one["name"]: one.get("value") for one in server["env"]}
    assert (set_["LATENTWATCH_SPOOL"], set_["LATENTWATCH_SPOOL_MIB"]) == ("/var/spool/latentwatch", "2048")
    assert {"name": "latentwatch-spool", "hostPath": {"path": "/s"}} in patch["volumes"]


@pytest.mark.parametrize("https", [False, True])
def test_outside_names_lead_to_the_collector_which_answers_to_them(https):
    over = {
        "httpTls": {"secretName": "w" if https else ""},
        "ingress": {"enabled": True, "host": "lw.example.org", "tlsSecret": "t", "className": "nginx"},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["lw2.example.org"]},
    }
    found = chart.objects(chart.least(**over))
    assert [problem for one in found for problem in chart.problems(one)] == []
    service = chart.the(found, "Service", "-collector")
    ports = {port["name"]: port for port in service["spec"]["ports"]}
    assert ports["lw-http"]["appProtocol"] == ("https" if https else "http")
    (rule,) = chart.the(found, "Ingress")["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert (backend["name"], backend["port"]["name"]) == (service["metadata"]["name"], "lw-http")
    (reference,) = chart.the(found, "HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    assert (reference["name"], reference["port"]) == (service["metadata"]["name"], ports["lw-http"]["port"])
    args = chart.the(found, "Deployment", "-collector")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"--http-host=lw.example.org", "--http-host=lw2.example.org"} <= set(args)


@pytest.mark.parametrize("name", ["", "lw.example.org"])
def test_with_https_prometheus_scrapes_over_it_and_probes_ask_over_it(name):
    found = chart.objects(chart.least(httpTls={"secretName": "w", "serverName": name}, monitor={"enabled": True}))
    assert [problem for one in found for problem in chart.problems(one)] == []
    (endpoint,) = chart.the(found, "ServiceMonitor")["spec"]["endpoints"]
    authority = {"serverName": name, "ca": {"secret": {"name": "w", "key": "ca.crt"}}}
    assert (endpoint["scheme"], endpoint["tlsConfig"]) == ("https", authority if name else {"insecureSkipVerify": True})
    (container,) = chart.the(found, "Deployment", "-collector")["spec"]["template"]["spec"]["containers"]
    probes = [probe["httpGet"]["scheme"] for key, probe in container.items() if key.endswith("Probe")]
    assert probes == ["HTTPS"] * 3
    assert {
        "--http-tls-cert=/etc/latentwatch/http-tls/tls.crt",
        "--http-tls-key=/etc/latentwatch/http-tls/tls.key",
    } <= set(container["args"])


HELM_4_ONLY = ("mustToToml", "toYamlPretty", "mustToYaml", "mustFromYaml")
"""Functions of templates that the Helm 3 that goes with our oldest Kubernetes (3.14) has not."""


def test_no_template_needs_a_newer_helm_than_3():
    """The tests render with Helm's library of version 4; that of 3 has the same functions, these aside."""
    about = yaml.safe_load((chart.HELM / "Chart.yaml").read_text())
    assert about["apiVersion"] == "v2", "what both read; v3 is Helm 4's own"
    texts = [path.read_text() for path in (chart.HELM / "templates").rglob("*") if path.is_file()]
    used = {word for text in texts for word in re.findall(r"\b[a-z][A-Za-z]+\b", text)}
    assert "toYaml" in used, "the templates were read"
    assert used.isdisjoint(HELM_4_ONLY)
