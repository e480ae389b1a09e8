"""With a key, a clear request id is nowhere behind the collector's receiver, and still finds its request."""

from __future__ import annotations

import hashlib
import json
import re
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch import secrets
from latentwatch.client_ids import IdKind
from latentwatch.collector.core import Core
from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.evidence import EvidenceSettings
from latentwatch.collector.pseudonyms import Pseudonyms, PseudonymSink
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.drift.canary import canary_id, canary_prompt
from latentwatch.errors import ConfigRefused
from latentwatch.evidence.store import Retention
from latentwatch.transport.sender import Sender
from latentwatch.watchlist import file as watchlist_file

from tests.support.collectors import FEATURES, collector
from tests.support.streams import Piece, Tokens, hello, received, received_report, step_batch, watchlist
from tests.support.wire import eventually

KEY = "k" * 32
SECRET = "alice-and-her-diagnosis"
ENGINE_ID, RESPONSE_ID = f"chatcmpl-{SECRET}-0123abcd", f"chatcmpl-{SECRET}"


def exceeding(sha256: str, request_id: str = ENGINE_ID) -> tuple[Any, Any]:
    """An engine's hello, and its batch with one request that exceeds a limit and ends."""
    act = np.zeros((4, 2), np.float32)
    act[2, 0] = 5.0
    request = Tokens(1, 2, act, np.ones(4, int), np.ones((4, 1), np.float32), request_id=request_id)
    batch = step_batch(
        [Piece(request, 0, 4)],
        FEATURES,
        time_unix_nano=time.time_ns(),
        opened=[request.opened()],
        closed=[request.closed()],
    )
    return hello(watchlist_sha256=sha256), batch


def key_file(folder: Path) -> Path:
    path = folder / "ids.key"
    secrets.write(path, KEY.encode())
    return path


def ask(service: Service, path: str, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(service.http_url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_clear_id_is_in_no_file_and_no_answer_and_finds_the_request(tmp_path):
    settings = {
        "state": tmp_path / "state",
        "evidence": EvidenceSettings(tmp_path / "evidence", Retention(30, 1 << 30, 24)),
        "request_id_key_file": key_file(tmp_path),
    }
    with collector(tmp_path, **settings) as service:
        who, batch = exceeding(service.core.watchlist.sha256)
        sender = Sender(f"unix://{tmp_path}/c.sock", who)
        sender.start()
        sender.offer(batch)
        assert sender.close(20).dropped_batches == 0
        eventually(lambda: b"hmac-" in ask(service, f"/v1/evidence/requests/{RESPONSE_ID}")[1])
        for found in (ENGINE_ID, RESPONSE_ID):
            for path in ("/v1/requests/", "/v1/evidence/requests/"):
                code, body = ask(service, path + found)
                (request,) = json.loads(body)["requests"]
                assert code == 200 and request["request_id"].startswith("hmac-")
        hashed = json.loads(ask(service, f"/v1/requests/{ENGINE_ID}")[1])["requests"][0]["request_id"]
        assert ask(service, f"/v1/requests/{hashed}")[0] == 200
        answers = [
            ask(service, path, Accept="application/openmetrics-text")
            for path in (
                "/metrics",
                "/v1/overview",
                "/v1/requests",
                "/v1/exceedances",
                "/v1/drift",
                "/v1/anomalies",
                f"/v1/requests/{RESPONSE_ID}",
                "/v1/evidence/exceedances",
                f"/v1/evidence/requests/{RESPONSE_ID}",
            )
        ]
        assert all(code == 200 and SECRET.encode() not in body for code, body in answers)
        assert hashed.encode() in answers[0][1], "the exemplar leads to the request by the hash"
        journal = b"".join(path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file())
        assert hashed.encode() in journal
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    with collector(tmp_path, **settings) as service:
        assert ask(service, f"/v1/requests/{RESPONSE_ID}")[0] == 200


def test_a_sidecars_hash_is_the_gateways_where_both_have_the_key():
    pseudonyms = Pseudonyms(KEY.encode(), lambda _: False)
    sidecar = Core(watchlist(FEATURES), forward_boot_id="f" * 32)
    gateway = Core(watchlist(FEATURES), pseudonyms=pseudonyms)
    who, batch = exceeding(sidecar.watchlist.sha256)
    forwarder = hello(replica="pod-0", engine="", model_name="", forwards=True)
    sink, behind = PseudonymSink(sidecar.ingest, pseudonyms), PseudonymSink(gateway.ingest, pseudonyms)
    sink.hello(who, 1000.0)
    behind.hello(forwarder, 1000.0)
    sink.observe(who, received(1, batch), 1000.0)
    sidecar.ingest.tick(1001.0)
    assert sidecar.outbox is not None
    ((number, report),) = sidecar.outbox.reports
    assert SECRET not in repr(report)
    behind.merge(forwarder, received_report(number, report), 1001.0)
    (serial,) = gateway.lookup.find(RESPONSE_ID)
    assert gateway.lookup.find(ENGINE_ID) == [serial]
    clear = replace(
        report,
        requests=tuple(replace(row, info=replace(row.info, request_id=ENGINE_ID), number=9) for row in report.requests),
    )
    behind.merge(forwarder, received_report(number + 1, clear), 1001.0)
    assert len(gateway.lookup.find(RESPONSE_ID)) == 2, "a sidecar without the key: the gateway hashes"


def test_a_canary_run_keeps_the_id_by_which_it_is_known():
    canary = b"0123456789abcdef"
    pseudonyms = Pseudonyms(KEY.encode(), lambda id: canary_prompt(canary, id) is not None)
    ours = f"cmpl-{canary_id(canary, 3, '0' * 16)}-0-0123abcd"
    assert pseudonyms.of(ours, "") == (ours, "") and ours in pseudonyms.meanings(ours)[IdKind.REQUEST]
    forged = ours.replace("lwcanary-3", "lwcanary-4")
    assert pseudonyms.of(forged, "")[0] != forged
    assert pseudonyms.of("", "") == ("", "")


def test_a_client_cannot_be_kept_under_the_hash_of_another():
    pseudonyms = Pseudonyms(KEY.encode(), lambda id: False)
    hash, _ = pseudonyms.of("chatcmpl-theirs", "")
    assert pseudonyms.of(hash, "") != (hash, "")  # an engine's client calls its request so
    assert pseudonyms.of(hash, "", forwarded=True) == (hash, "")


def test_a_route_cannot_be_read_from_a_hash(tmp_path):
    settings = {"request_id_key_file": key_file(tmp_path), "drift": DriftSettings(route=re.compile("x"))}
    path = tmp_path / "w.safetensors"
    watchlist_file.write(watchlist(FEATURES), path)
    with pytest.raises(ConfigRefused, match="does not tell its route"):
        Service(CollectorSettings(path, (f"unix://{tmp_path}/c.sock",), "127.0.0.1:0", **settings))


@pytest.mark.parametrize(("content", "mode"), [("short", 0o600), (KEY, 0o644)])
def test_a_key_that_protects_nothing_is_refused(tmp_path, content, mode):
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigRefused) as refused:
        Pseudonyms.read(path, lambda _: False)
    assert refused.value.reason == "request_id_key"


def test_a_pseudonym_is_the_hmac_under_the_key_and_nobody_without_it_can_name_a_request():
    """RFC 2104 written out, so that neither the key nor a part of the digest can go missing."""

    def expected(key: bytes, name: str) -> str:
        padded = key.ljust(64, b"\0")
        inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + name.encode()).digest()
        return "hmac-" + hashlib.sha256(bytes(byte ^ 0x5C for byte in padded) + inner).hexdigest()[:32]

    one, other = (Pseudonyms(key, lambda _: False) for key in (b"k" * 32, b"k" * 31 + b"l"))
    assert one.of("session") == expected(b"k" * 32, "session")
    assert other.of("session") == expected(b"k" * 31 + b"l", "session") != one.of("session")
