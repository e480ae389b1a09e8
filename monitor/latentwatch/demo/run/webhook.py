"""The demo's pager: an HTTP server that takes what Alertmanager sends and notes when it arrived."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Final, Self, TypedDict

MAX_BODY_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class Page:
    """One alert in one notification that arrived."""

    at: float
    """Arrival, seconds since the Unix epoch."""
    receiver: str
    status: str
    """"firing" or "resolved"."""
    starts_at: float
    """When Prometheus' rule fired, seconds since the Unix epoch."""
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def alert(self) -> str:
        return self.labels.get("alertname", "")


class Webhook:
    """Context: listens on 127.0.0.1 from entering to leaving; `pages()` is what came so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: list[Page] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.port = int(self._server.server_address[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True, name="demo-webhook").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def pages(self) -> list[Page]:
        """Every alert that arrived, in order of arrival."""
        with self._lock:
            return list(self._pages)

    def _receive(self, body: bytes, at: float) -> None:
        pages = read_notification(json.loads(body), at)
        with self._lock:
            self._pages.extend(pages)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                at = time.time()
                length = int(self.headers.get("Content-Length", "0"))
                try:
                    if not 0 < length <= MAX_BODY_BYTES:
                        raise ValueError(length)
                    webhook._receive(self.rfile.read(length), at)
                    self.send_response(200)
                except (ValueError, KeyError, TypeError, AttributeError):
                    self.send_response(400)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """The demo's own report says what arrived."""

        return Handler


class NotifiedAlert(TypedDict):
    status: str
    startsAt: str
    labels: dict[str, str]
    annotations: dict[str, str]


class Notification(TypedDict):
    """Alertmanager's webhook body, version 4, as far as it is read."""

    receiver: str
    alerts: list[NotifiedAlert]


def read_notification(body: Notification, at: float) -> list[Page]:
    """The alerts of one notification. Raises KeyError or ValueError for another shape."""
    return [
        Page(
            at=at,
            receiver=body["receiver"],
            status=alert["status"],
            starts_at=datetime.fromisoformat(alert["startsAt"]).timestamp(),
            labels=dict(alert["labels"]),
            annotations=dict(alert["annotations"]),
        )
        for alert in body["alerts"]
    ]
