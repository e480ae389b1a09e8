"""Who may do what over HTTP, by the token that a request shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from fastapi import HTTPException
from fastapi.security import HTTPBasic, HTTPBearer
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    AuthenticationError,
    BaseUser,
    UnauthenticatedUser,
)
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response

from latentwatch.errors import RefusalReason
from latentwatch.transport.credentials import Tokens

READ: Final = "read"
"""What is told of now: metrics, the page, the API."""
EVIDENCE: Final = "evidence"
"""Reading what was written down."""
ERASE: Final = "erase"
"""Deleting evidence, and putting and getting what was said."""
BEARER: Final = HTTPBearer(auto_error=False, description="The token of --evidence-token.")
_BASIC: Final = HTTPBasic(auto_error=False)


class Access(AuthenticationBackend):
    """The scopes of a request. Whoever has a token of either kind may read: a request has room for one."""

    def __init__(
        self,
        readers: Tokens | None,
        erasers: Tokens | None,
        on_refused: Callable[[str], None],
        *,
        evidence_is_open: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        Args: readers: None lets everyone read.   erasers: None lets nobody erase.
              evidence_is_open: whether without `readers` everyone may read evidence too; else any token is needed.
        """
        self._readers = readers
        self._erasers = erasers
        self._evidence_is_open = evidence_is_open
        self._on_refused = on_refused

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser]:
        """Raises AuthenticationError where it may not even read; /healthz is for all: a kubelet can show no token."""
        token, as_bearer = await _shown(Request(conn.scope))
        erases = self._erasers is not None and token in self._erasers
        is_known = erases or (self._readers is not None and token in self._readers)
        if not is_known and self._readers is not None and conn.scope["path"] != "/healthz":
            self._on_refused(RefusalReason.HTTP_UNAUTHENTICATED)
            raise AuthenticationError
        scopes = [READ] if is_known or self._readers is None else []
        if is_known or (self._readers is None and self._evidence_is_open()):
            scopes.append(EVIDENCE)
        if erases and as_bearer:  # what a browser sends by itself erases nothing
            scopes.append(ERASE)
        return AuthCredentials(scopes), UnauthenticatedUser()


def challenge(_: HTTPConnection, __: AuthenticationError) -> Response:
    """Basic, so that a browser asks for it: any user name, the token as the password. Scrapers send it as Bearer."""
    headers = {"www-authenticate": 'Basic realm="latentwatch", charset="UTF-8"'}
    return PlainTextResponse("Show the token of --http-token-file.\n", 401, headers)


async def _shown(request: Request) -> tuple[str, bool]:
    """The token that a request shows, empty for none, and whether as Bearer."""
    if bearer := await BEARER(request):
        return bearer.credentials, True
    with contextlib.suppress(HTTPException):  # a password that is none
        if basic := await _BASIC(request):
            return basic.password, False
    return "", False
