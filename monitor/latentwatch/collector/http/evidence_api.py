"""Evidence over HTTP: /v1/evidence. Reading is as open as the rest of the API, and audited; deleting, and
what was said in a request, need a token."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request, Response, Security
from fastapi.responses import JSONResponse

from latentwatch.client_ids import MAX_ASKED_CHARACTERS, MAX_ID_CHARACTERS, IdKind, meant_kind
from latentwatch.collector.evidence import Evidence, Forget
from latentwatch.collector.http.auth import BEARER, ERASE, EVIDENCE
from latentwatch.collector.http.bodies import BODY_ANSWERS, Bodies, json_body
from latentwatch.collector.http.responses import as_json
from latentwatch.collector.lookup import Lookup
from latentwatch.collector.snapshot import RequestView
from latentwatch.errors import ConfigRefused
from latentwatch.evidence.archive import StoredRequest, Wanted
from latentwatch.evidence.encryption import MAX_TOKENS, Content, Vault
from latentwatch.evidence.segment import Match
from latentwatch.facts import ShownExceedance
from latentwatch.names import Severity

_OFF: Final = "This collector writes no evidence; start it with --evidence DIR."
_CLOSED: Final = (
    "This collector is open to the network and asks readers for no token, so evidence is told to nobody. Start it with "
    "--http-token-file FILE, or with --evidence-readers everyone."
)
_AMBIGUOUS: Final = (
    "Different requests have this id, and more than one may be meant; nothing was deleted. Say by= which kind of id it "
    "is, or give the response id or the engine's own."
)
_LISTED: Final = 10
_NOT_KEPT: Final = "It exceeded no limit, is too old, or was seen by another collector."
_Answers = dict[int | str, dict[str, Any]]
_READ: Final[_Answers] = {
    403: {"description": "this collector tells strangers no evidence, or was not started with what this needs"},
    404: {"description": "no evidence is written here, or no such request is kept"},
    503: {"description": "the evidence cannot be read, or the reading cannot be audited"},
}
_TRUST: Final[_Answers] = _READ | {
    401: {"description": "the token is missing or wrong"},
    409: {"description": "the request still runs, others have this id too, or what is kept cannot be opened"},
}

Id = Annotated[
    str,
    Path(
        max_length=MAX_ASKED_CHARACTERS,
        description="response id, engine request id, trace id, or the X-Request-Id that the client sent; exactly",
    ),
]


@dataclasses.dataclass(frozen=True)
class EvidenceExceedances:
    """Exceedances that are kept, newest first."""

    exceedances: list[ShownExceedance]


@dataclasses.dataclass(frozen=True)
class EvidenceRequests:
    """Requests that are kept, newest first."""

    requests: list[StoredRequest]


@dataclasses.dataclass(frozen=True)
class ErasedRequest:
    """One of the requests that are deleted."""

    request_id: str
    response_id: str


@dataclasses.dataclass(frozen=True)
class EvidenceErased:
    """What was deleted, or would be."""

    by: IdKind
    """As what the id was compared."""
    deleted: list[ErasedRequest]
    """Which requests."""
    dry_run: bool
    requests: int
    rows: int
    clean: bool
    """Whether no trace is left in the files; false while a reader keeps an older state open, or where the collector's
    own state could not be written."""
    memory_only: int = 0
    """Of the requests, those that no evidence was written of: only this collector's memory and state knew them."""
    damaged_files: tuple[str, ...] = ()
    """Files that cannot be used; they may hold rows of this request until they are repaired or removed."""


def _kept(request: Request) -> Evidence:
    evidence: Evidence | None = request.app.state.evidence
    if evidence is None:
        raise HTTPException(404, _OFF)
    if EVIDENCE not in request.auth.scopes:
        raise HTTPException(403, _CLOSED)
    return evidence


Stored = Annotated[Evidence, Depends(_kept)]


def _trusted(request: Request, evidence: Stored, _: Annotated[object, Security(BEARER)]) -> Evidence:
    if evidence.tokens is None:
        raise HTTPException(403, "Start the collector with --evidence-token FILE, or use 'latentwatch evidence'.")
    if ERASE not in request.auth.scopes:
        raise HTTPException(401, "Send the token as 'Authorization: Bearer TOKEN'.", {"www-authenticate": "Bearer"})
    return evidence


Trusted = Annotated[Evidence, Depends(_trusted)]


class ContentIn(msgspec.Struct, forbid_unknown_fields=True):
    """What was said in a request, token by token from the first prompt token on."""

    tokens: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_TOKENS)] = ()
    token_ids: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_TOKENS)] = ()


@dataclasses.dataclass(frozen=True)
class ContentOut:
    """What was said in a request."""

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]


def _vault(evidence: Trusted) -> Vault:
    if evidence.vault is None:
        raise HTTPException(403, "This collector keeps nothing that was said; start it with --evidence-key FILE.")
    return evidence.vault


Sealing = Annotated[Vault, Depends(_vault)]


def add_evidence(app: FastAPI, lookup: Lookup, evidence: Evidence | None, forget: Forget, bodies: Bodies) -> None:
    """Add the routes; they say so where there is no evidence."""
    app.state.evidence = evidence

    @app.exception_handler(OSError)
    @app.exception_handler(sqlite3.Error)
    async def unreadable(_: Request, error: Exception) -> Response:
        # Unread rather than unaudited.
        detail = {"detail": f"the evidence cannot be read, or the reading cannot be noted in its audit log: {error}"}
        return JSONResponse(detail, 503)

    @app.get("/v1/evidence/exceedances", response_model=EvidenceExceedances, responses=_READ, tags=["evidence"])
    async def get_exceedances(
        request: Request,
        evidence: Stored,
        feature: Annotated[str | None, Query(max_length=64)] = None,
        severity: Severity | None = None,
        model_name: Annotated[str | None, Query(max_length=MAX_ID_CHARACTERS)] = None,
        since_seconds: float | None = None,
        until_seconds: float | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """Exceedances, newest first; times are seconds since the Unix epoch."""
        wanted = Wanted(feature, severity, model_name, since_seconds, until_seconds)
        try:
            found = await evidence.exceedances(wanted, limit, _actor(request))
        except ConfigRefused as refusal:
            raise HTTPException(422, str(refusal)) from refusal
        return as_json(EvidenceExceedances(found))

    @app.get(
        "/v1/evidence/requests/{request_id:path}",
        response_model=EvidenceRequests,
        responses=_READ,
        tags=["evidence"],
    )
    async def get_request(request: Request, evidence: Stored, request_id: Id) -> Response:
        """Requests with their exceedances, their summary and their activations by position."""
        if not (found := await evidence.find(request_id, _actor(request))):
            raise HTTPException(404, f"request {request_id[:MAX_ID_CHARACTERS]!r} is not kept. {_NOT_KEPT}")
        return as_json(EvidenceRequests(found))

    @app.delete(
        "/v1/evidence/requests/{request_id:path}",
        response_model=EvidenceErased,
        responses=_TRUST,
        tags=["evidence"],
    )
    async def delete_request(
        request: Request,
        evidence: Trusted,
        request_id: Id,
        by: Annotated[
            IdKind | None, Query(description="what the id is; needed where more than one may be meant")
        ] = None,
        dry_run: Annotated[bool, Query(description="only say what would be deleted")] = False,
    ) -> Response:
        """Delete everything about these requests, and leave no trace in the files, in --state or in memory.

        Only requests whose id this is exactly. Where it is the response id of one and, say, the engine's id of another,
        or that of several responses, nothing is deleted until `by` says which is meant. Counts stay, and that some
        request went above a limit.
        """
        found = await evidence.matches(request_id)
        kind = by or meant_kind(
            [*((match.kinds, match.response_id) for match in found), *_remembered(lookup, request_id)]
        )
        meant = [match for match in found if kind in match.kinds]
        if kind is None or dry_run:
            # Whose id it is was read all the same.
            await evidence.told(request_id, len(found if kind is None else meant), _actor(request))
        if kind is None:
            raise HTTPException(409, f"{_AMBIGUOUS} {_listed(found)}")
        views = [view for view in map(lookup.request, lookup.find(request_id, kind)) if view]
        if any(view.outcome == "open" for view in views):
            raise HTTPException(409, "The request still runs and more of it would be written. Ask again once it ended.")
        if dry_run:
            unwritten = _unwritten(views, meant)
            deleted = _named(meant) + unwritten
            return as_json(EvidenceErased(kind, deleted, True, len(deleted), 0, True, len(unwritten)))
        erased, gone = await evidence.erase(request_id, kind, _actor(request), forget)
        unwritten = _unwritten(views, gone)
        if not erased.requests and not unwritten:
            beyond = f" {len(erased.damaged)} damaged files may hold it: {', '.join(erased.damaged)}."
            said = f"request {request_id[:MAX_ID_CHARACTERS]!r} is not kept. {_NOT_KEPT}"
            raise HTTPException(404, said + (beyond if erased.damaged else ""))
        deleted, count = _named(gone) + unwritten, erased.requests + len(unwritten)
        counts = count, erased.rows, erased.clean, len(unwritten), erased.damaged
        return as_json(EvidenceErased(kind, deleted, False, *counts))

    @app.put(
        "/v1/evidence/content/{request_id:path}",
        status_code=204,
        responses=_TRUST | BODY_ANSWERS,
        openapi_extra=json_body(ContentIn),
        tags=["evidence"],
    )
    async def put_content(request: Request, evidence: Trusted, vault: Sealing, request_id: Id) -> Response:
        """Keep what was said in a request that is kept, sealed; for a gateway that saw the response.

        By the id of the response, or by the engine's: another's X-Request-Id may be equal to it.

        Nothing of the body is read before the token.
        """
        content = await bodies.read(request, ContentIn)
        try:
            sealed = Content(content.tokens, content.token_ids)
        except ConfigRefused as refusal:
            raise HTTPException(422, str(refusal)) from refusal
        found = await evidence.attach(request_id, vault, sealed, _actor(request))
        if found == 0:
            raise HTTPException(404, f"request {request_id[:MAX_ID_CHARACTERS]!r} is not kept. {_NOT_KEPT}")
        if found > 1:
            raise HTTPException(409, f"{found} requests have this id. Give the engine's own request id.")
        return Response(status_code=204)

    @app.get("/v1/evidence/content/{request_id:path}", response_model=ContentOut, responses=_TRUST, tags=["evidence"])
    async def get_content(request: Request, evidence: Trusted, vault: Sealing, request_id: Id) -> Response:
        """What was said in a request."""
        try:
            content = await evidence.content(request_id, vault, _actor(request))
        except ConfigRefused as refusal:
            raise HTTPException(409, str(refusal)) from refusal
        if content is None:
            raise HTTPException(404, f"nothing that was said in request {request_id[:MAX_ID_CHARACTERS]!r} is kept.")
        return as_json(ContentOut(content.tokens, content.token_ids))


def _remembered(lookup: Lookup, name: str) -> list[tuple[set[IdKind], str]]:
    """Of each request in memory that has this id, as what it is the id's, and its response id."""
    kinds: dict[int, set[IdKind]] = {}
    for kind in IdKind:
        for serial in lookup.find(name, kind):
            kinds.setdefault(serial, set()).add(kind)
    return [(of, view.response_id) for serial, of in kinds.items() if (view := lookup.request(serial))]


def _unwritten(views: Sequence[RequestView], written: Sequence[Match]) -> list[ErasedRequest]:
    """Requests in memory of which there is no evidence."""
    known = {match.request_id for match in written}
    return [ErasedRequest(view.request_id, view.response_id) for view in views if view.request_id not in known]


def _listed(matches: Sequence[Match]) -> str:
    return ", ".join(f"{match.request_id} by {'/'.join(sorted(match.kinds))}" for match in matches[:_LISTED])


def _named(matches: Sequence[Match]) -> list[ErasedRequest]:
    return [ErasedRequest(match.request_id, match.response_id) for match in matches]


def _actor(request: Request) -> str:
    return f"http:{request.client.host if request.client else 'unknown'}"
