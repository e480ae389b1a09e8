"""The collector's process: reads the watchlist, binds the addresses, joins receiver, pipeline and web in one loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latentwatch import __version__
from latentwatch.collector.config import Bounds
from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.durability.journal import DurableSink
from latentwatch.collector.evidence import Evidence, EvidenceSettings
from latentwatch.collector.evidence_buffer import watched
from latentwatch.collector.federation.client import RelayFacts, ReportClient
from latentwatch.collector.http.app import make_app
from latentwatch.collector.http.server import HttpServer
from latentwatch.collector.metrics_families import EvidenceFacts, Families, OtlpFacts, ProcessFacts, StateFacts
from latentwatch.collector.pipeline import Pipeline
from latentwatch.collector.pseudonyms import Pseudonyms, PseudonymSink
from latentwatch.collector.telemetry import Telemetry, TelemetrySettings
from latentwatch.drift.canary import canary_prompt
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.transport.credentials import Credentials, ServerTls, Tokens
from latentwatch.transport.hello import Hello
from latentwatch.transport.receiver import Receiver
from latentwatch.transport.sink import Sink
from latentwatch.watchlist import file as watchlist_file

log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_JUMP_SECONDS = 5.0
"""Beyond what time servers slew away unseen."""
SWITCH_SECONDS = 0.0005
"""How long a thread may keep the interpreter from another that wants it. Python's 5 ms, several times over in one
look-up of evidence, would be tens of milliseconds beside the thread that writes it."""
_STOP_SECONDS = 2.0
"""Time for streams to take their last ack."""


@dataclass(frozen=True)
class ForwardSettings:
    """Which gateway is told what this collector counts."""

    target: str
    """host:port or unix:///path."""
    name: str
    """This collector's, unique among those of the gateway."""
    credentials: Credentials = field(default_factory=Credentials)


@dataclass(frozen=True)
class CollectorSettings:
    """What a collector is started with."""

    watchlist: Path
    listen: Sequence[str]
    """Addresses for engines: unix:///path or host:port."""
    http: str
    """Address for metrics, API and page: host:port."""
    bounds: Bounds = field(default_factory=Bounds)
    state: Path | None = None
    """Folder in which the state survives this process; None keeps it in memory."""
    drift: DriftSettings = field(default_factory=DriftSettings)
    evidence: EvidenceSettings | None = None
    """None writes none down."""
    otlp: TelemetrySettings | None = None
    """None sends nothing."""
    forward: ForwardSettings | None = None
    """None forwards nothing."""
    tls: ServerTls | None = None
    """For the TCP addresses in `listen`."""
    token_files: Sequence[Path] = ()
    """Tokens that let an engine open a stream; none lets in whoever can connect."""
    http_token_files: Sequence[Path] = ()
    """Tokens that let someone read over HTTP; none lets in whoever can connect."""
    request_id_key_file: Path | None = None
    """Holds the key under which request ids are hashed; None keeps them as they are."""
    http_tls: ServerTls | None = None
    """None serves plain HTTP."""


class Service:
    """A collector that runs in the caller's loop."""

    def __init__(self, settings: CollectorSettings) -> None:
        """Raises: WatchlistRefused, BaselineRefused, StateRefused, ConfigRefused "target_invalid", "tls_unusable",
        "token_unusable" or "request_id_key".
        """
        self._start_seconds = time.time()
        self.pipeline = Pipeline(watchlist_file.read(settings.watchlist), settings.bounds, settings.drift)
        self.telemetry = (
            Telemetry(settings.otlp, watched(self.pipeline.watchlist), time.time) if settings.otlp else None
        )
        self.evidence = Evidence(settings.evidence, self.pipeline, time.time) if settings.evidence else None
        if sinks := [part.put for part in (self.evidence, self.telemetry) if part is not None]:
            # Before the state is resumed: what the journal tells again may not have been written down before.
            self.pipeline.record_to(sinks, settings.evidence.keep if settings.evidence else "exceeded")
        if settings.forward is not None:
            self.pipeline.forward_from(uuid.uuid4().hex)
        self._durable = DurableSink(self.pipeline, settings.state, time.time()) if settings.state else None
        self._sink = self._durable or self.pipeline
        accepting: Sink = self._sink
        if settings.request_id_key_file is not None:
            if settings.drift.route is not None:
                raise ConfigRefused(
                    "--request-id-key-file with --route",
                    found="a hashed id does not tell its route",
                    instead="Give one of them.",
                    reason=RefusalReason.REQUEST_ID_KEY,
                )
            canary_key = settings.drift.canary_key
            self.pipeline.pseudonyms = Pseudonyms.read(
                settings.request_id_key_file, keep=lambda id: canary_prompt(canary_key, id) is not None
            )
            accepting = PseudonymSink(self._sink, self.pipeline.pseudonyms)
        if self.evidence and (durable := self._durable):
            self.evidence.forget = lambda name: durable.forget(name, time.time())
        self.receiver = Receiver(
            accepting,
            settings.listen,
            clock=time.time,
            on_refused=self._sink.refused,
            tls=settings.tls,
            tokens=Tokens(settings.token_files) if settings.token_files else None,
        )
        self._relay = self._make_relay(settings.forward) if settings.forward else None
        app = make_app(
            self.pipeline,
            clock=time.time,
            process=self._process,
            evidence=self.evidence,
            readers=Tokens(settings.http_token_files) if settings.http_token_files else None,
            on_refused=self._sink.refused,
        )
        self._http = HttpServer(settings.http, app, tls=settings.http_tls, on_refused=self._sink.refused)
        self._guarded = bool(settings.http_token_files)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def http_url(self) -> str:
        """Where the page is, with the port that was bound."""
        return self._http.url

    async def start(self) -> None:
        """Bind and serve. Raises ConfigRefused, "port_in_use", "socket_in_use" or "address_unusable"."""
        self._http.bind()
        try:
            await self.receiver.start()
        except BaseException:
            self._http.release()
            raise
        if not self._guarded and not self._http.is_loopback:
            log.warning(
                "%s is open to the network: anyone who reaches it can read metrics and request ids", self.http_url
            )
        elif self._guarded and not self._http.is_encrypted and not self._http.is_loopback:
            log.warning("%s is plain: whoever can listen on the network can read its token", self.http_url)
        self._tasks = [
            asyncio.create_task(self._http.serve(), name="http"),
            asyncio.create_task(self._tick(), name="tick"),
        ]
        if self._relay is not None:
            self._tasks.append(asyncio.create_task(self._relay.run(), name="forward"))
        if self.telemetry is not None and self.telemetry.pushes:
            families = Families(self.pipeline.watchlist)
            push = self.telemetry.push(
                lambda: families.of(self.pipeline.snapshot(time.time()), self._process()), self._start_seconds
            )
            self._tasks.append(asyncio.create_task(push, name="otlp metrics"))
        while not self._http.started and not self._tasks[0].done():
            await asyncio.sleep(0.01)

    async def wait(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises what a task of the collector failed with."""
        stopped = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait((*self._tasks, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        for task in done - {stopped}:
            task.result()

    async def stop(self) -> None:
        """Acknowledge what is held, end the streams, close the sockets."""
        await self.receiver.stop(_STOP_SECONDS)
        if self._relay is not None:
            self._sink.tick(time.time())
            self._relay.news()
            if not await self._relay.drain(_STOP_SECONDS):
                log.warning("the gateway was not told of everything; with --state it is when this collector starts")
        self._http.stop()
        http, *others = self._tasks
        for task in others:
            task.cancel()
        await asyncio.wait((http, *others))
        if self._durable is not None:
            self._durable.close(time.time())
        for part in (self.evidence, self.telemetry):
            if part is not None:
                await asyncio.to_thread(part.close)

    async def _tick(self) -> None:
        offset = time.time() - time.monotonic()
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now = time.time()
            jump = now - time.monotonic() - offset
            if abs(jump) > _JUMP_SECONDS:
                # A clock that was set would otherwise end every open request, or keep each for ever.
                log.warning("the clock was set by %+.1f s", jump)
                self._sink.shift_clock(jump)
                offset += jump
            self._sink.tick(now)
            if self._relay is not None:
                self._relay.news()
            if self._durable is not None:
                await self._durable.maintain(now)

    def _make_relay(self, settings: ForwardSettings) -> ReportClient:
        forward = self.pipeline.forward
        assert forward is not None
        hello = Hello(
            replica=settings.name,
            boot_id=forward.boot_id,
            engine="",
            model_name="",
            watchlist_sha256=self.pipeline.watchlist.sha256,
            armed=True,
            not_armed_reason="",
            not_armed_text="",
            plugin_version=__version__,
            engine_version="",
            forwards=True,
        )
        return ReportClient(
            settings.target,
            hello,
            lambda: forward.reports,
            self._sink.acknowledged,
            credentials=settings.credentials,
        )

    def _process(self) -> ProcessFacts:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return ProcessFacts(
            self._start_seconds,
            resident_pages * os.sysconf("SC_PAGE_SIZE"),
            time.process_time(),
            self._durable.facts if self._durable is not None else StateFacts(),
            self.evidence.facts() if self.evidence is not None else EvidenceFacts(),
            self.telemetry.facts() if self.telemetry is not None else OtlpFacts(),
            self._relay.facts if self._relay is not None else RelayFacts(),
            self.receiver.facts,
        )


async def serve(settings: CollectorSettings, *, started: Callable[[Service], None]) -> None:
    """Run a collector until SIGINT or SIGTERM. `started` is called once every address is bound.

    Raises: Refusal: the watchlist or an address cannot be used.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    service = Service(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await service.start()
    try:
        started(service)
        await service.wait(stop)
    finally:
        await service.stop()
