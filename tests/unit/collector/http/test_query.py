"""No query parameter is ignored: what a route does not know is refused, what it knows does something."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from latentwatch.collector.core import Core
from latentwatch.names import Severity
from latentwatch.watchlist.file import Limit
from starlette.testclient import TestClient

from tests.support.collectors import app_of
from tests.support.streams import Schedule, hello, probe, received, sparse, tokens, watchlist

FEATURES = (
    sparse("jailbreak", limit=Limit("max", 1.0), severity=Severity.CRITICAL),
    probe("deceive", limit=Limit("max", 0.1), severity=Severity.WARNING),
)
SECONDS = (1000.0, 2000.0)


@pytest.fixture(scope="module")
def client() -> TestClient:
    core = Core(watchlist(FEATURES))
    for number, (model, seconds) in enumerate(zip(("llama", "qwen"), SECONDS, strict=True), 1):
        who = hello(replica=f"pod-{number}/0", model_name=model)
        core.ingest.hello(who, seconds)
        requests = [tokens(np.random.default_rng(number), FEATURES, handle=1, total=30, prompt_tokens=10)]
        requests[0].request_id = f"chatcmpl-{number}-0123abcd"
        for batch in Schedule.one_step(requests).batches(FEATURES):
            core.ingest.observe(who, received(number, batch), seconds)
    return TestClient(app_of(core, 2001.0))


def routes(client: TestClient) -> list[tuple[str, str, list[str]]]:
    """Method, path and query parameters of everything in the schema."""
    paths = client.get("/openapi.json").json()["paths"]
    found = []
    for path, methods in paths.items():
        for method, said in methods.items():
            names = [one["name"] for one in said.get("parameters", []) if one["in"] == "query"]
            found.append((method, path.replace("{request_id}", "x"), names))
    return found


def test_a_parameter_that_a_route_does_not_know_is_refused_by_name_on_every_route(client):
    asked = routes(client)
    assert len(asked) >= 14
    for method, path, _ in asked:
        answer = client.request(method, path, params={"limt": "5"})
        assert answer.status_code == 422, (method, path)
        assert answer.json()["detail"][0]["loc"] == ["query", "limt"]


def test_a_parameter_given_twice_is_refused_on_every_route_that_knows_it(client):
    for method, path, parameters in routes(client):
        for name in parameters:
            answer = client.request(method, f"{path}?{name}=1&{name}=1")
            assert answer.status_code == 422 and "more than once" in answer.text, (method, path, name)


def test_a_refusal_says_what_was_probably_meant(client):
    assert "Did you mean limit?" in client.get("/v1/exceedances?limt=5").text
    assert "Did you mean jailbreak?" in client.get("/v1/exceedances?feature=jailbraek").text
    assert "Did you mean llama?" in client.get("/v1/exceedances?model_name=lama").text


def test_the_page_and_its_files_may_be_asked_with_anything(client):
    assert client.get("/?utm_source=mail").status_code == 200 and client.get("/page.css?v=2").status_code == 200


FILTERS = {"feature": "deceive", "severity": "critical", "model_name": "qwen", "since_seconds": "1500"}


@pytest.mark.parametrize("names", [n for k in range(1, 5) for n in itertools.combinations(FILTERS, k)], ids="-".join)
def test_exceedances_are_those_that_were_asked_for(client, names):
    every = client.get("/v1/exceedances").json()["exceedances"]
    assert {(one["feature"], one["model_name"]) for one in every} == {
        (feature, model) for feature in ("jailbreak", "deceive") for model in ("llama", "qwen")
    }
    expected = [
        one
        for one in every
        if all(
            one["seconds"] >= float(FILTERS[name]) if name == "since_seconds" else one[name] == FILTERS[name]
            for name in names
        )
    ]
    found = client.get("/v1/exceedances", params={name: FILTERS[name] for name in names})
    assert found.json()["exceedances"] == expected


def test_exceedances_end_where_they_were_asked_to_and_the_limit_counts_what_is_wanted(client):
    before = client.get("/v1/exceedances?until_seconds=1500").json()["exceedances"]
    assert {one["model_name"] for one in before} == {"llama"}
    assert len(client.get("/v1/exceedances?model_name=llama&limit=1").json()["exceedances"]) == 1


@pytest.mark.parametrize(
    ("query", "status"),
    [("severity=loud", 422), ("since_seconds=monday", 422), ("feature=nothing", 404), ("model_name=nobody", 404)],
)
def test_what_there_is_not_is_refused(client, query, status):
    assert client.get(f"/v1/exceedances?{query}").status_code == status


def test_healthz_is_told_to_be_verbose_in_the_ways_that_people_write_it(client):
    for query in ("verbose", "verbose=1", "verbose=true"):
        assert "causes" in client.get(f"/healthz?{query}").json(), query
    for query in ("", "verbose=0", "verbose=false"):
        assert "causes" not in client.get(f"/healthz?{query}").json(), query
    assert client.get("/healthz?verbose=loud").status_code == 422
