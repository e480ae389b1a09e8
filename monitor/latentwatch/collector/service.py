"""The collector's process: reads the watchlist, binds the addresses, joins receiver, core and web in one loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

from latentwatch import __version__, host
from latentwatch.client_ids import IdKind
from latentwatch.collector.config import Bounds
from latentwatch.collector.core import Core
from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.durability.journal import DurableSink
from latentwatch.collector.durability.state_facts import StateFacts
from latentwatch.collector.evidence import Evidence, EvidenceFacts, EvidenceSettings
from latentwatch.collector.evidence_buffer import watched
from latentwatch.collector.federation.client import ReportClient, ReportClientFacts
from latentwatch.collector.federation.outbox import ReportOutbox
from latentwatch.collector.health.watch import HealthWatch
from latentwatch.collector.http.app import make_app
from latentwatch.collector.http.bodies import MAX_BODY_BYTES
from latentwatch.collector.http.connection import HttpLimits
from latentwatch.collector.http.hosts import Hosts
from latentwatch.collector.http.overview import Links
from latentwatch.collector.http.server import HttpServer
from latentwatch.collector.ingest import Ingest
from latentwatch.collector.metrics_families import Families
from latentwatch.collector.process_facts import DiskFacts, ProcessFacts
from latentwatch.collector.pseudonyms import Pseudonyms, PseudonymSink
from latentwatch.collector.telemetry import OtlpFacts, Telemetry, TelemetrySettings
from latentwatch.drift.canary import canary_prompt
from latentwatch.drift.limits import with_limits
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.export.families import Family
from latentwatch.transport.address import check_guarded
from latentwatch.transport.credentials import Credentials, ServerTls, Tokens
from latentwatch.transport.hello import Hello
from latentwatch.transport.receiver import PEER_STREAMS, Receiver
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
    _: KW_ONLY
    insecure: bool = False
    """Whether an address that other hosts reach may be plain and ask for no token; else it is refused."""
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
    http_hosts: Sequence[str] = ()
    """Names under which it is asked over HTTP; see http.hosts."""
    http_limits: HttpLimits = field(default_factory=HttpLimits)
    http_body_bytes: int = MAX_BODY_BYTES
    links: Links = field(default_factory=Links)
    """From the page to the runbook and to Grafana."""
    peer_streams: int = PEER_STREAMS
    """Connections and streams of engines from one peer."""
    request_id_key_file: Path | None = None
    """Holds the key under which request ids are hashed; None keeps them as they are."""
    http_tls: ServerTls | None = None
    """None serves plain HTTP."""


@dataclass(frozen=True)
class Parts:
    """What a collector consists of, beside its HTTP server."""

    core: Core
    sink: Ingest | DurableSink
    """What changes the core."""
    receiver: Receiver
    durable: DurableSink | None = None
    evidence: Evidence | None = None
    telemetry: Telemetry | None = None
    report_client: ReportClient | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    """Of state and evidence, by the option that named them."""
    start_seconds: float = field(default_factory=time.time)

    async def forget(self, meant: Mapping[IdKind, Sequence[str]]) -> bool:
        """Have core and state forget a request; whether nothing of it is left there."""
        if self.durable is not None:
            return await self.durable.forget(meant, time.time())
        self.core.forget(meant)
        return True

    def process(self) -> ProcessFacts:
        """What the operating system and the parts say."""
        return ProcessFacts(
            self.start_seconds,
            _resident_bytes(),
            time.process_time(),
            replace(self.durable.facts, in_memory=False) if self.durable is not None else StateFacts(),
            self.evidence.facts() if self.evidence is not None else EvidenceFacts(),
            self.telemetry.facts() if self.telemetry is not None else OtlpFacts(),
            self.report_client.facts if self.report_client is not None else ReportClientFacts(),
            self.receiver.facts,
            self.disks(),
        )

    def disks(self) -> tuple[DiskFacts, ...]:
        """Under the folders of state and evidence, where there are some."""
        found = {name: host.disk_bytes(folder) for name, folder in self.folders.items()}
        return tuple(DiskFacts(name, *sizes) for name, sizes in found.items() if sizes is not None)


def _resident_bytes() -> int | None:
    """None where the system does not say."""
    with host.optional("its memory on /metrics"):
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def wire(settings: CollectorSettings) -> Parts:
    """Every part, each given what it needs.

    Raises: WatchlistRefused, BaselineRefused, StateRefused, ConfigRefused "target_invalid", "tls_unusable",
            "token_unusable", "request_id_key" or "plain_address".
    """
    if not settings.insecure:
        check_guarded("--listen", settings.listen, bool(settings.tls or settings.token_files), "--token-file")
        guards = bool(settings.http_tls or settings.http_token_files)
        check_guarded("--http", [settings.http], guards, "--http-token-file")
    watchlist = watchlist_file.read(settings.watchlist)
    limited = with_limits(watchlist, settings.drift.baseline)
    pseudonyms = _pseudonyms(settings)
    telemetry = Telemetry(settings.otlp, watched(limited), time.time) if settings.otlp else None
    evidence = Evidence(settings.evidence, limited, time.time, pseudonyms) if settings.evidence else None
    takers = [part for part in (evidence, telemetry) if part is not None]
    core = Core(
        watchlist,
        settings.bounds,
        settings.drift,
        evidence=[part.put for part in takers],
        evidence_scope=settings.evidence.scope if settings.evidence else "exceeded",
        forward_boot_id=uuid.uuid4().hex if settings.forward else "",
        pseudonyms=pseudonyms,
    )
    # What its journal tells again may not have been written down before: evidence hears it again.
    durable = None

    def release() -> None:
        for part in takers:
            part.release()

    if settings.state is not None:
        written = evidence.written if evidence is not None else None
        durable = DurableSink(
            core,
            settings.state,
            time.time(),
            evidence_written=written,
            committed=release,
        )
        for part in takers:
            part.wait_for_release()
    sink = durable or core.ingest
    receiver = Receiver(
        PseudonymSink(sink, pseudonyms) if pseudonyms else sink,
        settings.listen,
        clock=time.time,
        on_refused=sink.refused,
        peer_streams=settings.peer_streams,
        tls=settings.tls,
        tokens=Tokens(settings.token_files) if settings.token_files else None,
    )
    report_client = None
    if settings.forward is not None and core.outbox is not None:
        report_client = _report_client(settings.forward, watchlist.sha256, core.outbox, sink.acknowledged)
    folders = {"state": settings.state, "evidence": settings.evidence.folder if settings.evidence else None}
    given = {name: folder for name, folder in folders.items() if folder is not None}
    return Parts(core, sink, receiver, durable, evidence, telemetry, report_client, given)


def _pseudonyms(settings: CollectorSettings) -> Pseudonyms | None:
    if settings.request_id_key_file is None:
        return None
    if settings.drift.route is not None:
        raise ConfigRefused(
            "--request-id-key-file with --route",
            found="a hashed id does not tell its route",
            instead="Give one of them.",
            reason=RefusalReason.REQUEST_ID_KEY,
        )
    canary_key = settings.drift.canary_key
    return Pseudonyms.read(settings.request_id_key_file, exempt=lambda id: canary_prompt(canary_key, id) is not None)


def _report_client(
    settings: ForwardSettings, watchlist_sha256: str, outbox: ReportOutbox, acknowledged: Callable[[int], None]
) -> ReportClient:
    hello = Hello(
        replica=settings.name,
        boot_id=outbox.boot_id,
        engine="",
        model_name="",
        watchlist_sha256=watchlist_sha256,
        armed=True,
        not_armed_reason="",
        not_armed_text="",
        plugin_version=__version__,
        engine_version="",
        forwards=True,
    )
    return ReportClient(settings.target, hello, lambda: outbox.reports, acknowledged, credentials=settings.credentials)


class Service:
    """A collector that runs in the caller's loop."""

    def __init__(self, settings: CollectorSettings) -> None:
        """Raises: as `wire`."""
        self._parts = parts = wire(settings)
        self.core, self.receiver = parts.core, parts.receiver
        self._hosts = Hosts(settings.http_hosts)
        self._health = HealthWatch(parts.core.lookup, parts.process)
        self._health.record(time.time())
        open_to_all = settings.evidence is not None and settings.evidence.open_to_all
        app = make_app(
            parts.core.lookup,
            clock=time.time,
            process=parts.process,
            forget=parts.forget,
            evidence=parts.evidence,
            readers=Tokens(settings.http_token_files) if settings.http_token_files else None,
            evidence_is_open=lambda: open_to_all or self._http.is_loopback,
            hosts=self._hosts,
            max_body_bytes=settings.http_body_bytes,
            links=settings.links,
            on_refused=parts.sink.refused,
            health=self._health,
        )
        self._http = HttpServer(
            settings.http,
            app,
            tls=settings.http_tls,
            on_refused=parts.sink.refused,
            limits=settings.http_limits,
        )
        self._guarded = bool(settings.http_token_files)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def http_url(self) -> str:
        """Where the page is, with the port that was bound."""
        return self._http.url

    async def start(self) -> None:
        """Bind and serve. Raises ConfigRefused, "port_in_use", "socket_in_use" or "address_unusable"."""
        self._http.bind()
        self._hosts.bound(self._http.host, self._http.bound_address)
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
        parts, core = self._parts, self.core
        if parts.durable is not None:
            self._tasks.append(asyncio.create_task(self._maintain(parts.durable), name="state"))
        if parts.report_client is not None:
            self._tasks.append(asyncio.create_task(parts.report_client.run(), name="forward"))
        if parts.telemetry is not None and parts.telemetry.pushes:
            families = Families(core.watchlist)

            def pushed() -> Iterator[Family]:
                snapshot, facts = core.lookup.snapshot(time.time()), parts.process()
                return families.of(snapshot, facts, self._health.found(snapshot, facts))

            push = parts.telemetry.push(pushed, parts.start_seconds)
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
        parts = self._parts
        await self.receiver.stop(_STOP_SECONDS)
        if parts.report_client is not None:
            parts.sink.tick(time.time())
            parts.report_client.news()
            if not await parts.report_client.drain(_STOP_SECONDS):
                log.warning("the gateway was not told of everything; with --state it is when this collector starts")
        self._http.stop()
        http, *others = self._tasks
        for task in others:
            task.cancel()
        await asyncio.wait((http, *others))
        if parts.durable is not None:
            parts.durable.close(time.time())
        for part in (parts.evidence, parts.telemetry):
            if part is not None:
                await asyncio.to_thread(part.close)

    async def _tick(self) -> None:
        parts, offset = self._parts, time.time() - time.monotonic()
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now = time.time()
            jump = now - time.monotonic() - offset
            if abs(jump) > _JUMP_SECONDS:
                # A clock that was set would otherwise end every open request, or keep each for ever.
                log.warning("the clock was set by %+.1f s", jump)
                parts.sink.shift_clock(jump)
                offset += jump
            parts.sink.tick(now)
            self._health.record(now)
            if parts.report_client is not None:
                parts.report_client.news()

    async def _maintain(self, durable: DurableSink) -> None:
        """Beside the tick: a checkpoint may wait for a disk."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            await durable.maintain(time.time())


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
