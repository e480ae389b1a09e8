"""What comes over sockets and through the ring: messages, replies, HTTP, events."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import uvicorn
from latentwatch.collector.core import Core
from latentwatch.collector.http.app import make_app
from latentwatch.collector.http.connection import Connection, Doors, HttpLimits, bounded
from latentwatch.collector.http.hosts import Hosts
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.errors import StreamRefused
from latentwatch.handover.events import Blocks, Closed, Opened, Unannounced, decode_events, encode_events
from latentwatch.transport import codec
from latentwatch.transport.hello import Hello
from latentwatch.transport.sink import ReceivedBatch
from uvicorn.server import ServerState

from tests.fuzz.messages import Messages
from tests.fuzz.targets.documents import FEATURES
from tests.fuzz.targets.target import Target
from tests.support.streams import hello, watchlist
from tests.support.wire import same


def _request(data: bytes) -> None:
    request = codec.decode_request(data)
    if isinstance(request, Hello):
        assert codec.decode_request(codec.encode_hello(request, last_acked_sequence=0, time_unix_nano=0)) == request
    elif isinstance(request, ReceivedBatch):
        again = codec.decode_request(codec.encode_batch(request.sequence, request.batch))
        assert isinstance(again, ReceivedBatch)
        assert again.sequence == request.sequence and same(again.batch, request.batch)
    else:
        again = codec.decode_request(codec.encode_report(request.sequence, request.report))
        assert repr(replace(again, message=b"")) == repr(replace(request, message=b""))


def _reply(data: bytes) -> None:
    reply = codec.decode_reply(data)
    again = codec.decode_reply(codec.encode_reply(reply))
    if isinstance(reply, StreamRefused):
        assert isinstance(again, StreamRefused) and vars(again) == vars(reply)
    else:
        assert again == reply


def _events(data: bytes) -> None:
    events = decode_events(data)
    assert decode_events(encode_events(events)) == events


class _Socket(asyncio.Transport):
    """Takes what is written, until it is closed."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.said = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        self.said += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _Collector:
    """The HTTP side of a collector, asked without a socket."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        core, hosts = Core(watchlist(FEATURES)), Hosts([])
        core.ingest.hello(hello(watchlist_sha256=core.watchlist.sha256), 1000.0)

        async def forget(name: str) -> bool:
            core.forget(name)
            return True

        app = make_app(
            core.lookup, clock=lambda: 1000.0, process=lambda: ProcessFacts(1.0, 2, 3.0), forget=forget, hosts=hosts
        )
        self.config = uvicorn.Config(bounded(app), ws="none", lifespan="off", log_config=None, log_level="critical")
        self.config.load()
        self.state = ServerState()
        self.doors = Doors(HttpLimits(), lambda _reason: None)

    async def ask(self, data: bytes) -> bytes:
        """What is answered to these bytes, which come in two pieces."""
        made = Connection(
            tls=None, doors=self.doors, app_state={}, config=self.config, server_state=self.state, _loop=self.loop
        )
        socket = _Socket()
        made.connection_made(socket)
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            if not socket.closed and part:
                made.data_received(part)
        for _ in range(50):
            if not self.state.tasks:
                break
            await asyncio.wait(set(self.state.tasks), timeout=0.2)
            if not socket.closed and all(task.done() for task in self.state.tasks):
                break
            # A body that does not come; the peer goes.
            made.connection_lost(None)
            await asyncio.sleep(0)
        made.connection_lost(None)
        return bytes(socket.said)


@cache
def _collector() -> _Collector:
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    return _Collector()


_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")


def _http(data: bytes) -> None:
    served = _collector()
    said = served.loop.run_until_complete(served.ask(data))
    assert not said or _STATUS.match(said), said[:80]
    assert not [status for status in _STATUS.findall(said) if status >= b"500" and status != b"503"], said[:300]


_HOST = b" HTTP/1.1\r\nHost: localhost\r\n"


def _http_seeds() -> Sequence[bytes]:
    paths = ["/", "/healthz", "/metrics", "/openapi.json", "/v1/overview?features=4&search=a", "/v1/requests?limit=3"]
    paths += ["/v1/requests/a%2Fb", "/v1/drift/observed?model_name=toy", "/v1/evidence/exceedances?feature=a"]
    asked = [b"GET " + path.encode() + _HOST + b"\r\n" for path in paths]
    bearer = b"Authorization: Bearer x\r\nContent-Type: application/json\r\n"
    body = b'{"tokens":["a"]}'
    asked.append(b"PUT /v1/evidence/content/a" + _HOST + bearer + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    asked.append(b"DELETE /v1/evidence/requests/a" + _HOST + bearer + chunked)
    asked.append(
        b"GET /metrics" + _HOST + b"Accept: application/openmetrics-text;version=1.0.0;q=0.5\r\n\r\n" + asked[0]
    )
    asked.append(
        b"GET /" + _HOST + b"Origin: http://localhost\r\nAuthorization: Basic YTpi\r\nExpect: 100-continue\r\n\r\n"
    )
    return asked


def _event_seeds() -> Sequence[bytes]:
    opened = Opened(1, 7, "cmpl-1", 10, 4, "adapter", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    return [encode_events([opened, Closed(1, 4, False), Blocks([[1, 0, 2, 7, 8]]), Unannounced(2, 9, 9)])]


@cache
def _messages() -> list[bytes]:
    made = Messages(0)
    return [*made._real[:6], *made._real[-4:], *(made._made_up() for _ in range(8))]


def _reply_seeds() -> Sequence[bytes]:
    refusal = StreamRefused("a", found="b", instead="c", reason="malformed_batch")
    return [codec.encode_reply(reply) for reply in (codec.Welcome(7, "0" * 32), codec.Ack(7), refusal)]


WIRE = [
    Target(
        "stream messages",
        _request,
        _messages,
        ("transport/codec/__init__.py", "transport/codec/batch.py", "transport/codec/report.py"),
    ),
    Target("stream replies", _reply, _reply_seeds, ("transport/codec/__init__.py",)),
    Target(
        "HTTP",
        _http,
        _http_seeds,
        tuple(
            f"collector/http/{name}.py"
            for name in ("connection", "guard", "hosts", "auth", "bodies", "app", "evidence_api", "overview")
        ),
        (
            b"\r\n",
            b"Host: ",
            b"Content-Length: ",
            b"Transfer-Encoding: chunked",
            b"Origin: ",
            b"Connection: close",
            b"%00",
            b"%2e%2e/",
        ),
    ),
    Target("ring events", _events, _event_seeds, ("handover/events.py",)),
]
