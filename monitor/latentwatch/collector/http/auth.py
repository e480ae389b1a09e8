"""Who may read a collector over HTTP: a token for everything but /healthz."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from latentwatch.collector.http.asgi import HEADERS, Asgi, Message, Receive, Send
from latentwatch.transport.credentials import Tokens

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


def _authorization(scope: Message) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == b"authorization"), "")
