"""How verbs talk HTTP: what is followed, what is shown to whom, and what is too much."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from latentwatch.cli.http_client import Web
from latentwatch.errors import ConfigRefused

TOKEN = "correct-horse-battery-staple"


class Service:
    """A server that notes what it was asked. /to/ADDRESS redirects, /large has no end."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service.asked.append((self.command, self.path, self.headers.get("authorization", "")))
                if self.path.startswith("/to/"):
                    self.send_response(302)
                    self.send_header("location", self.path.removeprefix("/to/"))
                elif self.path == "/wrong":
                    self.send_response(503)
                else:
                    self.send_response(200)
                self.send_header("connection", "close")
                self.end_headers()
                if self.path == "/large":
                    self.wfile.write(bytes(1 << 16))
                elif self.path != "/wrong":
                    self.wfile.write(b'{"answer": 42}')

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.do_GET()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


def refused(found: str) -> Any:
    return pytest.raises(ConfigRefused, match=found)


def test_a_path_is_asked_with_its_query_and_the_token(service):
    assert Web(service.url + "/", TOKEN).json("/v1/overview", features="0", search="a b&c") == {"answer": 42}
    assert service.asked == [("GET", "/v1/overview?features=0&search=a+b%26c", f"Bearer {TOKEN}")]
    Web(service.url).post("/v1/chat/completions", {"model": "m"}, {"x-request-id": "r"})
    assert service.asked[1:] == [("POST", "/v1/chat/completions", "")]


def test_no_proxy_is_asked_for_this_host(service, monkeypatch):
    other = Service()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, other.url)
        monkeypatch.setenv(name.upper(), other.url)
    assert Web(service.url).json("/") == {"answer": 42}
    assert Web(f"http://localhost:{service.port}").json("/") == {"answer": 42}
    assert not other.asked
    assert Web("http://collector.example:9464").json("/healthz") == {"answer": 42}
    assert other.asked[0][1].startswith("http://collector.example:9464/")
    other.close()


def test_a_redirect_is_followed_and_the_token_stays_with_its_host(service):
    other = Service()
    web = Web(service.url, TOKEN)
    assert web.json("/to//there") == {"answer": 42}
    assert web.json(f"/to/{other.url}/elsewhere") == {"answer": 42}
    assert [token for _, _, token in service.asked] == [f"Bearer {TOKEN}"] * 3
    assert other.asked == [("GET", "/elsewhere", "")]
    other.close()


def test_a_circle_of_redirects_ends_and_a_post_follows_none(service):
    with refused("redirects"):
        Web(service.url).get(f"/to/{service.url}/to//to//to//to//to//to//to//x")
    count = len(service.asked)
    with refused("/to//there answers 302 Found"):
        Web(service.url).post("/to//there", {}, {})
    assert len(service.asked) == count + 1


def test_what_is_no_answer_is_refused_by_name(service):
    with refused("more than 1000 bytes"):
        Web(service.url, max_bytes=1000).get("/large")
    with refused("/wrong answers 503 Service Unavailable"):
        Web(service.url).get("/wrong")
    with refused("answers no JSON"):
        Web(service.url).json("/large")
    service.close()
    for url, found in (
        (service.url, "refused"),
        ("ftp://here", "does not begin"),
        ("http://here:port", "Invalid port"),
    ):
        with refused(found) as error:
            Web(url).get("/")
        assert error.value.reason == "unreachable" and error.value.what == url
