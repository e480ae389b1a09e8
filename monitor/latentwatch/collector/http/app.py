"""The collector's HTTP side: /metrics, the read-only JSON API, and the live page.

Everything but the text of /metrics is made in the caller's loop.

Nothing here changes the collector's state. Request ids are the client's text: they travel as JSON and the page sets
them as text, never as markup; the Content-Security-Policy allows only this collector's own files.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.resources import files
from pathlib import PurePath
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

import numpy as np
from fastapi import Depends, FastAPI, Header, HTTPException, Path, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentwatch import __version__
from latentwatch.client_ids import MAX_ASKED_CHARACTERS, MAX_ID_CHARACTERS
from latentwatch.collector.evidence import Evidence, Forget
from latentwatch.collector.health.cause import FoundCause
from latentwatch.collector.health.table import CAUSES
from latentwatch.collector.health.watch import HealthWatch
from latentwatch.collector.http.auth import READ, Access, challenge
from latentwatch.collector.http.bodies import MAX_BODY_BYTES, Bodies
from latentwatch.collector.http.evidence_api import add_evidence
from latentwatch.collector.http.features import Features, features_of
from latentwatch.collector.http.guard import guarded
from latentwatch.collector.http.hosts import Hosts
from latentwatch.collector.http.metrics_page import MetricsPage
from latentwatch.collector.http.overview import Links, Overview, overview
from latentwatch.collector.http.query import check_query, unknown_name
from latentwatch.collector.http.responses import as_json, encoded
from latentwatch.collector.lookup import Lookup
from latentwatch.collector.metrics_families import Families
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.collector.snapshot import Anomaly, RequestView
from latentwatch.drift.alarms import Alarm
from latentwatch.drift.model import DriftView
from latentwatch.evidence.archive import Wanted
from latentwatch.export.families import Family
from latentwatch.export.prometheus import negotiate
from latentwatch.facts import ExceedanceView
from latentwatch.names import Severity
from latentwatch.transport.credentials import Tokens
from latentwatch.watchlist.file import MAX_FEATURES

_HEALTH: Final[dict[int | str, dict[str, Any]]] = {401: {"description": "?verbose without a reader's token"}}
_PAGE_MEDIA: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


@dataclasses.dataclass(frozen=True)
class Health:
    """That the collector answers, and how many engines stream to it."""

    status: str
    version: str
    streams: int


@dataclasses.dataclass(frozen=True)
class HealthInFull(Health):
    """The same, and what is wrong with the monitor."""

    causes: list[FoundCause]
    """Those that are so, the worst first."""
    checked: list[str]
    """Names of all that were looked at."""


@dataclasses.dataclass(frozen=True)
class Requests:
    """Requests that this collector holds."""

    requests: list[RequestView]


@dataclasses.dataclass(frozen=True)
class Exceedances:
    """Exceedances that this collector holds, newest first."""

    exceedances: list[ExceedanceView]


@dataclasses.dataclass(frozen=True)
class Anomalies:
    """Requests that exceeded a limit, the latest first."""

    anomalies: list[Anomaly]


@dataclasses.dataclass(frozen=True)
class DriftOfFeature:
    """One feature against its baseline."""

    feature: str
    rate_ratio: float | None
    log10_evalue: dict[str, float]
    """By kind of detector."""


@dataclasses.dataclass(frozen=True)
class DriftOfModel:
    """One model against its baseline."""

    model_name: str
    armed: bool
    reason: str
    """Why drift is not measured; empty while it is."""
    baseline_sha256: str
    baseline_created_seconds: float
    """0 where there is none, or where it does not say."""
    windows: int
    requests: int
    excluded_windows: int
    unnamed_requests: int
    """Of adapters and routes that are counted together, having no counts of their own."""
    common_ratio: float
    """Active requests / expected ones that all features have in common; 1 while none is certain."""
    common_log10_evalue: float | None
    """Evidence that this is drift; None while drift is not measured."""
    log10_limit: dict[str, float]
    """By kind of detector, the common one's too."""
    alarms: list[Alarm]
    features: list[DriftOfFeature]
    """The most suspicious first."""


@dataclasses.dataclass(frozen=True)
class Drifts:
    """Drift of every model that streams here."""

    models: list[DriftOfModel]


def make_app(
    lookup: Lookup,
    *,
    clock: Callable[[], float],
    process: Callable[[], ProcessFacts],
    forget: Forget,
    evidence: Evidence | None = None,
    readers: Tokens | None = None,
    evidence_is_open: Callable[[], bool] = lambda: True,
    hosts: Hosts | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    links: Links | None = None,
    on_refused: Callable[[str], None] = lambda _reason: None,
    health: HealthWatch | None = None,
) -> ASGIApp:
    """The ASGI application.

    Args: clock: gives seconds since the Unix epoch.   forget: has the collector forget a request, beside its evidence.
          readers, evidence_is_open: see auth.Access.   hosts: whom it may be asked as; None: as anybody.
          max_body_bytes: of what was said in a request.   links: shown on the page.
          health: knows what rose lately; None: one that begins now.
    """
    if health is None:
        health = HealthWatch(lookup, process)
        health.record(clock())
    app = FastAPI(
        title="latentwatch collector",
        version=__version__,
        description="Read-only view of what a served model's watched features did.",
        # The documentation pages load scripts from a CDN; the schema itself stays at /openapi.json.
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(check_query)],
    )
    _add_operations(app, lookup, clock, process, health)
    _add_health(app, lookup, clock, process, health)
    _add_overview(app, lookup, clock, process, health, links or Links())
    _add_api(app, lookup, clock)
    _add_links(app, lookup)
    add_evidence(app, lookup, evidence, forget, Bodies(max_body_bytes, on_refused))
    for file in files("latentwatch.collector.http").joinpath("static").iterdir():
        if media := _PAGE_MEDIA.get(PurePath(file.name).suffix):
            path = "/" if file.name == "index.html" else f"/{file.name}"
            _add_file(app, path, file.read_bytes(), f"{media}; charset=utf-8")
    erasers = evidence.tokens if evidence else None
    access = Access(readers, erasers, on_refused, evidence_is_open=evidence_is_open)
    app.add_middleware(AuthenticationMiddleware, backend=access, on_error=challenge)
    return _secured(guarded(app, hosts, on_refused) if hosts else app)


def _add_operations(
    app: FastAPI,
    lookup: Lookup,
    clock: Callable[[], float],
    process: Callable[[], ProcessFacts],
    health: HealthWatch,
) -> None:
    families = Families(lookup.watchlist, lookup.bounds.feature_samples)

    def shown() -> Iterator[Family]:
        snapshot, facts = lookup.snapshot(clock()), process()
        return families.of(snapshot, facts, health.found(snapshot, facts))

    page = MetricsPage(shown)

    @app.get("/metrics", response_class=Response, tags=["operations"])
    async def metrics(accept: Annotated[str, Header()] = "") -> Response:
        """Metrics as Prometheus text, or as OpenMetrics with exemplars where the Accept header asks for it."""
        media, open_metrics = negotiate(accept)
        return Response(await page.render(open_metrics=open_metrics), headers={"content-type": media})


def _add_health(
    app: FastAPI,
    lookup: Lookup,
    clock: Callable[[], float],
    process: Callable[[], ProcessFacts],
    health: HealthWatch,
) -> None:
    @app.get("/healthz", response_model=Health | HealthInFull, responses=_HEALTH, tags=["operations"])
    async def healthz(
        request: Request,
        verbose: Annotated[Literal["", "0", "1", "false", "true"], Query(description="every cause that is so")] = "0",
    ) -> Response:
        """Answers while the collector's loop runs, whether or not engines are connected; always 200, since a restart
        of the collector mends none of what `?verbose` names. That asks for a reader's token, where there is one."""
        snapshot = lookup.snapshot(clock())
        connected = sum(replica.connected for replica in snapshot.replicas)
        if verbose in ("0", "false"):
            return as_json(Health("ok", __version__, connected))
        if READ not in request.auth.scopes:
            raise HTTPException(401, "Show the token of --http-token-file.", {"www-authenticate": "Bearer"})
        found = health.found(snapshot, process())
        return as_json(HealthInFull("ok", __version__, connected, found, sorted(CAUSES)))


def _add_overview(
    app: FastAPI,
    lookup: Lookup,
    clock: Callable[[], float],
    process: Callable[[], ProcessFacts],
    health: HealthWatch,
    links: Links,
) -> None:
    @app.get("/v1/overview", response_model=Overview, tags=["api"])
    async def get_overview(
        features: Annotated[int, Query(ge=0, le=MAX_FEATURES)] = 48,
        first: Annotated[int, Query(ge=0, le=MAX_FEATURES)] = 0,
        search: Annotated[str, Query(max_length=128)] = "",
    ) -> Response:
        """Verdicts, coverage, the most abnormal features over time, latest exceedances, engines.

        `features` many of those that match `search`, from rank `first` on. An id finds its feature alone; any other
        text is looked for in ids, labels, hook points and severities.
        """
        found = overview(
            lookup,
            clock(),
            most_features=features,
            first_feature=first,
            search=search,
            links=links,
            causes_of=lambda snapshot: health.found(snapshot, process()),
        )
        return as_json(found)


def _add_api(app: FastAPI, lookup: Lookup, clock: Callable[[], float]) -> None:
    @app.get("/v1/features", response_model=Features, tags=["api"])
    async def get_features() -> Response:
        """Every feature of the watchlist."""
        return as_json(features_of(lookup, clock()))

    @app.get(
        "/v1/exceedances",
        response_model=Exceedances,
        responses={404: {"description": "no such feature or model is known here"}},
        tags=["api"],
    )
    async def get_exceedances(
        feature: Annotated[str | None, Query(max_length=64)] = None,
        severity: Severity | None = None,
        model_name: Annotated[str | None, Query(max_length=253)] = None,
        since_seconds: float | None = None,
        until_seconds: float | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """Requests that went above a feature's limit, newest first; times are seconds since the Unix epoch."""
        known = {"feature": [one.id for one in lookup.features], "model_name": lookup.model_names()}
        for name, value in (("feature", feature), ("model_name", model_name)):
            if value is not None and value not in known[name]:
                raise unknown_name(name, value, known[name])
        wanted = Wanted(feature, severity, model_name, since_seconds, until_seconds)
        return as_json(Exceedances(lookup.exceedances(limit, wanted)))

    @app.get("/v1/anomalies", response_model=Anomalies, tags=["api"])
    async def get_anomalies(limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
        """The same by request: one bad request is one event, with every feature that it exceeded."""
        return as_json(Anomalies(lookup.anomalies(limit)))

    @app.get("/v1/drift", response_model=Drifts, tags=["api"])
    async def get_drift() -> Response:
        """Drift of each model against its baseline: which features, since when, by how much, and with what cause."""
        return as_json(Drifts([_drift_of(lookup, view) for view in lookup.drift.views()]))

    @app.get(
        "/v1/drift/observed",
        response_class=Response,
        responses={404: {"description": "no such model has streamed here"}},
        tags=["api"],
    )
    async def get_observed(model_name: Annotated[str, Query(max_length=253)]) -> Response:
        """What this collector has seen of a model outside alarms, as 'latentwatch calibrate' reads it."""
        observed = lookup.drift.observed(model_name, clock())
        if observed is None:
            raise HTTPException(404, f"model {model_name!r} has not streamed to this collector")
        return Response(await asyncio.to_thread(observed.to_bytes), media_type="application/octet-stream")

    @app.get("/v1/requests", response_model=Requests, tags=["api"])
    async def get_requests(limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> Response:
        """Open requests, newest first, then ended ones, latest end first."""
        return _requests(lookup, lookup.latest(limit))

    @app.get(
        "/v1/requests/{request_id:path}",
        response_model=Requests,
        responses={404: {"description": "no such request is held"}},
        tags=["api"],
    )
    async def get_request(request_id: Annotated[str, Path(max_length=MAX_ASKED_CHARACTERS)]) -> Response:
        """The requests whose response id, engine request id or trace id this is, or whose client sent it as
        X-Request-Id; exactly."""
        found = lookup.find(request_id)
        if not found:
            raise HTTPException(
                404,
                f"request {request_id[:MAX_ID_CHARACTERS]!r}: this collector does not hold it. It keeps the last "
                f"{lookup.bounds.closed_requests} that ended; another collector may have it.",
            )
        return _requests(lookup, found)


def _add_links(app: FastAPI, lookup: Lookup) -> None:
    @app.get("/latest-request", include_in_schema=False)
    async def to_latest_request(
        model_name: Annotated[str, Query(max_length=253)], feature: Annotated[str, Query(max_length=253)]
    ) -> Response:
        """To the page of the newest request that exceeded a feature, or to the feature's: what an alert links to, since
        no metric has a request's id."""
        request_id = lookup.latest_exceeding(model_name, feature)
        target = f"request={quote(request_id, safe='')}" if request_id else f"feature={quote(feature, safe='')}"
        return RedirectResponse(f"./#{target}", 303)


def _add_file(app: FastAPI, path: str, content: bytes, media: str) -> None:
    @app.get(path, include_in_schema=False)
    async def get_file() -> Response:
        return Response(content, headers={"content-type": media})


def _drift_of_features(lookup: Lookup, view: DriftView) -> list[DriftOfFeature]:
    """The one that is nearest to a limit, or farthest above it, first."""
    by_kind = {kind: values.tolist() for kind, values in view.log10_evalue.items()}
    rows = [
        DriftOfFeature(
            feature.id,
            float(view.rate_ratio_F[i]) if np.isfinite(view.rate_ratio_F[i]) else None,
            {kind: round(values[i], 3) for kind, values in by_kind.items()},
        )
        for i, feature in enumerate(lookup.features)
        if view.armed
    ]
    nearest = {row.feature: max(v - view.log10_limit[k] for k, v in row.log10_evalue.items()) for row in rows}
    return sorted(rows, key=lambda row: -nearest[row.feature])


def _drift_of(lookup: Lookup, view: DriftView) -> DriftOfModel:
    return DriftOfModel(
        model_name=view.model_name,
        armed=view.armed,
        reason=view.reason,
        baseline_sha256=view.baseline_sha256,
        baseline_created_seconds=view.baseline_created_seconds,
        windows=view.windows,
        requests=view.requests,
        excluded_windows=view.excluded_windows,
        unnamed_requests=view.unnamed_requests,
        common_ratio=view.common.movement.ratio if view.common else 1.0,
        common_log10_evalue=round(view.common.log10_evalue, 3) if view.common else None,
        log10_limit=view.log10_limit,
        alarms=view.alarms,
        features=_drift_of_features(lookup, view),
    )


def _requests(lookup: Lookup, serials: list[int]) -> Response:
    """`Requests`, piece by piece: a thousand summaries at once would keep the loop from the streams for a second."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"requests":['
        comma = b""
        for serial in serials:
            if (view := lookup.request(serial)) is not None:
                yield comma + encoded(view)
                comma = b","
            await asyncio.sleep(0)
        yield b"]}"

    return StreamingResponse(pieces(), media_type="application/json")


def _secured(app: ASGIApp) -> ASGIApp:
    """Security headers on every response, errors included."""

    async def secured(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        await app(scope, receive, send_secured if scope["type"] == "http" else send)

    return secured
