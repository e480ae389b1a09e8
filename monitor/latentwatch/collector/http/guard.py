"""What every request passes first: bounds on its size, one length, a `Host` of ours, no other site's page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from latentwatch.collector.http.hosts import Hosts
from latentwatch.errors import RefusalReason

RESERVED_PATHS: Final = frozenset({"/healthz", "/metrics"})
"""They are answered where all other places are taken."""

MAX_URL_BYTES: Final = 16 << 10
"""An id is at most a kilobyte, percent-encoded three."""
MAX_HEADERS: Final = 100
MAX_HEADER_BYTES: Final = 32 << 10
"""Of all of them. h11 has a bound for headers that are not whole yet, and none for those that come at once."""
_CLOSE: Final = {"connection": "close"}


def guarded(app: ASGIApp, hosts: Hosts, on_refused: Callable[[str], None]) -> ASGIApp:
    """`app`, which is asked only what is meant for it. Whoever is turned away is counted, and no body is read."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := _refusal(scope, hosts)) is not None:
            reason, response = refusal
            on_refused(reason)
            await response(scope, receive, send)
            return
        await app(scope, receive, send)

    return guard


def _refusal(scope: Scope, hosts: Hosts) -> tuple[RefusalReason, Response] | None:
    if (malformed := _malformed(scope)) is not None:
        return RefusalReason.HTTP_MALFORMED, malformed
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if b"host" not in headers and scope["path"] == "/healthz":
        # HTTP/1.0, as a load balancer's check of health asks by default; a browser always says whom it asks.
        return None
    host = headers.get(b"host", b"").decode("latin-1")
    if not hosts.is_ours(host):
        said = (
            f"Host {host[:256]!r} is no name of this collector. Ask it by its address, or give it --http-host NAME.\n"
        )
        return RefusalReason.HTTP_HOST, PlainTextResponse(said, 421)
    if hosts.is_cross_site(scope["method"], host, headers):
        return RefusalReason.HTTP_ORIGIN, PlainTextResponse("Another site's page may not ask this collector.\n", 403)
    return None


def _malformed(scope: Scope) -> Response | None:
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
        return PlainTextResponse(f"The URL has more than {MAX_URL_BYTES} bytes.\n", 414, _CLOSE)
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        said = f"There are more than {MAX_HEADERS} headers, or {MAX_HEADER_BYTES} bytes of them.\n"
        return PlainTextResponse(said, 431, _CLOSE)
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        # A proxy before this may go by the other one, and take what follows for another request.
        return PlainTextResponse("There is a Content-Length and a Transfer-Encoding.\n", 400, _CLOSE)
    return None
