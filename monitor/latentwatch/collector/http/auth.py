"""Who may read a collector over HTTP: a token for everything but /healthz, and a deadline for slow requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentwatch.collector.http.app import HEADERS, Asgi, Message, Receive, Send
from latentwatch.transport.credentials import Tokens

REQUEST_SECONDS: Final = 10.0
"""From a connection, or a request's first byte, to the end of its headers; a scraper takes milliseconds."""

_CHALLENGE: Final = (
    # Basic, so that a browser asks for it: any user name, the token as the password. Scrapers send it as Bearer.
    (b"www-authenticate", b'Basic realm="latentwatch", charset="UTF-8"'),
    (b"content-type", b"text/plain; charset=utf-8"),
    *HEADERS,
)


def guarded(app: Asgi, tokens: Tokens, on_refused: Callable[[str], None]) -> Asgi:
    """`app` for those who show a token; /healthz for everyone, because a kubelet can show none."""

    async def guard(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/healthz" or tokens.accept(_authorization(scope)):
            await app(scope, receive, send)
            return
        on_refused("http_unauthenticated")
        await send({"type": "http.response.start", "status": 401, "headers": list(_CHALLENGE)})
        await send({"type": "http.response.body", "body": b"Show the token of --http-token-file.\n"})

    return guard


def impatient(on_refused: Callable[[str], None]) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, with a deadline for each request's headers: it has none itself."""

    class Impatient(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        # uvicorn narrows the argument in the same way, against asyncio's stub.
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._cancel()
            elif self._deadline is None:
                self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def _expect(self) -> None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self._give_up)

        def _cancel(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            on_refused("http_slow")
            self.transport.abort()

    return Impatient


def _authorization(scope: Message) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == b"authorization"), "")
