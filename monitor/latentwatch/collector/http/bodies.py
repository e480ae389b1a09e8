"""Bodies of requests: read once the rest of a request is accepted, piece by piece, within a bound and a deadline.

FastAPI would read a declared body whole before it asks a dependency whether the request may be made at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect

from latentwatch.errors import RefusalReason

MAX_BODY_BYTES: Final = 16 << 20
BODY_SECONDS: Final = 30.0
"""For all of it to come; 16 MiB take so long at 4.5 Mbit/s."""
_MOST_AT_ONCE: Final = 4
BODY_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    408: {"description": "the body did not come in time"},
    413: {"description": "the body is too large"},
    415: {"description": "the body is compressed, or no JSON"},
    503: {"description": "too many bodies come at once, or the evidence cannot be read or its reading audited"},
}
M = TypeVar("M", bound=msgspec.Struct)


class Bodies:
    """Reads them, a few at once."""

    def __init__(self, max_bytes: int, on_refused: Callable[[str], None]) -> None:
        self._max_bytes = max_bytes
        self._on_refused = on_refused
        self._reading = 0

    async def read(self, request: Request, model: type[M]) -> M:
        """The body as JSON of this model. Raises HTTPException 408, 413, 415 or 503, and RequestValidationError."""
        self._check_headers(request)
        if self._reading >= _MOST_AT_ONCE:
            raise HTTPException(503, f"{self._reading} other bodies are being read", {"retry-after": "1"})
        self._reading += 1
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._whole(request)
            # Straight into the model, and no further than it fits: pydantic would make a tree of anything first.
            return await asyncio.to_thread(msgspec.json.decode, body, type=model)
        except TimeoutError as error:
            self._on_refused(RefusalReason.HTTP_SLOW)
            raise HTTPException(408, f"the body did not come within {BODY_SECONDS:g} s") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the body did not come") from error
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            wrong = {"type": "value_error", "loc": ("body",), "msg": str(error)[:300]}
            raise RequestValidationError([wrong]) from error
        finally:
            self._reading -= 1

    def _check_headers(self, request: Request) -> None:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if media != "application/json" or coding != "identity":
            self._on_refused(RefusalReason.HTTP_MALFORMED)
            found = f"{media[:64] or 'no type'}, coding {coding[:64]}"
            raise HTTPException(415, f"the body is {found}. Send application/json, not compressed.")
        if int(request.headers.get("content-length", "0")) > self._max_bytes:
            raise self._too_large()

    async def _whole(self, request: Request) -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._max_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> HTTPException:
        self._on_refused(RefusalReason.HTTP_MALFORMED)
        return HTTPException(413, f"the body has more than {self._max_bytes} bytes; see --http-body-mib")


def json_body(model: type[msgspec.Struct]) -> dict[str, Any]:
    """What OpenAPI says of such a body."""
    _, schemas = msgspec.json.schema_components((model,))
    schema = schemas[model.__name__]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
