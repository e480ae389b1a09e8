"""Every metric of the collector, in one table: what is defined here is on /metrics, and nothing else is.

Names follow Prometheus' conventions: one prefix, base units, `_total` on counters. `model_name` and `engine` are vLLM's
own labels, so that joins work. Text for people stands in `latentwatch_feature_info` only. Series are bounded by the
watchlist and the collector's bounds: features by models, replicas only on health series.

`Metric.name` is the name of the samples in Prometheus text, without `_bucket`, `_sum` and `_count`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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


_TABLE: Final[list[Metric]] = []


def _add(kind: Kind, name: str, labels: tuple[str, ...], text: str, buckets: tuple[float, ...] | None = None) -> Metric:
    """A further row of the table."""
    _TABLE.append(Metric(name, kind, labels, text, buckets))
    return _TABLE[-1]


_counter, _gauge, _histogram, _info = (
    partial(_add, "counter"),
    partial(_add, "gauge"),
    partial(_add, "histogram"),
    partial(_add, "info"),
)
_ENGINE: Final = ("model_name", "engine")
_FEATURE: Final = ("model_name", "feature")
_REPLICA: Final = ("replica",)

TOKENS = _counter(
    "latentwatch_tokens_total",
    (*_ENGINE, "state", "reason", "phase"),
    "Tokens that the engine computed or skipped, by what became of them: scored, inherited, unseen, dropped.",
)
REQUESTS = _counter(
    "latentwatch_requests_total",
    (*_ENGINE, "outcome"),
    "Requests that ended: finished, aborted, or lost with their engine.",
)
OPEN_REQUESTS = _gauge(
    "latentwatch_open_requests", _ENGINE, "Requests that began and have not ended, with statistics held."
)
FEATURE_INFO = _info(
    "latentwatch_feature_info",
    ("feature", "label", "severity", "hook_point", "kind", "gate"),
    "What each feature of the watchlist is, to be joined on the label feature.",
)
FEATURE_LIMIT = _gauge(
    "latentwatch_feature_limit", ("feature",), "Limit on a feature's request statistic, in its own units."
)
FEATURE_FIRED_TOKENS = _counter(
    "latentwatch_feature_fired_tokens_total",
    _FEATURE,
    "Tokens on which a sparse feature fired, that is, its activation was not zero. Skipped positions do not count.",
)
FEATURE_REQUESTS = _counter(
    "latentwatch_feature_requests_total", _FEATURE, "Requests that ended in which a sparse feature fired at least once."
)
FEATURE_REQUEST_MAX = _histogram(
    "latentwatch_feature_request_max",
    _FEATURE,
    "Statistic of each request that ended with a scored token: the one that the limit is on, else the maximum. "
    "A sparse feature that never fired counts as 0. Sparse features have half-decade bounds; dense ones, whose scores "
    "have both signs, have linear bounds around the limit and no _sum and _count.",
)
EXCEEDANCES = _counter(
    "latentwatch_exceedances_total",
    (*_FEATURE, "severity"),
    "Requests whose statistic for a feature went above its limit; each request counts once per feature.",
)
DRIFT_ARMED = _gauge(
    "latentwatch_drift_armed",
    ("model_name", "reason"),
    "Whether drift is measured: 1, or 0 with the reason, such as no_baseline or baseline_mismatch.",
)
DRIFT_BASELINE_CREATED = _gauge(
    "latentwatch_drift_baseline_created_timestamp_seconds",
    ("model_name",),
    "Unix time at which the baseline that drift is measured against was calibrated.",
)
DRIFT_LOG10_EVALUE = _gauge(
    "latentwatch_drift_log10_evalue",
    (*_FEATURE, "severity", "kind"),
    "Evidence that a feature drifts from its baseline, as the decimal logarithm of a Shiryaev-Roberts statistic. "
    "Kinds: rate, shape (values where it fires), replica (one against the others), coactivation (with another "
    "feature), canary (the same prompts score otherwise).",
)
DRIFT_LIMIT = _gauge(
    "latentwatch_drift_limit_log10_evalue",
    ("model_name", "kind"),
    "Evidence from which a kind of detector alarms: calibrated to the false pages that the whole watchlist may give. "
    "Kind common is of latentwatch_drift_common_log10_evalue.",
)
DRIFT_COMMON_LOG10_EVALUE = _gauge(
    "latentwatch_drift_common_log10_evalue",
    ("model_name",),
    "Evidence that all features together drift from the baseline, on the scale of latentwatch_drift_log10_evalue.",
)
DRIFT_COMMON_RATIO = _gauge(
    "latentwatch_drift_common_ratio",
    ("model_name",),
    "Active requests / expected ones that all features have in common; 1 while no such movement is certain. Evidence "
    "on the rate of a feature is of what goes beyond it.",
)
DRIFT_RATE_RATIO = _gauge(
    "latentwatch_drift_rate_ratio",
    _FEATURE,
    "Requests in which a feature is active / those that the baseline expects: since the change while the rate alarms, "
    "else over the last hundred windows or so. Absent where none is expected.",
)
DRIFT_SINCE = _gauge(
    "latentwatch_drift_since_timestamp_seconds",
    (*_FEATURE, "kind"),
    "Unix time at which a drift began, by the detector's own estimate; 0 while it does not alarm, and where the drift "
    "was there from the first window on. Whether it alarms: compare the evidence with its limit.",
)
DRIFT_WINDOWS = _counter(
    "latentwatch_drift_windows_total", ("model_name",), "Windows with requests that the detectors took."
)
DRIFT_EXCLUDED_WINDOWS = _counter(
    "latentwatch_drift_excluded_windows_total",
    ("model_name",),
    "Windows during an alarm: a baseline that is calibrated from this collector leaves them out.",
)
DRIFT_REQUESTS = _counter(
    "latentwatch_drift_requests_total",
    ("model_name",),
    "Ended requests in windows that closed; canary runs do not count.",
)
DRIFT_UNNAMED_REQUESTS = _counter(
    "latentwatch_drift_unnamed_requests_total",
    ("model_name",),
    "Requests, among those that a later baseline would be made of, whose adapter and route have no counts of their "
    "own: beyond seven of them, those of less than 1 in 64 requests are counted together.",
)
RESIDUAL_NORM = _histogram(
    "latentwatch_residual_norm",
    ("model_name", "hook_point"),
    "Euclidean norm of the residual stream of each scored token, in the model's own units.",
    NORM_EDGES,
)
REPLICA_LAST_SEEN = _gauge(
    "latentwatch_replica_last_seen_timestamp_seconds",
    _REPLICA,
    "Unix time of the last message from an engine process; idle engines send one every few seconds.",
)
STREAM_CONNECTED = _gauge(
    "latentwatch_stream_connected", _REPLICA, "Whether an engine process has a stream open, 1 or 0."
)
ENGINE_ARMED = _gauge(
    "latentwatch_engine_armed", (*_REPLICA, "reason"), "Whether an engine process scores: 1, or 0 with the reason."
)
ENGINE_MODEL = _info(
    "latentwatch_engine_model_info",
    (*_REPLICA, "match"),
    "Whether an engine process serves the model that the watchlist states: same, differs, unknown or not_stated.",
)
STREAMS_REFUSED = _counter(
    "latentwatch_streams_refused_total",
    ("reason",),
    "Connections, streams, messages and HTTP requests that this collector refused.",
)
MESSAGES = _counter(
    "latentwatch_collector_messages_total", (), "Batches received, duplicates included, refused ones not."
)
DUPLICATES = _counter("latentwatch_collector_duplicates_total", (), "Batches that came again and were ignored.")
LOST_SEQUENCES = _counter(
    "latentwatch_collector_lost_sequences_total",
    (),
    "Numbers of batches that never came: given up, or made part of a later one that says the same of every token.",
)
INGEST_LAG = _histogram(
    "latentwatch_ingest_lag_seconds",
    (),
    "Time from the engine's hand-over of a step to its merge here, clocks of both hosts compared. For what another "
    "collector forwards, from the time at which it cut its report.",
    LAG_EDGES,
)
ENGINE_COUNTERS: Final = {
    "steps": _counter("latentwatch_engine_steps_total", _REPLICA, "Steps that the engine ran."),
    "ring_dropped_steps": _counter(
        "latentwatch_engine_ring_dropped_steps_total",
        _REPLICA,
        "Steps whose scores found no free slot in the shared-memory ring.",
    ),
    "op_silent_steps": _counter(
        "latentwatch_engine_op_silent_steps_total", _REPLICA, "Steps that ran without a trace of the score op."
    ),
    "recomputed_tokens": _counter(
        "latentwatch_engine_recomputed_tokens_total",
        _REPLICA,
        "Tokens computed again after a preemption; their first scores stand.",
    ),
    "surplus_tokens": _counter(
        "latentwatch_engine_surplus_tokens_total",
        _REPLICA,
        "Rows computed past the end of a request, which are tokens of none.",
    ),
    "exporter_restarts": _counter(
        "latentwatch_engine_exporter_restarts_total", _REPLICA, "Starts of the exporter process after the first."
    ),
    "shed_batches": _counter(
        "latentwatch_engine_shed_batches_total",
        _REPLICA,
        "Batches whose scores the sender gave up, because the collector was away or slow.",
    ),
    "reconnects": _counter(
        "latentwatch_engine_reconnects_total", _REPLICA, "Streams that the sender opened after the first."
    ),
    "unattributed_rows": _counter(
        "latentwatch_engine_unattributed_rows_total", _REPLICA, "Rows of requests that the exporter did not know."
    ),
    "unannounced_requests": _counter(
        "latentwatch_engine_unannounced_requests_total",
        _REPLICA,
        "Requests of which only sums are told: dropped{ring_full} where no exporter read for long, "
        "latentwatch_engine_lost_tokens_total where their books had no room.",
    ),
    "untraced_requests": _counter(
        "latentwatch_engine_untraced_requests_total",
        _REPLICA,
        "Requests served without their client's trace context, because it could not be carried to the engine.",
    ),
    "shed_critical_tokens": _counter(
        "latentwatch_engine_shed_critical_tokens_total",
        _REPLICA,
        "Tokens above a limit of a critical feature whose scores the sender gave up; part of dropped{buffer_full}.",
    ),
    "shed_warning_tokens": _counter(
        "latentwatch_engine_shed_warning_tokens_total",
        _REPLICA,
        "Tokens above a limit of a warning feature, and of no critical one, whose scores the sender gave up.",
    ),
    "lost_tokens": _counter(
        "latentwatch_engine_lost_tokens_total",
        _REPLICA,
        "Tokens that the sender gave up with their books: beyond every bound, or refused by the collector.",
    ),
    "spool_bytes": _gauge(
        "latentwatch_engine_spool_bytes", _REPLICA, "Bytes in the engine's spool, all of its boots together."
    ),
    "spool_failures": _counter(
        "latentwatch_engine_spool_failures_total",
        _REPLICA,
        "Times that the spool's disk could not be written or read; scores wait in memory meanwhile.",
    ),
    "spool_refused": _counter(
        "latentwatch_engine_spool_refused_total",
        _REPLICA,
        "Files in the spool that are foreign or damaged, and boots in it that no collector takes.",
    ),
}
"""By the field of step.batch.EngineCounters. They begin again at 0 with every boot of the engine."""
EVENTS_EVICTED = _counter(
    "latentwatch_events_evicted_total",
    (),
    "Exceedance events that this collector no longer lists, because newer ones took their place.",
)
REQUESTS_EVICTED = _counter(
    "latentwatch_requests_evicted_total",
    (),
    "Running requests without statistics of their own, because more ran than this collector holds. Tokens still count.",
)
SUMMARIES_EVICTED = _counter(
    "latentwatch_request_summaries_evicted_total",
    (),
    "Summaries of ended requests that this collector no longer lists, because newer ones took their place.",
)
ACCOUNTING_EXCESS = _counter(
    "latentwatch_accounting_excess_tokens_total",
    (),
    "Tokens accounted to a request beyond the total that its engine reported. Anything above 0 is a bug.",
)
STATE_DURABLE = _gauge(
    "latentwatch_state_durable",
    (),
    "Whether what this collector acknowledges survives its death: 1, or 0 without --state and while its disk fails.",
)
STATE_CHECKPOINT = _gauge(
    "latentwatch_state_checkpoint_timestamp_seconds", (), "Unix time of the newest checkpoint of the state, 0 for none."
)
STATE_JOURNAL = _gauge("latentwatch_state_journal_bytes", (), "Events written since the newest checkpoint began.")
STATE_WRITE_FAILURES = _counter(
    "latentwatch_state_write_failures_total", (), "Failed writes of the state since this process started."
)
STATE_ASIDE = _gauge(
    "latentwatch_state_aside_files",
    (),
    "Files of the state that could not be read, or not to their end; nothing reads or removes them.",
)
STATE_RESUMED = _gauge(
    "latentwatch_state_resumed_events",
    (),
    "Events that this process took from the journal of the one before it when it started.",
)
STAGE_DEPTH = _gauge(
    "latentwatch_stage_depth",
    ("stage",),
    "How much each bounded stage of this collector holds; the stage's name has the unit.",
)
STAGE_CAPACITY = _gauge(
    "latentwatch_stage_capacity", ("stage",), "How much each bounded stage of this collector may hold."
)
MERGE_QUEUE_OLDEST = _gauge(
    "latentwatch_merge_queue_oldest_seconds",
    (),
    "How long the message has waited that waits longest for its stream's turn to be merged.",
)
FORWARD_CONNECTED = _gauge(
    "latentwatch_forward_connected", (), "Whether the gateway of --forward-to has welcomed this collector."
)
FORWARD_RECONNECTS = _counter(
    "latentwatch_forward_reconnects_total", (), "Streams to the gateway that were opened after the first."
)
FORWARD_REPORTS = _counter(
    "latentwatch_forward_reports_total", (), "Reports that were cut for the gateway since the state began."
)
FORWARD_RESENT = _counter(
    "latentwatch_forward_resent_reports_total", (), "Reports that went to the gateway more than once."
)
FORWARD_WAITING = _gauge(
    "latentwatch_forward_waiting_reports", (), "Reports that the gateway has not acknowledged; 8 at most."
)
FORWARD_OLDEST = _gauge(
    "latentwatch_forward_oldest_timestamp_seconds",
    (),
    "Unix time at which the oldest report without an acknowledgement was cut, 0 for none.",
)
FORWARD_ROWS = _gauge("latentwatch_forward_waiting_bytes", (), "Rows of requests that are in no report yet, in memory.")
FORWARD_CAPACITY = _gauge(
    "latentwatch_forward_capacity_bytes", (), "Rows of requests that may wait; beyond it the oldest are shed."
)
FORWARD_SHED = _counter(
    "latentwatch_forward_shed_total",
    ("kind",),
    "Rows of requests, and exceedances in them, that the gateway will not see. Counts of tokens, requests and features "
    "reach it all the same.",
)
FORWARDER_CONNECTED = _gauge(
    "latentwatch_forwarder_connected", ("collector",), "Whether a collector that forwards here has a stream."
)
FORWARDER_LAST_SEEN = _gauge(
    "latentwatch_forwarder_last_seen_timestamp_seconds",
    ("collector",),
    "Unix time of the last report of a collector that forwards here; each sends one a second.",
)
FORWARDER_SHED = _counter(
    "latentwatch_forwarder_shed_total",
    ("collector", "kind"),
    "What a collector that forwards here has shed, by its own account since its state began.",
)
EVIDENCE_WRITTEN = _counter(
    "latentwatch_evidence_written_total", ("kind",), "Records that were written to the evidence folder."
)
EVIDENCE_DROPPED = _counter(
    "latentwatch_evidence_dropped_total",
    ("kind", "reason"),
    "Records of evidence that were not written: the queue was full, or writing failed.",
)
EVIDENCE_QUEUE = _gauge("latentwatch_evidence_queue_bytes", (), "Records of evidence that wait to be written, about.")
EVIDENCE_DAMAGED = _gauge(
    "latentwatch_evidence_damaged_files",
    (),
    "Files of evidence that cannot be used and were set aside; what is in them is neither found nor deleted.",
)
EVIDENCE_FOLDER = _gauge("latentwatch_evidence_folder_bytes", (), "Size of the evidence on the disk.")
OTLP_EVENTS = _counter(
    "latentwatch_otlp_events_total",
    ("outcome",),
    "Events of exceedances that were sent over OTLP, or not: the queue was full, or the receiver did not take them.",
)
OTLP_METRICS_FAILURES = _counter(
    "latentwatch_otlp_metrics_failures_total", (), "Times that the OTLP receiver did not take the metrics."
)
SERIES_WITHHELD = _gauge(
    "latentwatch_series_withheld",
    (),
    "Samples of features that this page leaves out, because more models times features stream here than it shows.",
)
WATCHLIST_INFO = _info(
    "latentwatch_watchlist_info", ("name", "sha256", "features"), "The watchlist that this collector explains."
)
BUILD_INFO = _info("latentwatch_build_info", ("version",), "The version of this collector.")
PROCESS_START = _gauge("process_start_time_seconds", (), "Unix time at which the collector's process started.")
PROCESS_MEMORY = _gauge("process_resident_memory_bytes", (), "Resident memory of the collector's process.")
PROCESS_CPU = _counter("process_cpu_seconds_total", (), "User and system time of the collector's process.")

HEALTH_CAUSE = _gauge(
    "latentwatch_health_cause",
    ("cause", "level", "alert"),
    "Whether a cause of the health table is so, 1 or 0: what /healthz?verbose, the live page and the doctor say in "
    "words. The label alert names the rule that fires on it, of this series or of others.",
)

METRICS: Final = tuple(_TABLE)
"""Every metric there is, in the order in which they stand here and on /metrics."""


def sample_names() -> frozenset[str]:
    """Every sample name on /metrics: what rules and dashboards may query."""
    return frozenset(sample for metric in METRICS for sample in metric.samples)
