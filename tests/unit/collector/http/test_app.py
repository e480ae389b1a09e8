"""The HTTP side: what each path answers, to whom, and with which headers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote

import latentwatch.collector
import numpy as np
import pytest
from latentwatch.collector.core import Core
from latentwatch.watchlist.file import Limit
from starlette.testclient import TestClient

from tests.page import answers
from tests.support.collectors import app_of
from tests.support.streams import Schedule, hello, probe, received, sparse, tokens, watchlist

FEATURES = (sparse("jailbreak", limit=Limit("max", 1.0)), probe("deceive", limit=Limit("rolling_mean", 0.1, 4)))
EVIL = 'chatcmpl-<img src=x onerror="alert(1)">/../é-0123abcd'
STATIC = Path(latentwatch.collector.__file__).parent / "http" / "static"
MODULES = sorted(STATIC.glob("*.js"))
SCRIPT = "".join(module.read_text() for module in MODULES)


@pytest.fixture(scope="module")
def client() -> TestClient:
    core = Core(watchlist(FEATURES))
    core.ingest.hello(hello(), 1000.0)
    rng = np.random.default_rng(0)
    requests = [tokens(rng, FEATURES, handle=h, total=30, prompt_tokens=10) for h in range(1, 4)]
    requests[0].request_id = EVIL
    for batch in Schedule.one_step(requests).batches(FEATURES):
        core.ingest.observe(hello(), received(1, batch), 1000.0)
    app = app_of(core, 1001.0)
    return TestClient(app, raise_server_exceptions=True)


PATHS = [
    "/",
    "/page.css",
    *(f"/{module.name}" for module in MODULES),
    "/metrics",
    "/healthz",
    "/openapi.json",
    "/v1/overview",
    "/v1/features",
    "/v1/exceedances",
    "/v1/anomalies",
    "/v1/requests",
    "/v1/requests/chatcmpl-2",
    "/v1/requests/chatcmpl-2-0123abcd",
]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_answers(client, path):
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", [*PATHS, "/nothing", "/v1/requests/unknown", "/v1/requests?limit=0"])
def test_every_answer_even_an_error_forbids_foreign_scripts_sniffing_and_caching(client, path):
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
@pytest.mark.parametrize("path", ["/metrics", "/v1/requests", "/v1/requests/chatcmpl-2", "/"])
def test_nothing_can_be_written(client, method, path):
    assert getattr(client, method)(path).status_code == 405


def test_metrics_come_in_the_format_that_was_asked_for(client):
    assert client.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    asked = client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert asked.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert asked.text.endswith("# EOF\n")


def test_a_request_is_found_by_the_engines_id_and_by_the_id_that_the_client_saw(client):
    engine, response = (client.get(f"/v1/requests/{id}").json() for id in ("chatcmpl-2-0123abcd", "chatcmpl-2"))
    assert engine == response
    (request,) = engine["requests"]
    assert request["outcome"] == "finished" and sum(request["tokens"].values()) == 30
    assert {"feature", "max", "position", "statistic", "limit", "exceeded"} <= set(request["features"][0])


def test_a_request_id_of_any_text_is_found_and_travels_as_json_only(client):
    found = client.get(f"/v1/requests/{quote(EVIL, safe='')}")
    assert found.json()["requests"][0]["request_id"] == EVIL
    assert found.headers["content-type"] == "application/json"


def test_an_alert_leads_to_the_newest_request_of_its_feature_and_to_the_feature_where_none_is_known(client):
    def leads_to(**asked):
        answer = client.get("/latest-request", params=asked, follow_redirects=False)
        assert answer.status_code == 303
        return answer.headers["location"]

    exceeded = client.get("/v1/exceedances").json()["exceedances"]
    newest = exceeded[0]
    target = quote(newest["request_id"], safe="")
    assert leads_to(model_name=newest["model_name"], feature=newest["feature"]) == f"./#request={target}"
    assert leads_to(model_name="another", feature="a/b c") == "./#feature=a%2Fb%20c"
    assert client.get("/latest-request").status_code == 422


def test_an_unknown_request_is_a_404_that_says_why(client):
    answer = client.get("/v1/requests/" + "y" * 900)
    assert answer.status_code == 404
    assert "does not hold it" in answer.json()["detail"] and len(answer.text) < 500


def test_an_id_longer_than_any_that_is_shown_is_looked_up_by_its_digest(client):
    """What bounds it is the server's bound on a URL."""
    assert client.get("/v1/requests/" + "y" * 1025).status_code == 404


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "limit="])
def test_limits_out_of_bounds_are_refused(client, query):
    assert client.get(f"/v1/exceedances?{query}").status_code == 422
    assert client.get(f"/v1/requests?{query}").status_code == 422


def test_limits_are_kept(client):
    assert len(client.get("/v1/requests?limit=2").json()["requests"]) == 2
    assert len(client.get("/v1/exceedances?limit=1").json()["exceedances"]) == 1
    assert len(client.get("/v1/overview?features=1").json()["features"]) == 1


def test_one_bad_request_is_one_event_with_everything_that_it_exceeded(client):
    exceedances = client.get("/v1/exceedances").json()["exceedances"]
    anomalies = client.get("/v1/anomalies").json()["anomalies"]
    ids = [anomaly["request_id"] for anomaly in anomalies]
    assert len(set(ids)) == len(ids) < len(exceedances) and ids[0] == exceedances[0]["request_id"]
    assert sum(len(anomaly["exceedances"]) for anomaly in anomalies) == len(exceedances)
    both = next(anomaly for anomaly in anomalies if len(anomaly["exceedances"]) == 2)
    assert [found["feature"] for found in both["exceedances"]] == ["deceive", "jailbreak"]
    assert both["severity"] == "critical" and both["first_seconds"] <= both["last_seconds"]
    assert client.get("/v1/anomalies?limit=1").json()["anomalies"] == anomalies[:1]


def test_features_carry_their_evidence_and_totals(client):
    answer = client.get("/v1/features").json()
    assert [f["id"] for f in answer["features"]] == ["jailbreak", "deceive"]
    assert answer["features"][0]["fired_tokens"] > 0 and answer["features"][1]["limit"]["window_tokens"] == 4


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/overview", "Overview"),
        ("/v1/features", "Features"),
        ("/v1/exceedances", "Exceedances"),
        ("/v1/anomalies", "Anomalies"),
        ("/v1/requests", "Requests"),
        ("/v1/drift", "Drifts"),
        ("/healthz", "Health"),
    ],
)
def test_answers_have_exactly_the_fields_of_the_schema(client, path, name):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert_matches(client.get(path).json(), {"$ref": f"#/components/schemas/{name}"}, schemas)


def assert_matches(value, schema, schemas):
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        schema = next(s for s in schema["anyOf"] if (s.get("type") == "null") == (value is None))
        return assert_matches(value, schema, schemas)
    if schema.get("type") == "array":
        for item in value:
            assert_matches(item, schema["items"], schemas)
    elif "properties" in schema:
        assert set(value) == set(schema["properties"])
        for key, item in value.items():
            assert_matches(item, schema["properties"][key], schemas)
    elif "enum" in schema:
        assert value in schema["enum"]
    return None


def test_no_page_of_documentation_that_loads_from_elsewhere_is_served(client):
    assert client.get("/docs").status_code == 404 and client.get("/redoc").status_code == 404


# -- the page's own files


def test_the_page_loads_nothing_from_elsewhere_and_holds_no_inline_code():
    html = (STATIC / "index.html").read_text()
    links = [link for link in re.findall(r'(?:src|href)="([^"]+)"', html) if not link.startswith(("#", "data:"))]
    assert links and all(re.fullmatch(r"[\w./]+", link) and not link.startswith("/") for link in links)
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", html)
    assert not re.search(r"""(?:from|import)\s*\(?["'](?!\./)""", SCRIPT)
    assert not re.search(r"url\(|@import", (STATIC / "page.css").read_text())


def test_the_page_sets_text_from_outside_as_text_and_never_as_markup():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", SCRIPT)


def test_every_element_that_the_script_looks_up_is_in_the_page():
    html = (STATIC / "index.html").read_text()
    wanted = set(re.findall(r'\bat\("([\w-]+)"', SCRIPT))
    assert wanted <= set(re.findall(r'id="([\w-]+)"', html)) and len(wanted) > 15


def test_the_types_that_the_script_is_checked_against_are_those_of_the_schema():
    """`make page` checks every field that the script reads against them."""
    same = answers.FILE.read_text() == answers.declarations(answers.document())
    assert same, "the API has changed: run `python -m tests.page.answers`, then `make page`"


def test_no_line_of_the_page_is_too_long_to_read():
    long = [
        f"{file.name}:{number}"
        for file in STATIC.iterdir()
        if file != answers.FILE
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []


def test_the_overview_of_1024_features_stays_small_enough_to_ask_for_every_two_seconds():
    core = Core(watchlist([sparse(f"f{i}") for i in range(1024)]))
    core.ingest.hello(hello(), 1000.0)
    app = app_of(core, 1001.0)
    assert len(json.dumps(TestClient(app).get("/v1/overview").json())) < 150_000
