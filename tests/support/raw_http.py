"""HTTP as it is on the wire: what no client library would send."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from http.client import HTTPResponse
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes


def connect(url: str, *, timeout: float = 20.0) -> socket.socket:
    """A TCP connection to where `url` is served."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    return socket.create_connection((parts.hostname, parts.port), timeout=timeout)


def ask(
    url: str, path: str = "/", *, method: str = "GET", headers: dict[str, str] | None = None, body: bytes = b""
) -> Answer:
    """The answer to one request with exactly these headers; a Host is added where there is none."""
    lines = {"Host": urlsplit(url).netloc, "Connection": "close", **(headers or {})}
    text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items() if v) + "\r\n"
    with connect(url) as peer:
        peer.sendall(text.encode("latin-1") + body)
        return answer(peer)


def answer(peer: socket.socket, method: str = "GET") -> Answer:
    """The next answer on a connection."""
    with HTTPResponse(peer, method=method) as response:
        response.begin()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def hung_up(peer: socket.socket) -> bool:
    """Whether the other side closed; what it says before is read away."""
    try:
        while peer.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True
