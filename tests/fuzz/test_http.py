"""The HTTP API by its own OpenAPI document, with schemathesis: whatever is asked, the answer is one that it knows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from latentwatch import secrets
from latentwatch.collector.core import Core
from latentwatch.collector.evidence import EvidenceSettings
from latentwatch.collector.http import app as http_app
from latentwatch.evidence.encryption import write_key
from latentwatch.evidence.store import Retention
from starlette.routing import Route

from tests.support.collectors import FEATURES, app_of, collector, exceed
from tests.support.streams import watchlist


def application() -> Any:
    return app_of(Core(watchlist(FEATURES)), time.time())


DOCUMENT = schemathesis.openapi.from_asgi("/openapi.json", application())
OPERATIONS = [found.ok() for found in DOCUMENT.get_all_operations()]
TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a real collector that writes evidence, with a request in it, and lets in who shows the token."""
    folder = tmp_path_factory.mktemp("http")
    secrets.write(folder / "token", TOKEN.encode())
    write_key(folder / "content.key")
    evidence = EvidenceSettings(
        folder / "evidence", Retention(30, 1 << 30, 24), token_file=folder / "token", key_file=folder / "content.key"
    )
    with collector(folder, evidence=evidence) as service:
        exceed(service)
        yield service.http_url


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {TOKEN}"}], ids=["stranger", "trusted"])
def test_every_answer_is_one_that_the_document_knows(url: str, operation: Any, headers: dict[str, str]):
    """No server error; a status, a content type and a body as documented."""

    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        case.call_and_validate(base_url=url, headers=headers)

    ask()


def test_the_document_has_every_route_but_the_page_and_itself(monkeypatch):
    monkeypatch.setattr(http_app, "_secured", lambda app: app)
    routes = [route for route in application().routes if isinstance(route, Route)]
    shown = {route.path.replace(":path", "") for route in routes if route.include_in_schema}
    assert shown == {operation.path for operation in OPERATIONS} and len(shown) > 10
    hidden = [route.path for route in routes if not route.include_in_schema]
    assert not [path for path in hidden if path.startswith(("/v1", "/metrics", "/healthz"))]
