"""Every combination of values gives objects that Kubernetes and the operators take, and that fit each other."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from tests.support import chart
from tests.support.chart import Object

SETS = dict(chart.matrix()) | {path.stem: chart.values(path) for path in chart.CI_SETS}

SERVER = yaml.safe_load("""
apiVersion: apps/v1
kind: Deployment
metadata: {name: mine}
spec:
  selector: {matchLabels: {app: mine}}
  template:
    metadata: {labels: {app: mine}}
    spec:
      initContainers: [{name: fetch, image: fetch}]
      containers:
        - name: sidecar
          image: other
        - name: vllm
          image: vllm/vllm-openai:v0.32.0
          env: [{name: HF_HOME, value: /models}, {name: LATENTWATCH_REPLICA, value: old}]
          volumeMounts: [{name: models, mountPath: /models}]
      volumes: [{name: models, emptyDir: {}}]
""")

SERVER_CONTAINERS = SERVER["spec"]["template"]["spec"]["containers"]
SERVER_INIT = SERVER["spec"]["template"]["spec"]["initContainers"][0]


@dataclass(frozen=True)
class Pod:
    """A pod that would run: one of the chart's, or of somebody's own server with our patch."""

    name: str
    labels: Object
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> set[str]:
        return {port["name"] for container in self.containers for port in container.get("ports", [])}


class Installed:
    """What one set of values gives."""

    def __init__(self, values: Object) -> None:
        self.values = values
        self.sidecar = values.get("mode") == "sidecar"
        self.objects = chart.objects(values)
        self.patch = next(
            (yaml.safe_load(one["data"]["patch.yaml"]) for one in self.of("ConfigMap") if "patch.yaml" in one["data"]),
            None,
        )
        self.server: Object | None = None
        if self.patch:
            mine = yaml.safe_load(yaml.safe_dump(SERVER))
            mine["spec"]["template"]["spec"]["containers"][1]["name"] = values.get("vllm", {}).get(
                "containerName", "vllm"
            )
            self.server = chart.strategic_merge(mine, self.patch)
        deployments = [*self.of("Deployment"), *([self.server] if self.server else [])]
        self.pods = [
            Pod(d["metadata"]["name"], d["spec"]["template"]["metadata"]["labels"], d["spec"]["template"]["spec"])
            for d in deployments
        ] + [Pod(p["metadata"]["name"], p["metadata"]["labels"], p["spec"]) for p in self.of("Pod")]

    def of(self, kind: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] == kind]

    def selected(self, labels: Object) -> list[Pod]:
        return [pod for pod in self.pods if labels.items() <= pod.labels.items()]


@functools.cache
def installed(name: str) -> Installed:
    return Installed(SETS[name])


def streams(container: Object) -> bool:
    """Whether it is a vLLM with the plugin."""
    return any(variable["name"] == "LATENTWATCH_COLLECTOR" for variable in container.get("env", []))


every_set = pytest.mark.parametrize("name", SETS)


@every_set
def test_helm_lint_is_strict_and_finds_nothing(name):
    report = chart.lint(SETS[name])
    assert report["errors"] == []
    assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


@every_set
def test_every_object_is_valid(name):
    """By the newest Kubernetes and by the oldest one that the chart accepts; image volumes are beta from 1.33 on."""
    found = installed(name)
    releases = ["1.33" if "image" in found.values["watchlist"] else chart.OLDEST, chart.NEWEST]
    for one in [*found.objects, *([found.server] if found.server else [])]:
        for kubernetes in releases:
            assert chart.problems(one, kubernetes) == [], f"{one['kind']} {one['metadata']['name']} in {kubernetes}"
        assert list(nulls(one)) == [], "an empty value that Kubernetes would drop without a word"


def nulls(value: Any, at: str = "$") -> Iterator[str]:
    if value is None:
        yield at
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from nulls(below, f"{at}.{key}")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from nulls(below, f"{at}[{index}]")


@every_set
def test_every_object_has_its_own_name_and_the_standard_labels(name):
    found = installed(name).objects
    names = [(one["kind"], one["metadata"]["name"]) for one in found]
    assert len(set(names)) == len(names)
    for one in found:
        assert one["metadata"]["namespace"] == chart.NAMESPACE
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == chart.RELEASE
        assert {"helm.sh/chart", "app.kubernetes.io/name", "app.kubernetes.io/managed-by"} <= set(labels)


@every_set
def test_every_container_of_ours_is_restricted(name):
    """Pod Security Standard "restricted", a read-only root, no service-account token."""
    for pod in installed(name).pods:
        if pod.name != SERVER["metadata"]["name"]:
            assert pod.spec["automountServiceAccountToken"] is False
            assert pod.spec["securityContext"]["runAsNonRoot"] is True
        for container in pod.containers:
            if container in (SERVER_INIT, SERVER_CONTAINERS[0]) or (
                pod.name == SERVER["metadata"]["name"] and streams(container)
            ):
                continue
            security = container["securityContext"]
            assert security["runAsNonRoot"] is True
            assert security["runAsUser"] == security["runAsGroup"] > 0
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["resources"]["limits"]
            assert not container["image"].endswith((":latest", ":"))


@every_set
def test_what_containers_mount_and_probe_exists_in_their_pod(name):
    for pod in installed(name).pods:
        volumes = [volume["name"] for volume in pod.spec.get("volumes", [])]
        assert len(set(volumes)) == len(volumes)
        mounted = set()
        for container in pod.containers:
            mounts = container.get("volumeMounts", [])
            assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
            mounted |= {mount["name"] for mount in mounts}
            environment = [variable["name"] for variable in container.get("env", [])]
            assert len(set(environment)) == len(environment)
            probes = [container[key] for key in ("startupProbe", "readinessProbe", "livenessProbe") if key in container]
            own_ports = {port["name"] for port in container.get("ports", [])}
            assert {probe["httpGet"]["port"] for probe in probes} <= own_ports
        assert mounted == set(volumes), "a mount without a volume, or a volume that nobody mounts"


@every_set
def test_services_budgets_and_policies_select_the_pods_of_one_workload(name):
    found = installed(name)
    for service in found.of("Service"):
        (pod,) = found.selected(service["spec"]["selector"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= pod.ports
    for budget in found.of("PodDisruptionBudget"):
        assert len(found.selected(budget["spec"]["selector"]["matchLabels"])) == 1
    for policy in found.of("NetworkPolicy"):
        assert len(found.selected(policy["spec"]["podSelector"]["matchLabels"])) == 1
    for deployment in found.of("Deployment"):
        assert len(found.selected(deployment["spec"]["selector"]["matchLabels"])) == 1


@every_set
def test_every_collector_is_scraped_once(name):
    found = installed(name)
    if not found.values.get("monitor", {}).get("enabled"):
        assert not found.of("ServiceMonitor") + found.of("PodMonitor")
        return
    (monitor,) = found.of("ServiceMonitor") + found.of("PodMonitor")
    labels = monitor["spec"]["selector"]["matchLabels"]
    if found.sidecar:
        (pod,) = found.selected(labels)
        assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in pod.ports
    else:
        (service,) = [s for s in found.of("Service") if labels.items() <= s["metadata"]["labels"].items()]
        assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


@every_set
def test_engine_and_collector_read_the_same_watchlist_and_meet_at_the_same_address(name):
    found = installed(name)
    containers = [container for pod in found.pods for container in pod.containers]
    arguments = next(c["args"] for c in containers if c["name"].endswith("collector"))
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    server = next(filter(streams, containers), None)
    assert server is not None, "nothing that streams"
    environment = {variable["name"]: variable.get("value") for variable in server["env"]}
    assert environment["LATENTWATCH_WATCHLIST"] == options["--watchlist"]
    (mount,) = (m for m in server["volumeMounts"] if m["name"] == "latentwatch-watchlist")
    assert environment["LATENTWATCH_WATCHLIST"].startswith(mount["mountPath"] + "/")
    if found.sidecar:
        assert environment["LATENTWATCH_COLLECTOR"] == options["--listen"]
        return
    (service,) = (s for s in found.of("Service") if s["metadata"]["name"].endswith("-collector"))
    port = next(port["port"] for port in service["spec"]["ports"] if port["name"] == "grpc")
    host = f"{service['metadata']['name']}.{chart.NAMESPACE}.svc.cluster.local"
    assert environment["LATENTWATCH_COLLECTOR"] == f"{host}:{port}"
    assert options["--listen"].endswith(f":{port}")


@every_set
def test_the_policy_of_a_gateway_lets_in_every_pod_that_streams(name):
    found = installed(name)
    policies = [policy for policy in found.of("NetworkPolicy") if policy["metadata"]["name"].endswith("-collector")]
    if not policies or found.values.get("networkPolicy", {}).get("enginesFrom"):
        return
    rules = policies[0]["spec"]["ingress"]
    (grpc,) = (rule for rule in rules if rule["ports"][0]["port"] == "grpc")
    for pod in found.pods:
        if any(map(streams, pod.containers)):
            assert any(peer["podSelector"]["matchLabels"].items() <= pod.labels.items() for peer in grpc["from"])


@every_set
def test_nothing_of_ours_that_lacks_holds_up_a_server(name):
    """A pod waits for a ConfigMap or Secret that it mounts, unless the volume is optional."""
    for pod in installed(name).pods:
        for volume in pod.spec.get("volumes", []):
            source = volume.get("configMap") or volume.get("secret")
            if source and volume["name"].startswith("latentwatch-"):
                assert source.get("optional", False) == any(map(streams, pod.containers)), volume["name"]


@every_set
def test_what_engine_and_collector_ask_of_each_other_is_where_they_look_for_it(name):
    """Certificates, tokens and keys: every path that is given lies in a mount whose volume has that file."""
    for pod in installed(name).pods:
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container.get("volumeMounts", [])}
            words = [argument.rpartition("=")[2] for argument in container.get("args", [])]
            words += [variable.get("value", "") for variable in container.get("env", [])]
            for path in map(PurePosixPath, words):
                if path.is_relative_to("/etc/latentwatch"):
                    at = next(mount for mount in mounts if path.is_relative_to(mount))
                    assert str(path.relative_to(at)) in files_of(mounts[at], str(path.relative_to(at)))


@every_set
def test_everyone_may_read_certificates_and_nothing_else_of_a_secret(name):
    """latentwatch refuses a token or a key that everyone may read; for the rest a server's pod may lack a group."""
    for pod in installed(name).pods:
        for volume in pod.spec.get("volumes", []):
            if volume["name"].startswith("latentwatch-") and "secret" in volume:
                for item in volume["secret"]["items"]:
                    open_to_all = volume["name"] == "latentwatch-forward-ca" or item["path"].endswith(".crt")
                    mode = item.get("mode", volume["secret"]["defaultMode"])
                    assert mode == (0o444 if open_to_all else 0o400), f"{volume['name']}/{item['path']}"


def files_of(volume: Object, wanted: str) -> list[str]:
    """The files that a volume projects; a claim's and an image's are the operator's word."""
    if "csi" in volume:
        return ["ca.crt", "tls.crt", "tls.key"]
    source = volume.get("configMap") or volume.get("secret")
    return [item["path"] for item in source["items"]] if source else [wanted]


@pytest.mark.parametrize("name", [name for name, values in SETS.items() if not values.get("vllm", {}).get("enabled")])
def test_the_patch_adds_to_a_server_and_twice_is_once(name):
    found = installed(name)
    assert found.server is not None
    assert chart.strategic_merge(found.server, found.patch) == found.server
    spec = found.server["spec"]["template"]["spec"]
    assert found.server["spec"]["template"]["metadata"]["labels"]["app"] == "mine"
    assert SERVER_INIT in spec["initContainers"]
    other, server = spec["containers"]
    assert other == SERVER_CONTAINERS[0]
    assert server["image"] == SERVER_CONTAINERS[1]["image"]
    assert {"name": "HF_HOME", "value": "/models"} in server["env"]
    assert {"name": "models", "mountPath": "/models"} in server["volumeMounts"]
    assert {"name": "models", "emptyDir": {}} in spec["volumes"]
