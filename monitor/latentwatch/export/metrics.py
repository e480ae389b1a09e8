"""Every metric of the collector, in one table. The exposition renders from it and nothing else is exposed.

Names follow Prometheus' conventions: one prefix, base units, `_total` on counters. `model_name` and `engine` are vLLM's
own labels, so that joins work. Text for people stands in `latentwatch_feature_info` only. Series are bounded by the
watchlist and the collector's bounds: features by models, replicas only on health series.

`Metric.name` is the name of the samples in Prometheus text, without `_bucket`, `_sum` and `_count`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from latentwatch.aggregate.histogram import LAG_EDGES, NORM_EDGES

Kind = Literal["counter", "gauge", "histogram", "info"]


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] | None = None
    """Finite upper bounds of a histogram; None where each series has bounds of its own, and for other kinds."""

    @property
    def family(self) -> str:
        """The name of the family in OpenMetrics: without `_total` and `_info`."""
        if self.kind == "counter":
            return self.name.removesuffix("_total")
        if self.kind == "info":
            return self.name.removesuffix("_info")
        return self.name

    @property
    def samples(self) -> tuple[str, ...]:
        """Names of the samples on /metrics."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))
        return (self.name,)


_ENGINE: Final = ("model_name", "engine")
_FEATURE: Final = ("model_name", "feature")
_REPLICA: Final = ("replica",)

TOKENS = Metric(
    "latentwatch_tokens_total",
    "counter",
    (*_ENGINE, "state", "reason", "phase"),
    "Tokens that the engine computed or skipped, by what became of them: scored, inherited, unseen, dropped.",
)
REQUESTS = Metric(
    "latentwatch_requests_total",
    "counter",
    (*_ENGINE, "outcome"),
    "Requests that ended: finished, aborted, or lost with their engine.",
)
OPEN_REQUESTS = Metric(
    "latentwatch_open_requests", "gauge", _ENGINE, "Requests that began and have not ended, with statistics held."
)
FEATURE_INFO = Metric(
    "latentwatch_feature_info",
    "info",
    ("feature", "label", "severity", "hook_point", "kind", "gate"),
    "What each feature of the watchlist is, to be joined on the label feature.",
)
FEATURE_FIRED_TOKENS = Metric(
    "latentwatch_feature_fired_tokens_total",
    "counter",
    _FEATURE,
    "Tokens on which a sparse feature fired, that is, its activation was not zero. Skipped positions do not count.",
)
FEATURE_REQUESTS = Metric(
    "latentwatch_feature_requests_total",
    "counter",
    _FEATURE,
    "Requests that ended in which a sparse feature fired at least once.",
)
FEATURE_REQUEST_MAX = Metric(
    "latentwatch_feature_request_max",
    "histogram",
    _FEATURE,
    "Statistic of each request that ended with a scored token: the one that the limit is on, else the maximum. "
    "A sparse feature that never fired counts as 0. Sparse features have half-decade bounds; dense ones, whose scores "
    "have both signs, have linear bounds around the limit and no _sum and _count.",
)
FEATURE_LIMIT = Metric(
    "latentwatch_feature_limit", "gauge", ("feature",), "Limit on a feature's request statistic, in its own units."
)
EXCEEDANCES = Metric(
    "latentwatch_exceedances_total",
    "counter",
    (*_FEATURE, "severity"),
    "Requests whose statistic for a feature went above its limit; each request counts once per feature.",
)
DRIFT_ARMED = Metric(
    "latentwatch_drift_armed",
    "gauge",
    ("model_name", "reason"),
    "Whether drift is measured: 1, or 0 with the reason, such as no_baseline or baseline_mismatch.",
)
DRIFT_BASELINE_CREATED = Metric(
    "latentwatch_drift_baseline_created_timestamp_seconds",
    "gauge",
    ("model_name",),
    "Unix time at which the baseline that drift is measured against was calibrated.",
)
DRIFT_LOG10_EVALUE = Metric(
    "latentwatch_drift_log10_evalue",
    "gauge",
    (*_FEATURE, "kind"),
    "Evidence that a feature drifts from its baseline, as the decimal logarithm of a Shiryaev-Roberts statistic. "
    "Kinds: rate, shape (values where it fires), replica (one against the others), coactivation (with another "
    "feature), canary (the same prompts score otherwise).",
)
DRIFT_LIMIT = Metric(
    "latentwatch_drift_limit_log10_evalue",
    "gauge",
    ("model_name", "kind"),
    "Evidence from which a kind of detector alarms: calibrated to the false pages that the whole watchlist may give.",
)
DRIFT_RATE_RATIO = Metric(
    "latentwatch_drift_rate_ratio",
    "gauge",
    _FEATURE,
    "Requests in which a feature is active / those that the baseline expects: since the change while the rate alarms, "
    "else over the last hundred windows or so. Absent where none is expected.",
)
DRIFT_SINCE = Metric(
    "latentwatch_drift_since_timestamp_seconds",
    "gauge",
    (*_FEATURE, "kind"),
    "Unix time at which a drift began, by the detector's own estimate; 0 while it does not alarm, and where the drift "
    "was there from the first window on. Whether it alarms: compare the evidence with its limit.",
)
DRIFT_WINDOWS = Metric(
    "latentwatch_drift_windows_total", "counter", ("model_name",), "Windows with requests that the detectors took."
)
DRIFT_EXCLUDED_WINDOWS = Metric(
    "latentwatch_drift_excluded_windows_total",
    "counter",
    ("model_name",),
    "Windows during an alarm: a baseline that is calibrated from this collector leaves them out.",
)
DRIFT_REQUESTS = Metric(
    "latentwatch_drift_requests_total",
    "counter",
    ("model_name",),
    "Ended requests in windows that closed; canary runs do not count.",
)
RESIDUAL_NORM = Metric(
    "latentwatch_residual_norm",
    "histogram",
    ("model_name", "hook_point"),
    "Euclidean norm of the residual stream of each scored token, in the model's own units.",
    NORM_EDGES,
)
REPLICA_LAST_SEEN = Metric(
    "latentwatch_replica_last_seen_timestamp_seconds",
    "gauge",
    _REPLICA,
    "Unix time of the last message from an engine process; idle engines send one every few seconds.",
)
STREAM_CONNECTED = Metric(
    "latentwatch_stream_connected", "gauge", _REPLICA, "Whether an engine process has a stream open, 1 or 0."
)
ENGINE_ARMED = Metric(
    "latentwatch_engine_armed",
    "gauge",
    (*_REPLICA, "reason"),
    "Whether an engine process scores: 1, or 0 with the reason.",
)
STREAMS_REFUSED = Metric(
    "latentwatch_streams_refused_total",
    "counter",
    ("reason",),
    "Connections, streams, messages and HTTP requests that this collector refused.",
)
MESSAGES = Metric(
    "latentwatch_collector_messages_total", "counter", (), "Batches received, duplicates included, refused ones not."
)
DUPLICATES = Metric(
    "latentwatch_collector_duplicates_total", "counter", (), "Batches that came again and were ignored."
)
LOST_SEQUENCES = Metric(
    "latentwatch_collector_lost_sequences_total",
    "counter",
    (),
    "Numbers of batches that never came: given up, or made part of a later one that says the same of every token.",
)
INGEST_LAG = Metric(
    "latentwatch_ingest_lag_seconds",
    "histogram",
    (),
    "Time from the engine's hand-over of a step to its merge here, clocks of both hosts compared. For what another "
    "collector forwards, from the time at which it cut its report.",
    LAG_EDGES,
)
ENGINE_COUNTERS: Final = {
    "steps": Metric("latentwatch_engine_steps_total", "counter", _REPLICA, "Steps that the engine ran."),
    "ring_dropped_steps": Metric(
        "latentwatch_engine_ring_dropped_steps_total",
        "counter",
        _REPLICA,
        "Steps whose scores found no free slot in the shared-memory ring.",
    ),
    "op_silent_steps": Metric(
        "latentwatch_engine_op_silent_steps_total",
        "counter",
        _REPLICA,
        "Steps that ran without a trace of the score op.",
    ),
    "recomputed_tokens": Metric(
        "latentwatch_engine_recomputed_tokens_total",
        "counter",
        _REPLICA,
        "Tokens computed again after a preemption; their first scores stand.",
    ),
    "surplus_tokens": Metric(
        "latentwatch_engine_surplus_tokens_total",
        "counter",
        _REPLICA,
        "Rows computed past the end of a request, which are tokens of none.",
    ),
    "exporter_restarts": Metric(
        "latentwatch_engine_exporter_restarts_total",
        "counter",
        _REPLICA,
        "Starts of the exporter process after the first.",
    ),
    "shed_batches": Metric(
        "latentwatch_engine_shed_batches_total",
        "counter",
        _REPLICA,
        "Batches whose scores the sender gave up, because the collector was away or slow.",
    ),
    "reconnects": Metric(
        "latentwatch_engine_reconnects_total", "counter", _REPLICA, "Streams that the sender opened after the first."
    ),
    "unattributed_rows": Metric(
        "latentwatch_engine_unattributed_rows_total",
        "counter",
        _REPLICA,
        "Rows of requests that the exporter did not know.",
    ),
    "unannounced_requests": Metric(
        "latentwatch_engine_unannounced_requests_total",
        "counter",
        _REPLICA,
        "Requests that began and ended while the exporter read nothing for long. Their tokens are counted nowhere.",
    ),
    "untraced_requests": Metric(
        "latentwatch_engine_untraced_requests_total",
        "counter",
        _REPLICA,
        "Requests served without their client's trace context, because it could not be carried to the engine.",
    ),
    "shed_critical_tokens": Metric(
        "latentwatch_engine_shed_critical_tokens_total",
        "counter",
        _REPLICA,
        "Tokens above a limit of a critical feature whose scores the sender gave up; part of dropped{buffer_full}.",
    ),
    "shed_warning_tokens": Metric(
        "latentwatch_engine_shed_warning_tokens_total",
        "counter",
        _REPLICA,
        "Tokens above a limit of a warning feature, and of no critical one, whose scores the sender gave up.",
    ),
    "lost_tokens": Metric(
        "latentwatch_engine_lost_tokens_total",
        "counter",
        _REPLICA,
        "Tokens that the sender gave up with their books: beyond every bound, or refused by the collector.",
    ),
    "spool_bytes": Metric(
        "latentwatch_engine_spool_bytes", "gauge", _REPLICA, "Bytes in the engine's spool, all of its boots together."
    ),
    "spool_failures": Metric(
        "latentwatch_engine_spool_failures_total",
        "counter",
        _REPLICA,
        "Times that the spool's disk could not be written or read; scores wait in memory meanwhile.",
    ),
    "spool_refused": Metric(
        "latentwatch_engine_spool_refused_total",
        "counter",
        _REPLICA,
        "Files in the spool that are foreign or damaged, and boots in it that no collector takes.",
    ),
}
"""By the field of step.EngineCounters. They begin again at 0 with every boot of the engine."""
EVENTS_EVICTED = Metric(
    "latentwatch_events_evicted_total",
    "counter",
    (),
    "Exceedance events that this collector no longer lists, because newer ones took their place.",
)
REQUESTS_EVICTED = Metric(
    "latentwatch_requests_evicted_total",
    "counter",
    (),
    "Running requests without statistics of their own, because more ran than this collector holds. Tokens still count.",
)
SUMMARIES_EVICTED = Metric(
    "latentwatch_request_summaries_evicted_total",
    "counter",
    (),
    "Summaries of ended requests that this collector no longer lists, because newer ones took their place.",
)
ACCOUNTING_EXCESS = Metric(
    "latentwatch_accounting_excess_tokens_total",
    "counter",
    (),
    "Tokens accounted to a request beyond the total that its engine reported. Anything above 0 is a bug.",
)
STATE_DURABLE = Metric(
    "latentwatch_state_durable",
    "gauge",
    (),
    "Whether what this collector acknowledges survives its death: 1, or 0 without --state and while its disk fails.",
)
STATE_CHECKPOINT = Metric(
    "latentwatch_state_checkpoint_timestamp_seconds",
    "gauge",
    (),
    "Unix time of the newest checkpoint of the state, 0 for none.",
)
STATE_JOURNAL = Metric(
    "latentwatch_state_journal_bytes", "gauge", (), "Events written since the newest checkpoint began."
)
STATE_WRITE_FAILURES = Metric(
    "latentwatch_state_write_failures_total", "counter", (), "Failed writes of the state since this process started."
)
STATE_RESUMED = Metric(
    "latentwatch_state_resumed_events",
    "gauge",
    (),
    "Events that this process took from the journal of the one before it when it started.",
)
STAGE_DEPTH = Metric(
    "latentwatch_stage_depth",
    "gauge",
    ("stage",),
    "How much each bounded stage of this collector holds; the stage's name has the unit.",
)
STAGE_CAPACITY = Metric(
    "latentwatch_stage_capacity", "gauge", ("stage",), "How much each bounded stage of this collector may hold."
)
MERGE_QUEUE_OLDEST = Metric(
    "latentwatch_merge_queue_oldest_seconds",
    "gauge",
    (),
    "How long the message has waited that waits longest for its stream's turn to be merged.",
)
FORWARD_CONNECTED = Metric(
    "latentwatch_forward_connected", "gauge", (), "Whether the gateway of --forward-to has welcomed this collector."
)
FORWARD_RECONNECTS = Metric(
    "latentwatch_forward_reconnects_total", "counter", (), "Streams to the gateway that were opened after the first."
)
FORWARD_REPORTS = Metric(
    "latentwatch_forward_reports_total", "counter", (), "Reports that were cut for the gateway since the state began."
)
FORWARD_RESENT = Metric(
    "latentwatch_forward_resent_reports_total", "counter", (), "Reports that went to the gateway more than once."
)
FORWARD_WAITING = Metric(
    "latentwatch_forward_waiting_reports", "gauge", (), "Reports that the gateway has not acknowledged; 8 at most."
)
FORWARD_OLDEST = Metric(
    "latentwatch_forward_oldest_timestamp_seconds",
    "gauge",
    (),
    "Unix time at which the oldest report without an acknowledgement was cut, 0 for none.",
)
FORWARD_ROWS = Metric(
    "latentwatch_forward_waiting_bytes", "gauge", (), "Rows of requests that are in no report yet, in memory."
)
FORWARD_CAPACITY = Metric(
    "latentwatch_forward_capacity_bytes", "gauge", (), "Rows of requests that may wait; beyond it the oldest are shed."
)
FORWARD_SHED = Metric(
    "latentwatch_forward_shed_total",
    "counter",
    ("kind",),
    "Rows of requests, and crossings in them, that the gateway will not see. Counts of tokens, requests and features "
    "reach it all the same.",
)
FORWARDER_CONNECTED = Metric(
    "latentwatch_forwarder_connected", "gauge", ("collector",), "Whether a collector that forwards here has a stream."
)
FORWARDER_LAST_SEEN = Metric(
    "latentwatch_forwarder_last_seen_timestamp_seconds",
    "gauge",
    ("collector",),
    "Unix time of the last report of a collector that forwards here; each sends one a second.",
)
FORWARDER_SHED = Metric(
    "latentwatch_forwarder_shed_total",
    "counter",
    ("collector", "kind"),
    "What a collector that forwards here has shed, by its own account since its state began.",
)
EVIDENCE_WRITTEN = Metric(
    "latentwatch_evidence_written_total", "counter", ("kind",), "Records that were written to the evidence folder."
)
EVIDENCE_DROPPED = Metric(
    "latentwatch_evidence_dropped_total",
    "counter",
    ("kind", "reason"),
    "Records of evidence that were not written: the queue was full, or writing failed.",
)
EVIDENCE_QUEUE = Metric(
    "latentwatch_evidence_queue_bytes", "gauge", (), "Records of evidence that wait to be written, about."
)
EVIDENCE_FOLDER = Metric("latentwatch_evidence_folder_bytes", "gauge", (), "Size of the evidence on the disk.")
OTLP_EVENTS = Metric(
    "latentwatch_otlp_events_total",
    "counter",
    ("outcome",),
    "Events of exceedances that were sent over OTLP, or not: the queue was full, or the receiver did not take them.",
)
OTLP_METRICS_FAILURES = Metric(
    "latentwatch_otlp_metrics_failures_total", "counter", (), "Times that the OTLP receiver did not take the metrics."
)
SERIES_WITHHELD = Metric(
    "latentwatch_series_withheld",
    "gauge",
    (),
    "Samples of features that this page leaves out, because more models times features stream here than it shows.",
)
WATCHLIST_INFO = Metric(
    "latentwatch_watchlist_info", "info", ("name", "sha256", "features"), "The watchlist that this collector explains."
)
BUILD_INFO = Metric("latentwatch_build_info", "info", ("version",), "The version of this collector.")
PROCESS_START = Metric("process_start_time_seconds", "gauge", (), "Unix time at which the collector's process started.")
PROCESS_MEMORY = Metric("process_resident_memory_bytes", "gauge", (), "Resident memory of the collector's process.")
PROCESS_CPU = Metric("process_cpu_seconds_total", "counter", (), "User and system time of the collector's process.")

METRICS: Final = (
    TOKENS,
    REQUESTS,
    OPEN_REQUESTS,
    FEATURE_INFO,
    FEATURE_LIMIT,
    FEATURE_FIRED_TOKENS,
    FEATURE_REQUESTS,
    FEATURE_REQUEST_MAX,
    EXCEEDANCES,
    DRIFT_ARMED,
    DRIFT_BASELINE_CREATED,
    DRIFT_LOG10_EVALUE,
    DRIFT_LIMIT,
    DRIFT_RATE_RATIO,
    DRIFT_SINCE,
    DRIFT_WINDOWS,
    DRIFT_EXCLUDED_WINDOWS,
    DRIFT_REQUESTS,
    RESIDUAL_NORM,
    REPLICA_LAST_SEEN,
    STREAM_CONNECTED,
    ENGINE_ARMED,
    STREAMS_REFUSED,
    MESSAGES,
    DUPLICATES,
    LOST_SEQUENCES,
    INGEST_LAG,
    *ENGINE_COUNTERS.values(),
    EVENTS_EVICTED,
    REQUESTS_EVICTED,
    SUMMARIES_EVICTED,
    ACCOUNTING_EXCESS,
    STATE_DURABLE,
    STATE_CHECKPOINT,
    STATE_JOURNAL,
    STATE_WRITE_FAILURES,
    STATE_RESUMED,
    STAGE_DEPTH,
    STAGE_CAPACITY,
    MERGE_QUEUE_OLDEST,
    FORWARD_CONNECTED,
    FORWARD_RECONNECTS,
    FORWARD_REPORTS,
    FORWARD_RESENT,
    FORWARD_WAITING,
    FORWARD_OLDEST,
    FORWARD_ROWS,
    FORWARD_CAPACITY,
    FORWARD_SHED,
    FORWARDER_CONNECTED,
    FORWARDER_LAST_SEEN,
    FORWARDER_SHED,
    EVIDENCE_WRITTEN,
    EVIDENCE_DROPPED,
    EVIDENCE_QUEUE,
    EVIDENCE_FOLDER,
    OTLP_EVENTS,
    OTLP_METRICS_FAILURES,
    SERIES_WITHHELD,
    WATCHLIST_INFO,
    BUILD_INFO,
    PROCESS_START,
    PROCESS_MEMORY,
    PROCESS_CPU,
)
"""Every metric there is."""


def sample_names() -> frozenset[str]:
    """Every sample name on /metrics: what rules and dashboards may query."""
    return frozenset(sample for metric in METRICS for sample in metric.samples)
