"""Collectors in which one thing is wrong: for each cause of the health table, what was before and what is now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from latentwatch.collector.core import Core
from latentwatch.collector.durability.state_facts import StateFacts
from latentwatch.collector.evidence import EvidenceFacts
from latentwatch.collector.federation.client import ReportClientFacts
from latentwatch.collector.lookup import Lookup
from latentwatch.collector.process_facts import DiskFacts, ProcessFacts
from latentwatch.collector.snapshot import ForwarderView, LagView, ReplicaView, Snapshot
from latentwatch.collector.telemetry import OtlpFacts
from latentwatch.collector.totals import EngineTotals, ForwardView
from latentwatch.drift.common import COMMON
from latentwatch.drift.detection import KINDS
from latentwatch.evidence.writer import WriterTotals
from latentwatch.names import Phase, Reason, TokenState
from latentwatch.transport.fair_queue import FairQueueFacts
from latentwatch.transport.servicer import LatestRefusal, ReceiverFacts
from starlette.testclient import TestClient

from tests.support.streams import Schedule, hello, probe, received, sparse, tokens, watchlist

FEATURES = (sparse("jailbreak"), probe("deceive"))
NOW = 6000.0
MIB = 1 << 20
WELL = ProcessFacts(
    1.0,
    2,
    3.0,
    state=StateFacts(in_memory=False, durable=True, checkpoint_seconds=NOW - 5),
    receiver=ReceiverFacts(1, 1024),
    disks=(DiskFacts("state", 900 * MIB, 1000 * MIB), DiskFacts("evidence", 900 * MIB, 1000 * MIB)),
)
MISMATCH = "replica b: it scores with watchlist 0123456789ab, this collector explains abababababab."


@dataclass(frozen=True)
class Shown:
    """What a collector shows at one moment."""

    snapshot: Snapshot
    process: ProcessFacts

    def of(self, **changes: object) -> Shown:
        """With other fields in the snapshot."""
        return replace(self, snapshot=replace(self.snapshot, **changes))

    def totals(self, **changes: object) -> Shown:
        """With other fields in the collector's totals."""
        return self.of(collector=replace(self.snapshot.collector, **changes))

    def parts(self, **changes: object) -> Shown:
        """With other fields in what its process and parts say."""
        return replace(self, process=replace(self.process, **changes))

    def engine(self, **changes: object) -> Shown:
        """With other fields in its one engine."""
        (engine,) = self.snapshot.replicas
        return self.of(replicas=(replace(engine, **changes),))

    def counters(self, **changes: int) -> Shown:
        """With other counters of its one engine."""
        return self.engine(counters=replace(self.snapshot.replicas[0].counters, **changes))


def core() -> Core:
    """One engine and three requests, all of whose tokens were scored."""
    made = Core(watchlist(FEATURES))
    made.ingest.hello(hello(), NOW)
    rng = np.random.default_rng(0)
    requests = [tokens(rng, FEATURES, handle=h, total=30, prompt_tokens=10, unseen_share=0) for h in range(1, 4)]
    for number, batch in enumerate(Schedule.one_step(requests).batches(FEATURES), 1):
        made.ingest.observe(hello(), received(number, batch), NOW)
    return made


class LookupOf(Lookup):
    """Reads one core, and shows what it is told to."""

    def __init__(self, made: Core) -> None:
        vars(self).update(vars(made.lookup))
        self.shown: Snapshot | None = None

    def snapshot(self, now: float) -> Snapshot:
        return self.shown or super().snapshot(now)


def well(made: Core) -> Shown:
    """Nothing is wrong with it."""
    snapshot = made.lookup.snapshot(NOW)
    nothing = {kind: np.zeros(len(FEATURES)) for kind in KINDS}
    measured = {"log10_evalue": nothing, "since_seconds": nothing, "log10_limit": dict.fromkeys((*KINDS, COMMON), 9.0)}
    fields = {"armed": True, "reason": "", "baseline_created_seconds": NOW - 60, **measured}
    armed = [replace(model, **fields) for model in snapshot.drift]
    lag = LagView(snapshot.collector.ingest_lag.edges, (1000, *[0] * len(snapshot.collector.ingest_lag.edges)), 1.0)
    shown = Shown(snapshot, WELL).totals(ingest_lag=lag)
    return shown.of(drift=tuple(armed))


def _dropped(shown: Shown) -> Shown:
    (engine,) = shown.snapshot.engines
    counts = engine.tokens.copy()
    counts[TokenState.DROPPED, Reason.RING_FULL, Phase.OUTPUT] += 5000
    more: EngineTotals = replace(engine, tokens=counts)
    return shown.of(engines=(more,))


def _late(shown: Shown) -> Shown:
    lag = shown.snapshot.collector.ingest_lag
    return shown.totals(ingest_lag=replace(lag, counts=(*lag.counts[:-2], 500, 0), sum=lag.sum + 500 * 59))


def _refused(shown: Shown, reason: str, text: str) -> Shown:
    refused = {**shown.snapshot.collector.streams_refused, reason: 30}
    receiver = replace(shown.process.receiver, refusals=(LatestRefusal(reason, NOW, text),))
    return shown.totals(streams_refused=refused).parts(receiver=receiver)


def _model(shown: Shown, **changes: object) -> Shown:
    return shown.of(drift=tuple(replace(model, **changes) for model in shown.snapshot.drift))


def _disk(shown: Shown) -> Shown:
    return shown.parts(disks=(shown.process.disks[0], DiskFacts("evidence", MIB, 1000 * MIB)))


def _forward(shown: Shown, *, shed: int = 0, connected: bool = True) -> Shown:
    forward = ForwardView(9, 8, 1, 0, 0, 1, NOW - 300, shed, 0)
    return shown.of(forward=forward).parts(report_client=ReportClientFacts(connected=connected))


def _sidecar(shown: Shown, *, seen: float = NOW, ahead: float = 0.0) -> Shown:
    return shown.of(forwarders=(ForwarderView("side", seen == NOW, seen, 0, 0, ahead),))


def _evidence(shown: Shown, **changes: object) -> Shown:
    return shown.parts(evidence=EvidenceFacts(**changes))


LOST = WriterTotals({}, {("exceedance", "write_failed"): 30}, 0, "OperationalError: database or disk is full")
BROKEN: Mapping[str, tuple[Callable[[Shown], Shown], str]] = {
    "no_engine": (lambda s: s.of(replicas=()), "no engine streams here"),
    "engine_silent": (lambda s: s.engine(connected=False, last_seen_seconds=NOW - 300), "pod-0/0 was last heard 5 min"),
    "engine_not_armed": (lambda s: s.engine(armed=False, not_armed_reason="model_dtype"), "pod-0/0: model_dtype"),
    "watchlist_mismatch": (lambda s: _refused(s, "watchlist_mismatch", MISMATCH), "0123456789ab, this collector"),
    "stream_refused": (
        lambda s: _refused(s, "boot_changed", "replica b: it changed."),
        "30 times lately (boot_changed)",
    ),
    "coverage_low": (_dropped, "of the tokens of the last minutes were seen"),
    "tokens_dropped": (_dropped, "5000 lately, ring_full"),
    "books_lost": (lambda s: s.counters(lost_tokens=30), "30 tokens of pod-0/0"),
    "requests_untracked": (lambda s: s.totals(requests_evicted=30), "30 requests lately"),
    "accounting_broken": (lambda s: s.totals(accounting_excess_tokens=30), "30 tokens lately"),
    "rows_unattributed": (lambda s: s.counters(unattributed_rows=30), "30 rows of pod-0/0"),
    "exporter_restarts": (lambda s: s.counters(exporter_restarts=30), "pod-0/0, 30 times"),
    "spool_failing": (lambda s: s.counters(spool_failures=30), "pod-0/0, 30 times"),
    "ingest_late": (_late, "arrived more than 5 s after"),
    "nearly_full": (
        lambda s: s.parts(receiver=ReceiverFacts(1000, 1024, FairQueueFacts(1, 9.0))),
        "streams 1000 of 1024, a message waits for 9 s",
    ),
    "sidecar_silent": (lambda s: _sidecar(s, seen=NOW - 600), "side was last heard 10 min ago"),
    "gateway_away": (lambda s: _forward(s, connected=False), "the oldest report waits for 5 min"),
    "reports_shed": (lambda s: _forward(s, shed=30), "30 requests of this collector"),
    "state_not_durable": (
        lambda s: s.parts(state=StateFacts(False, False, 1.0, write_failures=3, last_error="No space left on device")),
        "3 writes failed, the last with: No space left on device",
    ),
    "state_in_memory": (lambda s: s.parts(state=StateFacts()), "without --state"),
    "evidence_lost": (lambda s: _evidence(s, writer=LOST), "30 records lately, write_failed; the last error"),
    "disk_full": (_disk, "under --evidence 1 MiB of 1000 MiB are free"),
    "files_aside": (lambda s: _evidence(s, damaged=("a.sqlite.damaged",)), "1 of evidence (a.sqlite.damaged)"),
    "otlp_failing": (lambda s: s.parts(otlp=OtlpFacts(LOST, 2)), "30 events and 2 pushes"),
    "model_differs": (lambda s: s.engine(model_match="differs", model_text="the tokenizer is another"), "tokenizer"),
    "baseline_stale": (lambda s: _model(s, armed=False, reason="baseline_mismatch"), "toy: baseline_mismatch"),
    "baseline_old": (lambda s: _model(s, baseline_created_seconds=NOW - 40 * 86_400), "toy: 40 days"),
    "baseline_none": (lambda s: _model(s, armed=False, reason="no_baseline"), "toy"),
    "gate_missing": (lambda s: s, "the features of toy do here"),
    "clock_skew": (lambda s: s.engine(clock_ahead_seconds=7.25), "that of pod-0/0 by 7.2 s"),
}
"""By cause: what makes it so, from a collector that is well, and words that say who and how much."""
ALSO: Mapping[str, frozenset[str]] = {
    "coverage_low": frozenset({"tokens_dropped"}),
    "tokens_dropped": frozenset({"coverage_low"}),
    "state_not_durable": frozenset({"disk_full"}),
}
"""What cannot but be so too."""


class Asked:
    """A TestClient as the doctor's HTTP service."""

    url = "http://collector"

    def __init__(self, client: TestClient) -> None:
        self._client = client

    def json(self, path: str, **query: str) -> object:
        return self._client.get(path, params=query).raise_for_status().json()


def engine_of(shown: Shown) -> ReplicaView:
    """Its one engine."""
    return shown.snapshot.replicas[0]
