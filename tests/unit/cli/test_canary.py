"""What `latentwatch canary` sends, and what it says of a server that does not answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from latentwatch import secrets
from latentwatch.cli import main
from latentwatch.drift import canary


@pytest.fixture
def shown() -> list[str | None]:
    """What the server was shown as authorization."""
    return []


@pytest.fixture
def server(shown: list[str | None]) -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    """A model's server, and what it was sent: path, request id, body."""
    sent: list[tuple[str, str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            shown.append(self.headers["authorization"])
            sent.append((self.path, self.headers["x-request-id"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_address[1]}", sent
    made.shutdown()
    made.server_close()


def test_each_prompt_is_sent_in_turn_signed_and_computed_anew(tmp_path, server):
    url, sent = server
    (tmp_path / "safe.txt").write_text("Hello\n\nGood morning\n")
    files = ["--prompts", str(tmp_path / "safe.txt"), "--key", str(tmp_path / "key"), "--make-key"]
    assert main(["canary", "--server", f"{url}/", "--model", "m", *files, "--every", "0", "--runs", "3"]) == 0
    key = canary.read_key(tmp_path / "key")
    assert [canary.canary_prompt(key, name) for _, name, _ in sent] == [0, 1, 0]
    assert {path for path, _, _ in sent} == {"/v1/chat/completions"}
    assert [body["messages"][0]["content"] for _, _, body in sent] == ["Hello", "Good morning", "Hello"]
    assert len({body["cache_salt"] for _, _, body in sent}) == 3
    assert {(body["model"], body["max_tokens"], body["temperature"]) for _, _, body in sent} == {("m", 1, 0)}


def test_a_server_that_does_not_answer_is_named_once_and_the_last_failure_is_the_exit_code(tmp_path, capsys):
    (tmp_path / "safe.txt").write_text("Hello\n")
    canary.make_key(tmp_path / "key")
    files = ["--prompts", str(tmp_path / "safe.txt"), "--key", str(tmp_path / "key")]
    told = ["canary", "--server", "http://127.0.0.1:1", "--model", "m", *files, "--every", "0"]
    assert main([*told, "--runs", "3"]) == 1
    assert capsys.readouterr().out.count("latentwatch canary: prompt 0: ") == 1
    assert main([*told, "--runs", "1", "--make-key"]) == 2
    assert "Leave out --make-key" in capsys.readouterr().err


def test_an_api_key_of_a_file_or_the_environment_is_sent_and_never_shown(tmp_path, server, shown, monkeypatch, capfd):
    url, _ = server
    (tmp_path / "safe.txt").write_text("Hello\n")
    canary.make_key(tmp_path / "key")
    secrets.write(tmp_path / "api", b"sk-lw-42\n")
    monkeypatch.setenv("MY_KEY", "sk-env-43")
    files = ["--prompts", str(tmp_path / "safe.txt"), "--key", str(tmp_path / "key")]
    told = ["canary", "--server", url, "--model", "m", *files, "--every", "0", "--runs", "1"]
    assert main([*told, "--api-key-file", str(tmp_path / "api")]) == 0
    assert main([*told, "--api-key-env", "MY_KEY"]) == 0
    assert main(told) == 0
    assert shown == ["Bearer sk-lw-42", "Bearer sk-env-43", None]
    said = capfd.readouterr()
    assert "sk-" not in said.out + said.err
    assert main([*told, "--api-key-env", "NOT_SET"]) == 2
    (tmp_path / "api").write_text("two words")
    assert main([*told, "--api-key-file", str(tmp_path / "api")]) == 2
    assert "two words" not in capfd.readouterr().err


def test_how_far_it_is_stands_on_standard_error(tmp_path, server, capfd):
    url, _ = server
    (tmp_path / "safe.txt").write_text("Hello\n")
    canary.make_key(tmp_path / "key")
    files = ["--prompts", str(tmp_path / "safe.txt"), "--key", str(tmp_path / "key")]
    assert main(["canary", "--server", url, "--model", "m", *files, "--every", "0", "--runs", "3"]) == 0
    said = capfd.readouterr()
    assert said.err.splitlines() == ["latentwatch canary: 1 of 3 sent, 0 not answered"] and said.out == ""
