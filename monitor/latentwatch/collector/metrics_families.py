"""From a snapshot to the families of the metrics table: the only place that knows both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from latentwatch import __version__
from latentwatch.collector.config import Bounds
from latentwatch.collector.evidence import EvidenceFacts
from latentwatch.collector.federation.client import ReportClientFacts
from latentwatch.collector.fullness import fullness
from latentwatch.collector.health.cause import FoundCause
from latentwatch.collector.health.table import CAUSES
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.collector.snapshot import TOKEN_SERIES, ReplicaView, Snapshot
from latentwatch.collector.telemetry import OtlpFacts
from latentwatch.collector.totals import ModelTotals
from latentwatch.drift.common import COMMON
from latentwatch.drift.detection import KINDS
from latentwatch.drift.model import DriftView
from latentwatch.errors import RefusalReason
from latentwatch.evidence.records import KINDS as KINDS_OF_RECORD
from latentwatch.evidence.writer import DROP_REASONS
from latentwatch.export import metrics
from latentwatch.export.families import ExemplarLine, Family, LabelRows
from latentwatch.export.metrics import ENGINE_COUNTERS, Metric
from latentwatch.names import Outcome
from latentwatch.watchlist.file import Feature, Watchlist

REFUSALS: Final = tuple(reason for reason in RefusalReason if reason.counted)
"""Reasons that have a series at 0 from the start, so that increase() sees the first one."""


class Families:
    """Families of every metric of the table, in its order. Label rows of features are made once."""

    def __init__(self, watchlist: Watchlist, feature_samples: int = Bounds.feature_samples) -> None:
        self._watchlist = watchlist
        self._feature_samples = feature_samples
        self._features = watchlist.features
        self._sparse = [i for i, feature in enumerate(self._features) if not feature.dense]
        self._limited = [i for i, feature in enumerate(self._features) if feature.limit]
        self._rows: dict[tuple[str, Metric], LabelRows] = {}
        self._constant = tuple(self._watched())

    def of(self, snapshot: Snapshot, process: ProcessFacts, found: Sequence[FoundCause] = ()) -> Iterator[Family]:
        """Every family, those without a series included, and which health causes were found. Those of features share a
        bound on their samples."""
        yield from self._engines(snapshot)
        left, withheld = self._feature_samples, 0
        for family in (*self._constant, *self._models(snapshot.models), *self._drift(snapshot.drift)):
            shown = _within(family, left)
            if "feature" in family.metric.labels:
                left -= shown.samples
                withheld += family.samples - shown.samples
            yield shown
        yield Family(metrics.SERIES_WITHHELD, ((),), [withheld])
        yield from self._replicas(snapshot.replicas)
        yield from self._collector(snapshot)
        yield from self._stages(snapshot, process)
        yield from self._forwarding(snapshot, process.report_client)
        yield from _evidence(process.evidence)
        yield from _otlp(process.otlp)
        yield from self._about(process)
        yield _health(found)

    def _engines(self, snapshot: Snapshot) -> Iterator[Family]:
        engines = snapshot.engines
        yield Family(
            metrics.TOKENS,
            tuple(
                (e.model_name, e.engine, state.name.lower(), reason.name.lower(), phase.name.lower())
                for e in engines
                for state, reason, phase in TOKEN_SERIES
            ),
            [int(e.tokens[series]) for e in engines for series in TOKEN_SERIES],
        )
        yield Family(
            metrics.REQUESTS,
            tuple((e.model_name, e.engine, outcome.name.lower()) for e in engines for outcome in Outcome),
            [e.requests[outcome] for e in engines for outcome in Outcome],
        )
        rows = tuple((e.model_name, e.engine) for e in engines)
        yield Family(metrics.OPEN_REQUESTS, rows, [e.open_requests for e in engines])

    def _watched(self) -> Iterator[Family]:
        yield Family(
            metrics.FEATURE_INFO,
            tuple(
                (f.id, f.label, str(f.severity), str(point), f.kind, f.gate)
                for f, point in zip(self._features, self._watchlist.hook_point_F, strict=True)
            ),
            [1] * len(self._features),
        )
        limited = [(f.id, f.limit.value) for f in self._features if f.limit]
        yield Family(metrics.FEATURE_LIMIT, tuple((id,) for id, _ in limited), [value for _, value in limited])

    def _models(self, models: Sequence[ModelTotals]) -> Iterator[Family]:
        sparse, limited, everything = self._sparse, self._limited, range(len(self._features))
        yield Family(
            metrics.FEATURE_FIRED_TOKENS,
            self._feature_rows(models, metrics.FEATURE_FIRED_TOKENS, sparse),
            [count for model in models for count in model.fired_F[sparse].tolist()],
        )
        yield Family(
            metrics.FEATURE_REQUESTS,
            self._feature_rows(models, metrics.FEATURE_REQUESTS, sparse),
            [count for model in models for count in model.requests_F[sparse].tolist()],
        )
        statistics = [model.statistic for model in models]
        yield Family(
            metrics.FEATURE_REQUEST_MAX,
            self._feature_rows(models, metrics.FEATURE_REQUEST_MAX, everything),
            edges_SB=_stack([s.edges_FB for s in statistics]),
            cumulative_SB=_stack([s.cumulative_FB for s in statistics]),
            sum_S=[total for s in statistics for total in s.sum_F.tolist()],
        )
        yield Family(
            metrics.EXCEEDANCES,
            self._feature_rows(models, metrics.EXCEEDANCES, limited),
            [count for model in models for count in model.exceedances_F[limited].tolist()],
            exemplars=self._exemplars(models),
        )
        norms = [model.norm for model in models]
        yield Family(
            metrics.RESIDUAL_NORM,
            tuple((m.model_name, str(rows.hook_point)) for m in models for rows in self._watchlist.hooks),
            edges_SB=_stack([n.edges_FB for n in norms]),
            cumulative_SB=_stack([n.cumulative_FB for n in norms]),
            sum_S=[total for n in norms for total in n.sum_F.tolist()],
        )

    def _drift(self, models: Sequence[DriftView]) -> Iterator[Family]:
        yield Family(
            metrics.DRIFT_ARMED, tuple((m.model_name, m.reason) for m in models), [int(m.armed) for m in models]
        )
        armed = [model for model in models if model.armed]
        dated = [model for model in armed if model.baseline_created_seconds]
        yield Family(
            metrics.DRIFT_BASELINE_CREATED,
            tuple((m.model_name,) for m in dated),
            [m.baseline_created_seconds for m in dated],
        )
        for metric, name in ((metrics.DRIFT_LOG10_EVALUE, "log10_evalue"), (metrics.DRIFT_SINCE, "since_seconds")):
            yield Family(
                metric,
                tuple(
                    (*self._row(m.model_name, f, metric), kind) for m in armed for kind in KINDS for f in self._features
                ),
                [v for m in armed for kind in KINDS for v in getattr(m, name)[kind].tolist()],
            )
        yield Family(
            metrics.DRIFT_LIMIT,
            tuple((m.model_name, kind) for m in armed for kind in (*KINDS, COMMON)),
            [m.log10_limit[kind] for m in armed for kind in (*KINDS, COMMON)],
        )
        common = [(m.model_name, m.common) for m in armed if m.common]
        names = tuple((name,) for name, _ in common)
        yield Family(metrics.DRIFT_COMMON_LOG10_EVALUE, names, [reading.log10_evalue for _, reading in common])
        yield Family(metrics.DRIFT_COMMON_RATIO, names, [reading.movement.ratio for _, reading in common])
        known = [(m, f) for m in armed for f in np.flatnonzero(np.isfinite(m.rate_ratio_F)).tolist()]
        yield Family(
            metrics.DRIFT_RATE_RATIO,
            tuple((m.model_name, self._features[f].id) for m, f in known),
            [float(m.rate_ratio_F[f]) for m, f in known],
        )
        rows = tuple((m.model_name,) for m in models)
        yield Family(metrics.DRIFT_WINDOWS, rows, [m.windows for m in models])
        yield Family(metrics.DRIFT_EXCLUDED_WINDOWS, rows, [m.excluded_windows for m in models])
        yield Family(metrics.DRIFT_REQUESTS, rows, [m.requests for m in models])
        yield Family(metrics.DRIFT_UNNAMED_REQUESTS, rows, [m.unnamed_requests for m in models])

    def _replicas(self, replicas: Sequence[ReplicaView]) -> Iterator[Family]:
        rows = tuple((replica.replica,) for replica in replicas)
        yield Family(metrics.REPLICA_LAST_SEEN, rows, [r.last_seen_seconds for r in replicas])
        yield Family(metrics.STREAM_CONNECTED, rows, [int(r.connected) for r in replicas])
        yield Family(
            metrics.ENGINE_ARMED,
            tuple((r.replica, r.not_armed_reason) for r in replicas),
            [int(r.armed) for r in replicas],
        )
        matches = tuple((r.replica, r.model_match) for r in replicas)
        yield Family(metrics.ENGINE_MODEL, matches, [1] * len(replicas))
        for name, metric in ENGINE_COUNTERS.items():
            yield Family(metric, rows, [getattr(r.counters, name) for r in replicas])

    def _collector(self, snapshot: Snapshot) -> Iterator[Family]:
        totals = snapshot.collector
        refused: dict[str, int] = {**dict.fromkeys(REFUSALS, 0), **totals.streams_refused}
        yield Family(metrics.STREAMS_REFUSED, tuple((reason,) for reason in refused), list(refused.values()))
        for metric, value in (
            (metrics.MESSAGES, totals.messages),
            (metrics.DUPLICATES, totals.duplicates),
            (metrics.LOST_SEQUENCES, totals.lost_sequences),
            (metrics.EVENTS_EVICTED, totals.exceedances_evicted),
            (metrics.REQUESTS_EVICTED, totals.requests_evicted),
            (metrics.SUMMARIES_EVICTED, totals.summaries_evicted),
            (metrics.ACCOUNTING_EXCESS, totals.accounting_excess_tokens),
        ):
            yield Family(metric, ((),), [value])
        lag = totals.ingest_lag
        yield Family(
            metrics.INGEST_LAG,
            ((),),
            edges_SB=np.array([lag.edges]),
            cumulative_SB=np.cumsum([lag.counts], axis=1),
            sum_S=[lag.sum],
        )

    def _stages(self, snapshot: Snapshot, process: ProcessFacts) -> Iterator[Family]:
        rows = fullness(snapshot, process)
        stages = tuple((stage,) for stage, _, _ in rows)
        yield Family(metrics.STAGE_DEPTH, stages, [depth for _, depth, _ in rows])
        yield Family(metrics.STAGE_CAPACITY, stages, [capacity for _, _, capacity in rows])
        yield Family(metrics.MERGE_QUEUE_OLDEST, ((),), [process.receiver.queue.oldest_seconds])

    def _forwarding(self, snapshot: Snapshot, report_client: ReportClientFacts) -> Iterator[Family]:
        """To a gateway, where there is one, and from every sidecar that forwards here."""
        forward = snapshot.forward
        here: LabelRows = ((),) if forward else ()
        for metric, value in (
            (metrics.FORWARD_CONNECTED, int(report_client.connected)),
            (metrics.FORWARD_RECONNECTS, report_client.reconnects),
            (metrics.FORWARD_RESENT, report_client.resent_reports),
            (metrics.FORWARD_REPORTS, forward.cut if forward else 0),
            (metrics.FORWARD_WAITING, forward.waiting_reports if forward else 0),
            (metrics.FORWARD_OLDEST, forward.oldest_seconds if forward else 0.0),
            (metrics.FORWARD_ROWS, forward.waiting_bytes if forward else 0),
            (metrics.FORWARD_CAPACITY, forward.capacity_bytes if forward else 0),
        ):
            yield Family(metric, here, [value] * len(here))
        shed = (("request", forward.shed_requests), ("crossing", forward.shed_exceedances)) if forward else ()
        yield Family(metrics.FORWARD_SHED, tuple((kind,) for kind, _ in shed), [count for _, count in shed])
        rows = tuple((sidecar.collector,) for sidecar in snapshot.forwarders)
        yield Family(metrics.FORWARDER_CONNECTED, rows, [int(f.connected) for f in snapshot.forwarders])
        yield Family(metrics.FORWARDER_LAST_SEEN, rows, [f.last_seen_seconds for f in snapshot.forwarders])
        yield Family(
            metrics.FORWARDER_SHED,
            tuple((f.collector, kind) for f in snapshot.forwarders for kind in ("request", "crossing")),
            [count for f in snapshot.forwarders for count in (f.shed_requests, f.shed_exceedances)],
        )

    def _about(self, process: ProcessFacts) -> Iterator[Family]:
        watchlist, state = self._watchlist, process.state
        for metric, value in (
            (metrics.STATE_DURABLE, int(state.durable)),
            (metrics.STATE_CHECKPOINT, state.checkpoint_seconds),
            (metrics.STATE_JOURNAL, state.journal_bytes),
            (metrics.STATE_WRITE_FAILURES, state.write_failures),
            (metrics.STATE_RESUMED, state.resumed_events),
            (metrics.STATE_ASIDE, state.files_aside),
        ):
            yield Family(metric, ((),), [value])
        yield Family(metrics.WATCHLIST_INFO, ((watchlist.name, watchlist.sha256, str(len(self._features))),), [1])
        yield Family(metrics.BUILD_INFO, ((__version__,),), [1])
        yield Family(metrics.PROCESS_START, ((),), [process.start_seconds])
        resident = () if process.resident_bytes is None else (process.resident_bytes,)
        yield Family(metrics.PROCESS_MEMORY, ((),) * len(resident), resident)
        yield Family(metrics.PROCESS_CPU, ((),), [process.cpu_seconds])

    def _feature_rows(self, models: Sequence[ModelTotals], metric: Metric, features: Sequence[int]) -> LabelRows:
        rows: list[tuple[str, ...]] = []
        for model in models:
            key = (model.model_name, metric)
            if key not in self._rows:
                self._rows[key] = tuple(self._row(model.model_name, self._features[i], metric) for i in features)
            rows += self._rows[key]
        return tuple(rows)

    def _row(self, model_name: str, feature: Feature, metric: Metric) -> tuple[str, ...]:
        labels = (model_name, feature.id)
        return (*labels, str(feature.severity)) if "severity" in metric.labels else labels

    def _exemplars(self, models: Sequence[ModelTotals]) -> dict[int, ExemplarLine]:
        place = {feature: i for i, feature in enumerate(self._limited)}
        return {
            number * len(self._limited) + place[feature]: ExemplarLine(
                (("request_id", latest.request_id), ("trace_id", latest.trace_id)), latest.value, latest.seconds
            )
            for number, model in enumerate(models)
            for feature, latest in model.latest.items()
        }


def _evidence(facts: EvidenceFacts) -> Iterator[Family]:
    writer = facts.writer
    lost = tuple((kind, reason) for kind in KINDS_OF_RECORD for reason in DROP_REASONS)
    yield Family(
        metrics.EVIDENCE_WRITTEN,
        tuple((kind,) for kind in KINDS_OF_RECORD),
        [writer.written.get(kind, 0) for kind in KINDS_OF_RECORD],
    )
    yield Family(metrics.EVIDENCE_DROPPED, lost, [writer.dropped.get(key, 0) for key in lost])
    yield Family(metrics.EVIDENCE_QUEUE, ((),), [writer.queued_bytes])
    yield Family(metrics.EVIDENCE_FOLDER, ((),), [facts.folder_bytes])
    yield Family(metrics.EVIDENCE_DAMAGED, ((),), [len(facts.damaged)])


def _otlp(facts: OtlpFacts) -> Iterator[Family]:
    events = facts.events
    unsent = [sum(count for (_, why), count in events.dropped.items() if why == reason) for reason in DROP_REASONS]
    outcomes = {"sent": sum(events.written.values()), **dict(zip(DROP_REASONS, unsent, strict=True))}
    yield Family(metrics.OTLP_EVENTS, tuple((outcome,) for outcome in outcomes), list(outcomes.values()))
    yield Family(metrics.OTLP_METRICS_FAILURES, ((),), [facts.failed_metrics])


def _within(family: Family, samples: int) -> Family:
    """As much of a family of features as fits; others, such as health, are few and always shown."""
    if "feature" not in family.metric.labels or family.samples <= samples:
        return family
    return family.first(samples * len(family.labels) // family.samples)


def _health(found: Sequence[FoundCause]) -> Family:
    names = {cause.name for cause in found}
    rows = tuple((cause.name, cause.level, cause.alert) for cause in CAUSES.values())
    return Family(metrics.HEALTH_CAUSE, rows, [int(name in names) for name in CAUSES])


def _stack(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty((0, 0))
