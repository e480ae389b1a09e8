"""What every request has to pass before anybody looks at it: a `Host` of ours, no other site's page, a place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from latentwatch.collector.http.hosts import Hosts
from latentwatch.errors import RefusalReason

RESERVED_PATHS: Final = frozenset({"/healthz", "/metrics"})
"""They are answered where all other places are taken."""


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
    headers: dict[bytes, bytes] = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    if not hosts.is_ours(host):
        said = (
            f"Host {host[:256]!r} is no name of this collector. Ask it by its address, or give it --http-host NAME.\n"
        )
        return RefusalReason.HTTP_HOST, PlainTextResponse(said, 421)
    if hosts.is_from_elsewhere(scope["method"], host, headers):
        return RefusalReason.HTTP_ORIGIN, PlainTextResponse("Another site's page may not ask this collector.\n", 403)
    return None
