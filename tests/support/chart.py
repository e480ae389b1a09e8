"""The chart, rendered by the real Helm SDK, and the schemas that its objects are held against, without a cluster.

Kubernetes' own objects: the OpenAPI schemas of its releases in their strict form, where a field that does not exist is
an error (package kubernetes-validate). Objects of the Prometheus operator and of cert-manager: classes generated from
their CRDs (packages cloudcoil.models.*), unknown fields forbidden.
"""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import jsonschema
import pydantic
import referencing
import yaml
from helm_python import Chart
from helm_python import chart as helm_chart

from tests.support.engines import ROOT

HELM = ROOT / "helm"
CI_SETS = sorted((HELM / "ci").glob("*-values.yaml"))
NEWEST, OLDEST = "1.37", "1.29"
"""Kubernetes releases: the newest one with a published schema, and the chart's kubeVersion."""
CUSTOM = {"monitoring.coreos.com/v1": "prometheus_operator", "cert-manager.io/v1": "cert_manager"}
RELEASE, NAMESPACE = "prod", "serving"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times as fast where PyYAML was built with it."""

Object = dict[str, Any]


@functools.cache
def chart() -> Chart:
    return Chart.load(HELM)


def values(path: Any) -> Object:
    return dict(yaml.safe_load(path.read_text()))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Object:
    """`over` laid on `base` as Helm does it: maps are merged, everything else is replaced."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        both_maps = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both_maps else copy.deepcopy(value)
    return result


def least(**over: Any) -> Object:
    """The least that installs, and what a test changes of it. A sidecar has no network and refuses a token."""
    base = values(HELM / "ci" / "gateway-values.yaml")
    if over.get("mode") == "sidecar":
        base = {name: value for name, value in base.items() if name != "engineToken"}
    return merged(base, over)


def texts(chosen: Mapping[str, Any], *, release: str = RELEASE) -> dict[str, str]:
    """Rendered files by the name of their template."""
    rendered = chart().render(dict(chosen), name=release, namespace=NAMESPACE)
    return {path.partition("/templates/")[2]: text for path, text in rendered.items()}


def objects(chosen: Mapping[str, Any], *, release: str = RELEASE) -> list[Object]:
    """Everything that an install would send to the cluster, the test hook included."""
    return [
        found
        for path, text in texts(chosen, release=release).items()
        if path.endswith(".yaml")
        for found in yaml.load_all(text, _LOADER)
        if found is not None
    ]


def of_kind(found: list[Object], kind: str) -> list[Object]:
    return [one for one in found if one["kind"] == kind]


def the(found: list[Object], kind: str, name_ends: str = "") -> Object:
    (one,) = (o for o in of_kind(found, kind) if o["metadata"]["name"].endswith(name_ends))
    return one


def lint(chosen: Mapping[str, Any]) -> dict[str, Any]:
    return helm_chart.lint(HELM, dict(chosen), strict=True, namespace=NAMESPACE)


def matrix() -> Iterator[tuple[str, Object]]:
    """Every combination of what changes the shape of the result."""
    watchlists: dict[str, Object] = {
        "configmap": {"configMap": {"name": "watchlist-7f3c", "key": "watchlist.safetensors"}},
        "claim": {"persistentVolumeClaim": {"claimName": "watchlists", "path": "prod/gemma.safetensors"}},
        "image": {"image": {"reference": "registry.example/watchlists/gemma:7f3c", "path": "watchlist.safetensors"}},
    }
    for mode, served, method, watchlist, operator, policy in itertools.product(
        ("gateway", "sidecar"), (False, True), ("initContainer", "image"), watchlists, (False, True), (False, True)
    ):
        switches = {"enabled": operator}
        yield (
            f"{mode}-{'vllm' if served else 'patch'}-{method}-{watchlist}-"
            f"{'operator' if operator else 'plain'}-{'policy' if policy else 'open'}",
            {
                "mode": mode,
                "image": {"repository": "registry.example/latentwatch"},
                "collector": {"insecure": mode == "gateway"},
                "watchlist": watchlists[watchlist],
                "injection": {"method": method},
                "vllm": {"enabled": served, "model": "google/gemma-2-2b-it" if served else "", "replicas": 2},
                "monitor": switches,
                "prometheusRule": switches,
                "networkPolicy": {"enabled": policy},
                "persistence": {"enabled": operator and mode == "gateway"},
                "podDisruptionBudget": {"collector": switches},
            },
        )


def problems(found: Object, kubernetes: str = NEWEST) -> list[str]:
    """What the object's schema has against it, empty if nothing."""
    if found["apiVersion"] == "gateway.networking.k8s.io/v1":
        return [f"{error.json_path}: {error.message[:300]}" for error in _HTTP_ROUTE.iter_errors(found)]
    if package := CUSTOM.get(found["apiVersion"]):
        return _problems_of_custom(found, package)
    return list(_problems_of_builtin(json.dumps(found, sort_keys=True), kubernetes))


def _closed(required: str, **properties: Object) -> Object:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


_TEXT = {"type": "string", "minLength": 1, "maxLength": 253}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_HTTP_ROUTE = jsonschema.Draft202012Validator(
    _closed(
        "apiVersion kind metadata spec",
        apiVersion={"const": "gateway.networking.k8s.io/v1"},
        kind={"const": "HTTPRoute"},
        metadata={"type": "object"},
        spec=_closed(
            "parentRefs hostnames rules",
            parentRefs={
                "type": "array",
                "maxItems": 32,
                "items": _closed(
                    "name", group=_TEXT, kind=_TEXT, name=_TEXT, namespace=_TEXT, sectionName=_TEXT, port=_PORT
                ),
            },
            hostnames={"type": "array", "maxItems": 16, "items": _TEXT},
            rules={
                "type": "array",
                "items": _closed(
                    "matches backendRefs",
                    matches={
                        "type": "array",
                        "items": _closed("path", path=_closed("type value", type=_TEXT, value=_TEXT)),
                    },
                    backendRefs={"type": "array", "items": _closed("name port", name=_TEXT, port=_PORT)},
                ),
            },
        ),
    )
)
"""What we use of the Gateway API's HTTPRoute v1, whose CRD no package has."""


def schema_of(kind: str, api: str, kubernetes: str = NEWEST) -> tuple[Object, Object]:
    """The strict schema of a kind, and the definitions that it refers to."""
    folder = files("kubernetes_validate").joinpath("kubernetes-json-schema", f"v{kubernetes}.0-local-strict")
    group, _, version = api.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.partition(".")[0], version) if part)
    return json.loads(folder.joinpath(f"{name}.json").read_text()), _definitions(kubernetes)


@functools.cache
def _definitions(kubernetes: str) -> Object:
    folder = files("kubernetes_validate").joinpath("kubernetes-json-schema", f"v{kubernetes}.0-local-strict")
    return dict(json.loads(folder.joinpath("_definitions.json").read_text()))


@functools.cache
def _registry(kubernetes: str) -> referencing.Registry[Any]:
    return (referencing.Resource.from_contents(_definitions(kubernetes)) @ referencing.Registry()).crawl()


@functools.cache
def _validator(kind: str, api: str, kubernetes: str) -> jsonschema.Draft202012Validator:
    schema, _ = schema_of(kind, api, kubernetes)
    return jsonschema.Draft202012Validator(schema, registry=_registry(kubernetes))


@functools.cache
def _problems_of_builtin(text: str, kubernetes: str) -> tuple[str, ...]:
    """Cached by text: most objects of the matrix are equal."""
    found = json.loads(text)
    validator = _validator(found["kind"], found["apiVersion"], kubernetes)
    return tuple(f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(found))


def _problems_of_custom(found: Object, package: str) -> list[str]:
    kind = getattr(importlib.import_module(f"cloudcoil.models.{package}.v1"), found["kind"])
    try:
        kind.model_validate(found, extra="forbid", by_alias=True, by_name=False)
    except pydantic.ValidationError as refused:
        return [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in refused.errors()]
    return []


def strategic_merge(onto: Object, patch: Object) -> Object:
    """What `kubectl patch` makes of a Deployment: lists are merged by the keys that Kubernetes' schema names."""
    _, definitions = schema_of("Deployment", "apps/v1")
    return _merged_by_schema(onto, patch, definitions["$defs"]["io.k8s.api.apps.v1.Deployment"], definitions["$defs"])


def _merged_by_schema(onto: Any, patch: Any, schema: Object, definitions: Object) -> Any:
    schema = _resolved(schema, definitions)
    if isinstance(patch, dict) and isinstance(onto, dict):
        result = dict(onto)
        for key, value in patch.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            result[key] = _merged_by_schema(onto[key], value, below, definitions) if key in onto else value
        return result
    key = schema.get("x-kubernetes-patch-merge-key")
    if isinstance(patch, list) and key:
        result_by_key = {item[key]: item for item in onto}
        for item in patch:
            known = result_by_key.get(item[key])
            result_by_key[item[key]] = (
                _merged_by_schema(known, item, schema["items"], definitions) if known is not None else item
            )
        return list(result_by_key.values())
    return patch


def _resolved(schema: Any, definitions: Object) -> Object:
    if not isinstance(schema, dict):
        return {}
    reference = schema.get("$ref") or next((s["$ref"] for s in schema.get("allOf", []) if "$ref" in s), "")
    return {**definitions[reference.rpartition("/")[2]], **schema} if reference else schema
