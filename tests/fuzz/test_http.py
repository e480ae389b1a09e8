"""The HTTP API by its own OpenAPI document: whatever is asked, the answer is one that the document knows."""

from __future__ import annotations

import json
from functools import cache
from typing import Any
from urllib.parse import quote

import jsonschema
import numpy as np
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.collector.exposition import ProcessFacts
from monitor.collector.pipeline import Pipeline
from monitor.collector.web import make_app
from monitor.watchlist.card import Limit
from tests.support.streams import Schedule, hello, probe, sparse, tokens, watchlist

FEATURES = (sparse("a", limit=Limit("max", 3.0)), probe("p", limit=Limit("max", 0.5)))
ANYTHING = st.one_of(
    st.integers(-5, 2000).map(str),
    st.sampled_from(
        ["", "0", "-1", "1e3", "NaN", "null", "true", "chatcmpl-1", "chatcmpl-1-0123abcd", "../metrics", "%00"]
    ),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=40),
)


@cache
def served() -> tuple[TestClient, dict[str, Any]]:
    pipeline = Pipeline(watchlist(FEATURES))
    pipeline.hello(hello(), 1000.0)
    rng = np.random.default_rng(0)
    requests = [tokens(rng, FEATURES, handle=h, total=20, prompt_tokens=5) for h in range(1, 6)]
    for sequence, batch in enumerate(Schedule.random(rng, requests, 9).batches(FEATURES), start=1):
        pipeline.observe(hello(), sequence, batch, 1000.0)
    app: Any = make_app(pipeline, clock=lambda: 1001.0, process=lambda: ProcessFacts(0.0, 0, 0.0))
    client = TestClient(app, raise_server_exceptions=True)
    return client, client.get("/openapi.json").json()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_answer_is_one_that_the_document_knows(data):
    client, document = served()
    path, methods = data.draw(st.sampled_from(sorted(document["paths"].items())))
    method, operation = data.draw(st.sampled_from(sorted(methods.items())))
    url, query, headers = path, {}, {}
    for parameter in operation.get("parameters", ()):
        value = data.draw(ANYTHING, label=parameter["name"])
        if parameter["in"] == "path":
            url = url.replace("{" + parameter["name"] + "}", quote(value, safe="") or "x")
        elif parameter["in"] == "query" and data.draw(st.booleans()):
            query[parameter["name"]] = value
        elif parameter["in"] == "header" and value.isascii() and value.isprintable():
            headers[parameter["name"]] = value
    answer = client.request(method, url, params=query, headers=headers)
    known = set(operation["responses"])
    if "evidence" in operation["tags"]:
        # This collector writes none, and allows nothing that needs its token.
        known |= {"401", "403", "404"}
    if "{" in path:
        # A parameter may turn the path into another one, which answers then.
        known |= {"404", "405"}
    assert str(answer.status_code) in known, (method, url, query, answer.text[:200])
    schema = operation["responses"].get(str(answer.status_code), {}).get("content", {}).get("application/json", {})
    if answer.headers.get("content-type") == "application/json" and schema.get("schema") and "{" not in path:
        jsonschema.validate(json.loads(answer.text), {**schema["schema"], "components": document["components"]})
