"""An id that may be several requests' over HTTP and in the verb: what is deleted, told, attached and noted of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from latentwatch import secrets
from latentwatch.cli import main
from latentwatch.client_ids import IdKind
from latentwatch.collector.core import Core
from latentwatch.collector.evidence import Evidence, EvidenceSettings
from latentwatch.evidence.archive import Archive
from latentwatch.evidence.audit import Audit
from latentwatch.evidence.encryption import write_key

from tests.support.collectors import app_of
from tests.support.evidence import FEATURES, NOW
from tests.support.streams import Piece, Tokens, hello, received, step_batch, watchlist

TOKEN = "correct-horse-battery"
TRUSTED = {"authorization": f"Bearer {TOKEN}"}
TRACE, ID = "ab" * 16, "/v1/evidence/requests/"


class Collector:
    """One that keeps evidence of these requests: each as (response id, engine's id, trace id)."""

    def __init__(self, folder: Path, *requests: tuple[str, str, str]) -> None:
        secrets.write(folder / "token", TOKEN.encode())
        write_key(folder / "key")
        settings = EvidenceSettings(folder / "evidence", token_file=folder / "token", key_file=folder / "key")
        self.folder = folder / "evidence"
        self.evidence = Evidence(settings, watchlist(FEATURES), lambda: NOW)
        core = Core(watchlist(FEATURES), evidence=[self.evidence.put])
        core.ingest.hello(hello(), NOW)
        for number, (response_id, request_id, trace) in enumerate(requests, 1):
            act = np.zeros((4, len(FEATURES)), np.float32)
            act[2, 0] = 5.0
            request = Tokens(number, 2, act, np.ones(4, int), np.ones((4, 1), np.float32), request_id=request_id)
            request.response_id = response_id
            opened = replace(request.opened(), traceparent=f"00-{trace}-{'1' * 16}-01" if trace else "")
            batch = step_batch([Piece(request, 0, 4)], FEATURES, opened=[opened], closed=[request.closed()])
            core.ingest.observe(hello(), received(number, batch), NOW)
        self.evidence.written().result(10)
        self._app = app_of(core, NOW, evidence=self.evidence)

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=TRUSTED) as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def left(self) -> list[str]:
        """Response ids on the disk."""
        return [request.response_id for request in Archive(self.folder).requests()]

    def noted(self, name: str) -> list[tuple[str, int]]:
        """Of the audit log: what was done about this id, and how many requests that told of or took; latest first."""
        audit = Audit(self.folder)
        entries = [(entry.action, entry.found) for entry in audit.entries(request=name)]
        audit.close()
        return entries


Start = Callable[..., Collector]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Collector] = []

    def start(*requests: tuple[str, str, str]) -> Collector:
        made.append(Collector(tmp_path, *requests))
        return made[-1]

    yield start
    for each in made:
        each.evidence.close()


A = ("chatcmpl-a", "chatcmpl-a-0123abcd", "")
ASKS_AS_A = ("chatcmpl-chatcmpl-a", "chatcmpl-chatcmpl-a-4567abcd", "")
IN_TRACE = ("chatcmpl-b", "chatcmpl-b-0123abcd", TRACE)
NAMED_AS_TRACE = (f"chatcmpl-{TRACE}", f"chatcmpl-{TRACE}-0123abcd", TRACE)
TWO_MEANT = {
    "chatcmpl-a": (A, ASKS_AS_A),
    TRACE: (IN_TRACE, NAMED_AS_TRACE),
    "session": (("chatcmpl-session", "chatcmpl-session-01", ""), ("cmpl-session", "cmpl-session-0-02", "")),
}


@pytest.mark.parametrize("name", TWO_MEANT)
def test_a_name_of_which_two_may_be_meant_deletes_nothing_and_says_whose_it_is(start: Start, name: str):
    collector = start(*TWO_MEANT[name])
    for options in ("", "?dry_run=true"):
        answer = collector("DELETE", ID + name + options)
        assert answer.status_code == 409 and "by=" in answer.json()["detail"]
        assert all(request_id in answer.json()["detail"] for _, request_id, _ in TWO_MEANT[name])
    assert len(collector.left()) == 2
    assert collector.noted(name) == [("show", 2)] * 2, "whose it is was read"
    assert len(collector("GET", ID + name).json()["requests"]) == 2


@pytest.mark.parametrize("name", TWO_MEANT)
def test_the_verb_asks_likewise(start: Start, name: str, capsys: pytest.CaptureFixture[str]):
    collector = start(*TWO_MEANT[name])
    argv = ["evidence", "delete", name, "--dir", str(collector.folder)]
    for more in ([], ["--dry-run"]):
        assert main([*argv, *more]) == 2
        said = capsys.readouterr().err
        assert "--by" in said and all(request_id in said for _, request_id, _ in TWO_MEANT[name])
    assert len(collector.left()) == 2 and collector.noted(name) == [("show", 2)] * 2


CHOICES = [
    ("chatcmpl-a", "response_id", {"chatcmpl-a"}),
    ("chatcmpl-a", "client_id", {"chatcmpl-chatcmpl-a"}),
    (TRACE, "trace_id", {"chatcmpl-b", f"chatcmpl-{TRACE}"}),
    (TRACE, "client_id", {f"chatcmpl-{TRACE}"}),
    ("session", "client_id", {"chatcmpl-session", "cmpl-session"}),
]


@pytest.mark.parametrize(("name", "by", "taken"), CHOICES)
def test_with_the_kind_it_takes_those_and_no_other_and_a_dry_run_says_so_before(
    start: Start, name: str, by: str, taken: set[str]
):
    collector = start(*TWO_MEANT[name])
    before = set(collector.left())
    told = collector("DELETE", f"{ID}{name}?by={by}&dry_run=true").json()
    assert {each["response_id"] for each in told["deleted"]} == taken
    assert (told["by"], told["dry_run"], told["requests"], told["rows"]) == (by, True, len(taken), 0)
    assert set(collector.left()) == before and collector.noted(name) == [("show", len(taken))]
    done = collector("DELETE", f"{ID}{name}?by={by}").json()
    assert done["deleted"] == told["deleted"] and not done["dry_run"] and done["rows"] > 0
    assert set(collector.left()) == before - taken
    assert collector.noted(name)[0] == ("delete", len(taken))


@pytest.mark.parametrize(("name", "by", "taken"), CHOICES)
def test_the_verb_does_likewise(start: Start, name: str, by: str, taken: set[str], capsys: pytest.CaptureFixture[str]):
    collector = start(*TWO_MEANT[name])
    before = set(collector.left())
    argv = ["evidence", "delete", name, "--dir", str(collector.folder), "--by", by]
    assert main([*argv, "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in listed[:-1]} == taken and f"by {by}" in listed[-1]
    assert set(collector.left()) == before
    assert main(argv) == 0
    assert {line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]} == taken
    assert set(collector.left()) == before - taken


@pytest.mark.parametrize("by", [kind for kind in IdKind if kind != IdKind.RESPONSE])
def test_as_what_it_is_not_it_takes_nothing(start: Start, by: IdKind):
    collector = start(A)
    assert collector("DELETE", f"{ID}chatcmpl-a?by={by}").status_code == 404
    assert collector("DELETE", f"{ID}chatcmpl-a?by=everything").status_code == 422
    argv = ["evidence", "delete", "chatcmpl-a", "--dir", str(collector.folder), "--by", by]
    assert main(argv) == 1
    assert collector.left() == ["chatcmpl-a"] and collector("GET", "/v1/requests/chatcmpl-a").status_code == 200


@pytest.mark.parametrize("name", ["chatcmpl-a", "chatcmpl-a-0123abcd", "a"])
def test_any_id_of_one_request_is_enough(start: Start, name: str):
    collector = start(A, ("chatcmpl-a_1", "chatcmpl-a_1-0123abcd", ""))
    assert collector("DELETE", ID + name).json()["requests"] == 1
    assert collector.left() == ["chatcmpl-a_1"]


def test_what_was_said_does_not_go_to_a_request_that_somebody_else_called_so(start: Start):
    """A exceeded nothing and is not kept; another client sends A's response id as its X-Request-Id."""
    collector = start(ASKS_AS_A)
    path = "/v1/evidence/content/"
    assert collector("PUT", path + "chatcmpl-a", json={"token_ids": [1, 2]}).status_code == 404
    assert collector("GET", path + ASKS_AS_A[0]).status_code == 404
    for name in ASKS_AS_A[:2]:
        assert collector("PUT", path + name, json={"token_ids": [1, 2]}).status_code == 204


def test_what_was_said_is_not_told_under_an_id_that_may_be_anothers(start: Start):
    collector = start(A, ASKS_AS_A)
    path = "/v1/evidence/content/"
    assert collector("PUT", path + "chatcmpl-chatcmpl-a", json={"token_ids": [1, 2]}).status_code == 204
    assert collector("GET", path + "chatcmpl-a").status_code == 409
    assert collector("GET", path + "chatcmpl-chatcmpl-a").json()["token_ids"] == [1, 2]
