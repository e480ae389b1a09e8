"""Evidence in a collector: from a page's exemplar to the request, who may delete, and what the audit log says."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from latentwatch import secrets
from latentwatch.cli import main
from latentwatch.collector.core import Core
from latentwatch.collector.evidence import Evidence, EvidenceSettings
from latentwatch.errors import ConfigRefused
from latentwatch.evidence import sealed_files, segment
from latentwatch.evidence.archive import Archive
from latentwatch.evidence.audit import Audit
from latentwatch.evidence.encryption import write_key
from latentwatch.step.batch import StepBatch
from prometheus_client.openmetrics import parser

from tests.support.collectors import app_of, collector, exceed
from tests.support.evidence import FEATURES, NOW, one_request
from tests.support.streams import Schedule, Tokens, hello, received, tokens, watchlist
from tests.support.wire import eventually

TOKEN = "correct-horse-battery"


class Client:
    """Requests to a collector's app, in the test's own thread."""

    def __init__(self, app) -> None:
        self._app = app

    def __call__(self, method: str, path: str, **options) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    secrets.write(path, TOKEN.encode())
    return path


@pytest.fixture
def made(tmp_path, token_file):
    """A collector that saw three requests, of which the last still runs."""
    write_key(tmp_path / "key")
    settings = EvidenceSettings(tmp_path / "evidence", token_file=token_file, key_file=tmp_path / "key")
    evidence = Evidence(settings, watchlist(FEATURES), lambda: NOW)
    core = Core(watchlist(FEATURES), evidence=[evidence.put])
    core.ingest.hello(hello(), NOW)
    for sequence, batch in enumerate(Schedule.one_step(seen()).batches(FEATURES), start=1):
        core.ingest.observe(hello(), received(sequence, batch), NOW)
    evidence._writer.run(lambda: None).result(10)
    client = Client(app_of(core, NOW, evidence=evidence))
    client.evidence = evidence
    yield client, tmp_path / "evidence"
    evidence.close()


def seen() -> list[Tokens]:
    rng = np.random.default_rng(0)
    requests = [tokens(rng, FEATURES, handle=h, total=40, prompt_tokens=10) for h in range(1, 4)]
    requests[-1].closed = lambda: requests[0].closed()
    return requests


def test_the_exemplar_of_a_page_leads_to_the_request_in_the_evidence(made):
    client, _ = made
    text = client("GET", "/metrics", headers={"accept": "application/openmetrics-text"}).text
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    samples = [s for s in families["latentwatch_exceedances"].samples if s.exemplar and s.exemplar.labels]
    assert samples
    for sample in samples:
        answer = client("GET", f"/v1/evidence/requests/{sample.exemplar.labels['request_id']}")
        (request,) = answer.json()["requests"]
        (listed,) = [e for e in request["exceedances"] if e["feature"] == sample.labels["feature"]]
        assert listed["value"] == pytest.approx(sample.exemplar.value) and listed["seconds"] == NOW
        shown = {a["feature"]: a for a in request["activations"]}
        if request["outcome"] != "open":
            assert listed["position"] in shown[sample.labels["feature"]]["positions"]
    assert families["latentwatch_evidence_written"].samples[0].value > 0
    assert families["latentwatch_evidence_folder_bytes"].samples[0].value > 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EACCES])
def test_a_collector_starts_on_a_disk_that_cannot_be_written_counts_what_it_drops_and_goes_on_when_it_can(
    tmp_path, monkeypatch, caplog, code
):
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    folder, requests = tmp_path / "evidence", seen()
    core = None
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", failing)
        patched.setattr(segment, "create", full)
        evidence = Evidence(EvidenceSettings(folder), watchlist(FEATURES), lambda: NOW)
        core = Core(watchlist(FEATURES), evidence=[evidence.put])
        core.ingest.hello(hello(), NOW)
        core.ingest.observe(hello(), received(1, step_batch_of(requests[:1])), NOW)
        evidence._writer.run(lambda: None).result(10)
        assert "is only counted" in caplog.text and os.strerror(code) in caplog.text
        assert evidence.facts().writer.dropped["request_end", "write_failed"] == 1
        client = Client(app_of(core, NOW, evidence=evidence))
        for url in ("/v1/evidence/exceedances", "/v1/evidence/requests/chatcmpl-1"):
            assert client("GET", url).status_code == 503
        assert client("GET", "/metrics").status_code == 200
    core.ingest.observe(hello(), received(2, step_batch_of(requests[1:2])), NOW)
    evidence._writer.run(lambda: None).result(10)
    assert client("GET", "/v1/evidence/requests/chatcmpl-2").status_code == 200
    assert evidence.facts().writer.written["request_end"] == 1
    evidence.close()


def step_batch_of(requests: list[Tokens]) -> StepBatch:
    (batch,) = Schedule.one_step(requests).batches(FEATURES)
    return batch


def test_a_path_that_can_be_no_evidence_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigRefused, match="Not a directory") as refused:
        Evidence(EvidenceSettings(tmp_path / "file" / "evidence"), watchlist(FEATURES), lambda: NOW)
    assert refused.value.reason == "evidence_folder"


@pytest.mark.parametrize("what", ["segment", "folder"])
def test_evidence_that_somebody_removes_beneath_a_collector_is_begun_anew_and_nothing_goes_into_files_that_are_gone(
    made, what
):
    client, folder = made
    if what == "folder":
        shutil.rmtree(folder)
        assert client("GET", "/metrics").status_code == 200
        folder.mkdir()
    else:
        for path in folder.glob("*.evidence*"):
            if path.suffix == ".evidence":
                path.unlink()
    evidence = client.evidence
    evidence.put(one_request(77, request_id="chatcmpl-new-0123abcd"))
    evidence._writer.run(lambda: None).result(10)
    assert evidence.facts().writer.dropped == {}
    reader = Archive(folder)
    (found,) = reader.find("chatcmpl-new-0123abcd")
    assert found.outcome != "open"
    reader.close()


def test_exceedances_are_listed_and_filtered(made):
    client, _ = made
    everything = client("GET", "/v1/evidence/exceedances").json()["exceedances"]
    assert {e["feature"] for e in everything} == {"jailbreak", "deceive"}
    one = client("GET", "/v1/evidence/exceedances", params={"feature": "deceive", "limit": 1}).json()["exceedances"]
    assert [e["feature"] for e in one] == ["deceive"]
    assert client("GET", "/v1/evidence/exceedances?since_seconds=9e9").json() == {"exceedances": []}
    assert client("GET", "/v1/evidence/exceedances?severity=loud").status_code == 422


def test_a_request_that_is_not_kept_is_a_404_that_says_why(made):
    client, _ = made
    answer = client("GET", "/v1/evidence/requests/chatcmpl-nobody")
    assert answer.status_code == 404 and "exceeded no limit" in answer.json()["detail"]


def test_deleting_needs_the_token_and_leaves_nothing(made):
    client, folder = made
    url, name = "/v1/evidence/requests/chatcmpl-2", b"chatcmpl-2-0123abcd"
    assert client("DELETE", url).status_code == 401
    assert client("DELETE", url, headers={"authorization": "Bearer wrong-horse-battery"}).status_code == 401
    assert client("GET", url).status_code == 200
    answer = client("DELETE", url, headers=TRUSTED)
    assert answer.json()["requests"] == 1 and answer.json()["clean"]
    assert client("GET", url).status_code == 404
    assert not any(name in path.read_bytes() for path in folder.iterdir())
    metrics = client("GET", "/metrics", headers={"accept": "application/openmetrics-text"}).text
    pages = [client("GET", f"/v1/{page}").text for page in ("requests", "exceedances", "overview", "drift")]
    assert not any("chatcmpl-2" in page for page in (metrics, *pages)), "nor does the collector itself know it"
    assert "chatcmpl-1" in pages[0] and client("GET", "/v1/requests/chatcmpl-2").status_code == 404


def test_a_request_that_runs_cannot_be_deleted_yet(made):
    client, _ = made
    answer = client("DELETE", "/v1/evidence/requests/chatcmpl-3", headers=TRUSTED)
    assert answer.status_code == 409 and "still runs" in answer.json()["detail"]


TRUSTED = {"authorization": f"Bearer {TOKEN}"}


def test_what_a_gateway_leaves_is_kept_sealed_and_shown_with_its_scores(made, capsys):
    client, folder = made
    said = {"tokens": [f" w{i}" for i in range(39)] + [" confidential"], "token_ids": list(range(40))}
    url = "/v1/evidence/content/chatcmpl-2"
    assert client("PUT", url, json=said).status_code == 401
    assert client("PUT", url, json=said, headers=TRUSTED).status_code == 204
    assert client("GET", url).status_code == 401
    assert client("GET", url, headers=TRUSTED).json() == said
    assert not any(b"confidential" in path.read_bytes() for path in folder.iterdir())
    argv = ["evidence", "show", "chatcmpl-2", "--dir", str(folder)]
    assert main([*argv, "--key", str(folder.parent / "key"), "--html", str(folder.parent / "page.html")]) == 0
    assert " confidential</span>" in (folder.parent / "page.html").read_text()
    capsys.readouterr()
    assert main([*argv, "--key", str(folder.parent / "key")]) == 0
    assert " w" in capsys.readouterr().out
    client("DELETE", "/v1/evidence/requests/chatcmpl-2", headers=TRUSTED)
    assert client("GET", url, headers=TRUSTED).status_code == 404
    assert [row for path in sealed_files.files(folder) for row in sealed_in(path)] == []


def sealed_in(path: Path) -> list[bytes]:
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT sealed FROM content").fetchall()
    connection.close()
    return [row[0] for row in rows]


def test_content_of_a_request_that_is_not_kept_never_reaches_the_disk(made):
    client, folder = made
    answer = client("PUT", "/v1/evidence/content/chatcmpl-calm", json={"token_ids": [1, 2]}, headers=TRUSTED)
    assert answer.status_code == 404 and sealed_files.files(folder) == []


@pytest.mark.parametrize("said", [{}, {"tokens": ["a"], "token_ids": [1, 2]}, {"tokens": ["a"], "text": "a"}])
def test_content_that_does_not_fit_together_is_refused(made, said):
    client, _ = made
    assert client("PUT", "/v1/evidence/content/chatcmpl-2", json=said, headers=TRUSTED).status_code == 422


def test_without_a_key_nothing_that_was_said_is_kept(tmp_path, token_file):
    core = Core(watchlist(FEATURES))
    evidence = Evidence(EvidenceSettings(tmp_path / "e", token_file=token_file), watchlist(FEATURES), lambda: NOW)
    client = Client(app_of(core, NOW, evidence=evidence))
    answer = client("PUT", "/v1/evidence/content/x", json={"token_ids": [1]}, headers=TRUSTED)
    assert answer.status_code == 403 and "--evidence-key" in answer.json()["detail"]
    evidence.close()


def test_every_reading_is_in_the_audit_log(made):
    client, folder = made
    client("GET", "/v1/evidence/exceedances", params={"feature": "deceive"})
    client("GET", "/v1/evidence/requests/chatcmpl-2")
    client("DELETE", "/v1/evidence/requests/chatcmpl-2", headers=TRUSTED)
    audit = Audit(folder)
    assert [(e.action, e.subject, e.actor) for e in audit.entries()][::-1] == [
        ("query", "feature=deceive", "http:127.0.0.1"),
        ("show", "", "http:127.0.0.1"),
        ("delete", "", "http:127.0.0.1"),
    ]
    assert [e.action for e in audit.entries(request="chatcmpl-2")] == ["delete", "show"]
    audit.close()


def test_what_cannot_be_audited_is_not_read(made):
    client, folder = made
    audit = Audit(folder)
    audit._connection.execute("DROP TABLE entry")
    audit.close()
    answer = client("GET", "/v1/evidence/requests/chatcmpl-2")
    assert answer.status_code == 503 and "audit" in answer.json()["detail"] and "exceedances" not in answer.text


def test_without_evidence_the_routes_say_how_to_turn_it_on():
    client = Client(app_of(Core(watchlist(FEATURES)), NOW))
    answer = client("GET", "/v1/evidence/exceedances")
    assert answer.status_code == 404 and "--evidence DIR" in answer.json()["detail"]


def test_without_a_token_file_nothing_is_deleted_over_http(tmp_path):
    core = Core(watchlist(FEATURES))
    evidence = Evidence(EvidenceSettings(tmp_path / "e"), watchlist(FEATURES), lambda: NOW)
    client = Client(app_of(core, NOW, evidence=evidence))
    answer = client("DELETE", "/v1/evidence/requests/x", headers={"authorization": "Bearer "})
    assert answer.status_code == 403 and "--evidence-token" in answer.json()["detail"]
    evidence.close()


@pytest.mark.parametrize(("content", "mode"), [("short", 0o600), ("two words here now", 0o600), ("x" * 40, 0o644)])
def test_a_weak_or_open_token_file_is_refused(tmp_path, content, mode):
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigRefused) as refused:
        Evidence(EvidenceSettings(tmp_path / "e", token_file=path), watchlist(FEATURES), lambda: NOW)
    assert refused.value.reason == "evidence_token"


def test_a_collector_that_went_on_from_its_state_writes_nothing_twice(tmp_path):
    """The journal tells the same batches again; the same request has the same key."""
    for _ in range(2):
        evidence = Evidence(EvidenceSettings(tmp_path), watchlist(FEATURES), lambda: NOW)
        core = Core(watchlist(FEATURES), evidence=[evidence.put])
        core.ingest.hello(hello(), NOW)
        for sequence, batch in enumerate(Schedule.one_step(seen()[:2]).batches(FEATURES), start=1):
            core.ingest.observe(hello(), received(sequence, batch), NOW)
        evidence.close()
    evidence = Evidence(EvidenceSettings(tmp_path), watchlist(FEATURES), lambda: NOW)
    (one,) = asyncio.run(evidence.find("chatcmpl-1", "test"))
    evidence.close()
    assert all(len(a.positions) == len(set(a.positions)) for a in one.activations)


def test_a_deletion_names_the_files_that_may_still_hold_the_request(made):
    """And what is in the others is deleted all the same."""
    client, folder = made
    damaged = folder / "2025-11-01.0000.evidence"
    damaged.write_bytes(b"no database " * 100)
    answer = client("DELETE", "/v1/evidence/requests/chatcmpl-2", headers=TRUSTED).json()
    assert answer["requests"] == 1 and not answer["clean"] and damaged.name in answer["damaged_files"][0]
    gone = client("DELETE", "/v1/evidence/requests/chatcmpl-2", headers=TRUSTED)
    assert gone.status_code == 404 and damaged.name in gone.json()["detail"]
    assert client("GET", "/v1/evidence/requests/chatcmpl-1").status_code == 200
    assert "latentwatch_evidence_damaged_files 1" in client("GET", "/metrics").text


def test_no_evidence_is_written_of_what_the_journal_does_not_have(tmp_path, monkeypatch):
    """Killed then, the collector is sent it again, and would find the request twice, once as if it ran for ever."""
    monkeypatch.setattr("latentwatch.collector.service._TICK_SECONDS", 60.0)
    with collector(tmp_path, state=tmp_path / "state", evidence=EvidenceSettings(tmp_path / "evidence")) as service:
        sink = service._parts.sink
        exceed(service, sink=sink)
        time.sleep(0.6)
        assert not list((tmp_path / "evidence").glob("*.evidence"))
        sink.commit()
        eventually(lambda: Archive(tmp_path / "evidence").find("chatcmpl-1-0123abcd"))


def test_a_request_that_only_the_memory_knows_is_deleted_and_said_to_be(tmp_path, token_file):
    """It ended without an exceedance: no evidence was written of it, and the collector shows it all the same."""
    evidence = Evidence(EvidenceSettings(tmp_path / "e", token_file=token_file), watchlist(FEATURES), lambda: NOW)
    core = Core(watchlist(FEATURES), evidence=[])
    core.ingest.hello(hello(), NOW)
    quiet = [tokens(np.random.default_rng(0), FEATURES, handle=1, total=40, prompt_tokens=10)]
    for batch in Schedule.one_step(quiet).batches(FEATURES):
        core.ingest.observe(hello(), received(1, batch), NOW)
    client = Client(app_of(core, NOW, evidence=evidence))
    url = "/v1/evidence/requests/chatcmpl-1"
    dry = client("DELETE", url, headers=TRUSTED, params={"dry_run": "true"}).json()
    assert (dry["requests"], dry["memory_only"], dry["dry_run"]) == (1, 1, True)
    assert client("GET", "/v1/requests/chatcmpl-1").status_code == 200
    answer = client("DELETE", url, headers=TRUSTED)
    assert answer.status_code == 200
    said = answer.json()
    assert (said["requests"], said["memory_only"], said["rows"], said["clean"]) == (1, 1, 0, True)
    assert [one["response_id"] for one in said["deleted"]] == ["chatcmpl-1"]
    assert client("GET", "/v1/requests/chatcmpl-1").status_code == 404
    assert client("DELETE", url, headers=TRUSTED).status_code == 404
    evidence.close()


def test_evidence_is_not_asked_for_a_feature_or_model_that_it_never_heard_of(made):
    client, _ = made
    answer = client("GET", "/v1/evidence/exceedances", params={"feature": "deceiv"})
    assert answer.status_code == 422 and "Did you mean deceive?" in answer.json()["detail"]
    assert client("GET", "/v1/evidence/exceedances", params={"model_name": "nobody"}).status_code == 422
