"""Collectors, the streams to them, and the engines behind: what every other figure rests on."""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard
from latentwatch.export import metrics

from .parts import (
    COLUMNS,
    GREEN,
    IN_SECONDS,
    INSTANCE,
    JOB,
    NONE_IS_GOOD,
    ORANGE,
    RED,
    SOME_IS_ODD,
    TOKENS_PER_SECOND,
    Panel,
    dashboard_of,
    graph,
    quantiles,
    query,
    rows_of,
    stat,
    steps,
    table,
)
from .queries import HERE, rate, series, unnamed

ENGINE_COUNTERS: Final = {
    "steps": ("Steps", "Steps that the engines ran."),
    "ring_dropped_steps": ("Steps dropped at the ring", "The exporter did not keep up: give the pod more CPU."),
    "op_silent_steps": ("Silent steps", "Steps whose graph had no score op. Anything above 0 needs a restart."),
    "shed_batches": ("Batches shed", "The sender gave up scores because the collector was away or slow."),
    "shed_critical_tokens": ("Critical tokens shed", "Above a critical limit, and their scores are gone."),
    "shed_warning_tokens": ("Warning tokens shed", "Above a limit, none of them a critical one's."),
    "lost_tokens": ("Tokens given up", "With their books: beyond every bound, or refused."),
    "spool_failures": ("Spool failures", "The disk is full or gone; scores wait in memory."),
    "spool_refused": ("Spool refusals", "Foreign or damaged files, and boots that no collector takes."),
    "reconnects": ("Reconnects", "Streams that senders opened again."),
    "exporter_restarts": ("Exporter restarts", "Starts of exporter processes after the first."),
    "recomputed_tokens": ("Tokens recomputed", "After a preemption; their first scores stand."),
    "surplus_tokens": ("Surplus rows", "Rows computed past the end of a request; tokens of none."),
    "unattributed_rows": ("Unattributed rows", "Rows of requests that the exporter did not know."),
    "unannounced_requests": ("Unannounced requests", "Begun and ended while the exporter read nothing."),
    "untraced_requests": ("Untraced requests", "Served without the trace context of their client."),
}
"""Title and words, by the key in the metrics table; in the order of the panels."""


def board() -> Dashboard:
    """Whether the monitor itself works."""
    rows = {
        "Collectors": [*_scrapes(), *_watchlists(), *_state(), _processes(), _withheld(), _causes(), _versions()],
        "Ingest": [_lag(), *_messages(), _evictions(), *_resources(), *_journal()],
        "Stages": _stages(),
        "Forwarding": [_sidecars(), *_reports(), *_rows_waiting()],
        "Evidence": [*_records(), *_sent_and_stored()],
        "Engines": [_engines(), *_engine_counters(), _spooled()],
    }
    words = "Collectors, the streams to them, and the engines behind: what every other figure rests on."
    return dashboard_of("health", "Collector and engine health", words, [JOB, INSTANCE], rows)


# -- collectors


def _scrapes() -> list[Panel]:
    return [
        stat("Collectors up", "Scrape targets of the chosen job that answer.", f"sum(up{{{HERE}}})").span(3),
        stat(
            "Collectors down",
            "Scrape targets of the chosen job that do not answer.",
            f"count(up{{{HERE}}} == 0) or vector(0)",
        )
        .span(3)
        .thresholds(NONE_IS_GOOD),
    ]


def _watchlists() -> list[Panel]:
    in_use = stat(
        "Watchlists in use",
        "Distinct watchlist files over the chosen collectors. More than one is a rollout, or a mistake.",
        f"count(group by (sha256) ({series(metrics.WATCHLIST_INFO)}))",
    )
    watched = stat(
        "Features watched",
        "On the largest watchlist in use.",
        f"max(count by (instance) ({series(metrics.FEATURE_INFO)}))",
    )
    return [in_use.span(3).thresholds(steps((None, GREEN), (2, ORANGE))), watched.span(3)]


def _state() -> list[Panel]:
    safe = stat(
        "State is safe",
        "Collectors whose acknowledgements survive their death: started with --state, on a disk that works.",
        f"sum({series(metrics.STATE_DURABLE)})",
    )
    oldest = stat(
        "Oldest checkpoint",
        "Age of the oldest newest checkpoint; a collector without --state has none.",
        f"time() - min({series(metrics.STATE_CHECKPOINT)} > 0)",
    )
    return [safe.span(3), oldest.span(3).unit(units.Seconds).thresholds(steps((None, GREEN), (600, RED)))]


def _processes() -> Panel:
    newest = f"max({series(metrics.PROCESS_START)}) * 1000"
    return stat("Up since", "Start of the collector that started last.", newest).span(3).unit(units.DateTimeFromNow)


def _withheld() -> Panel:
    panel = stat(
        "Samples withheld",
        "Samples of features that collectors left out of their page, because it would have grown beyond its bound.",
        f"sum({series(metrics.SERIES_WITHHELD)})",
    )
    return panel.span(3).thresholds(SOME_IS_ODD)


def _causes() -> Panel:
    return table(
        "What is wrong with the monitor",
        "Causes of the collectors' health table that are so now; the page and latentwatch doctor say them in words.",
        rows_of(f"{series(metrics.HEALTH_CAUSE)} == 1"),
        names={"instance": "collector", "cause": "cause", "level": "level", "alert": "alert"},
        hide=("job", "Value"),
    ).height(6)


def _versions() -> Panel:
    return table(
        "Versions and watchlists",
        "What runs where.",
        rows_of(unnamed(series(metrics.BUILD_INFO))),
        rows_of(unnamed(series(metrics.WATCHLIST_INFO))),
        names={
            "instance": "collector",
            "version": "version",
            "name": "watchlist",
            "sha256": "sha256",
            "features": "features",
        },
        hide=("job", "Value #A", "Value #B"),
    ).height(6)


# -- ingest


def _lag() -> Panel:
    return (
        graph(
            "Lag",
            "From the engine's hand-over of a step to its merge at the collector, by the clocks of both hosts.",
            *quantiles(f"sum by (le) ({rate(metrics.INGEST_LAG)})"),
        )
        .span(8)
        .unit(units.Seconds)
    )


def _messages() -> list[Panel]:
    refused = rate(metrics.STREAMS_REFUSED)
    panels = (
        graph(
            "Messages",
            "Batches received; duplicates were sent again after a reconnect and ignored; lost ones never came.",
            query(f"sum({rate(metrics.MESSAGES)})", "received"),
            query(f"sum({rate(metrics.DUPLICATES)})", "duplicates"),
            query(f"sum({rate(metrics.LOST_SEQUENCES)})", "lost"),
        ),
        graph(
            "Streams refused",
            "By reason; the runbook's entry LatentwatchStreamRefused says what to do for each.",
            query(f"sum by (reason) ({refused}) > 0 or sum({refused})", "{{reason}}"),
        ),
    )
    return [panel.span(8).unit(units.OpsPerSecond) for panel in panels]


def _evictions() -> Panel:
    panel = graph(
        "What the collector could not hold",
        "Requests without statistics are a hole (LatentwatchRequestsUntracked); the lists only show less history. "
        "Excess tokens are a bug.",
        query(f"sum({rate(metrics.REQUESTS_EVICTED)})", "requests without statistics"),
        query(f"sum({rate(metrics.SUMMARIES_EVICTED)})", "request summaries"),
        query(f"sum({rate(metrics.EVENTS_EVICTED)})", "exceedance events"),
        query(f"sum({rate(metrics.ACCOUNTING_EXCESS)})", "excess tokens"),
    )
    return panel.span(8).unit(units.OpsPerSecond)


def _resources() -> list[Panel]:
    cpu = graph(
        "CPU",
        "Cores in use; a collector has one core's worth of work at most.",
        query(rate(metrics.PROCESS_CPU), "{{instance}}"),
    )
    memory = graph(
        "Memory",
        "Resident. Bounded by the watchlist and the collector's bounds, whatever the traffic.",
        query(series(metrics.PROCESS_MEMORY), "{{instance}}"),
    )
    return [cpu.span(8).unit(units.PercentUnit), memory.span(8).unit(units.BytesIEC)]


def _journal() -> list[Panel]:
    size = graph(
        "Journal",
        "Events written since the newest checkpoint; it shrinks at each checkpoint.",
        query(series(metrics.STATE_JOURNAL), "{{instance}}"),
    )
    failed = graph(
        "State writes that failed",
        "The collector goes on in memory and tries again; until then its death would lose what it acknowledged.",
        query(rate(metrics.STATE_WRITE_FAILURES), "{{instance}}"),
    )
    resumed = graph(
        "Events resumed at the start",
        "Read back from the journal of the process before.",
        query(series(metrics.STATE_RESUMED), "{{instance}}"),
    )
    return [size.span(8).unit(units.BytesIEC), failed.span(8).unit(units.OpsPerSecond), resumed.span(8)]


def _stages() -> list[Panel]:
    to_merge = series(metrics.STAGE_DEPTH, f'{HERE}, stage="merge_queue_messages"')
    full = graph(
        "How full each stage is",
        "Share of its bound. At 100 % a stage refuses or gives up the oldest, which the counters of losses show.",
        query(
            f"max by (stage) ({series(metrics.STAGE_DEPTH)} / {series(metrics.STAGE_CAPACITY)})",
            "{{stage}}",
        ),
    )
    waiting = graph(
        "Waiting to be merged",
        "Messages, at most one a stream: streams take turns by the bytes that they send.",
        query(f"sum by (instance) ({to_merge})", "{{instance}}"),
    )
    longest = graph(
        "Longest wait for a turn",
        "Of the message that waits longest. Seconds mean too many engines, or no core of its own.",
        query(f"max by (instance) ({series(metrics.MERGE_QUEUE_OLDEST)})", "{{instance}}"),
    )
    return [full.span(8).unit(units.PercentUnit), waiting.span(8), longest.span(8).unit(units.Seconds)]


# -- forwarding


def _sidecars() -> Panel:
    panel = table(
        "Sidecars",
        "Each collector that forwards to one of these, and how long ago it reported.",
        rows_of(unnamed(series(metrics.FORWARDER_CONNECTED))),
        rows_of(f"time() - {series(metrics.FORWARDER_LAST_SEEN)}"),
        names={"collector": "sidecar", "instance": "gateway", "Value #A": "stream open", "Value #B": "silent for"},
        hide=("job",),
    )
    return panel.height(6).override_by_name("silent for", IN_SECONDS)


def _reports() -> list[Panel]:
    since_cut = series(metrics.FORWARD_OLDEST)
    sent = graph(
        "Reports to the gateway",
        "One a second and sidecar; more after an outage. Resent ones were on their way when a stream ended.",
        query(f"sum({rate(metrics.FORWARD_REPORTS)})", "cut"),
        query(f"sum({rate(metrics.FORWARD_RESENT)})", "resent"),
        query(f"sum({rate(metrics.FORWARD_RECONNECTS)})", "reconnects"),
        query(f"sum({series(metrics.FORWARD_CONNECTED)})", "sidecars connected"),
    )
    oldest = graph(
        "Oldest report without an answer",
        "The gateway is away or slow while this grows; counts wait for it and none is lost.",
        query(f"max by (instance) ((time() - {since_cut}) * ({since_cut} > bool 0))", "{{instance}}"),
        query(f"max({series(metrics.FORWARD_WAITING)})", "reports that wait, at most 8"),
    )
    return [sent.span(8), oldest.span(8).unit(units.Seconds)]


def _rows_waiting() -> list[Panel]:
    waiting = graph(
        "Rows of requests that wait",
        "In memory. At the bound the oldest are shed, those without an exceedance first.",
        query(f"max by (instance) ({series(metrics.FORWARD_ROWS)})", "{{instance}}"),
        query(f"max({series(metrics.FORWARD_CAPACITY)})", "bound"),
    )
    shed = graph(
        "Rows and exceedances shed",
        "Requests that the gateway cannot look up: as sidecars count it, and as they told their gateway.",
        query(f"sum by (kind) ({rate(metrics.FORWARD_SHED)})", "{{kind}}, shed here"),
        query(f"sum by (collector, kind) ({rate(metrics.FORWARDER_SHED)})", "{{collector}}, {{kind}}"),
    )
    return [waiting.span(8).unit(units.BytesIEC), shed.span(COLUMNS).unit(units.OpsPerSecond)]


# -- evidence


def _records() -> list[Panel]:
    panels = (
        graph(
            "Records written",
            "Exceedances, request summaries and activations that went into the evidence folder.",
            query(f"sum by (kind) ({rate(metrics.EVIDENCE_WRITTEN)})", "{{kind}}"),
        ),
        graph(
            "Records lost",
            "Evidence that was not written: the queue was full, or the disk failed. Metrics and pages do not need it.",
            query(f"sum by (kind, reason) ({rate(metrics.EVIDENCE_DROPPED)})", "{{kind}}: {{reason}}"),
        ),
    )
    return [panel.span(12).unit(units.OpsPerSecond) for panel in panels]


def _sent_and_stored() -> list[Panel]:
    sent = graph(
        "Sent over OTLP",
        "Events of exceedances by what became of them, and pushes of metrics that the receiver did not take.",
        query(f"sum by (outcome) ({rate(metrics.OTLP_EVENTS)})", "{{outcome}}"),
        query(f"sum({rate(metrics.OTLP_METRICS_FAILURES)})", "metrics not taken"),
    )
    stored = graph(
        "Evidence on disk",
        "Size of the folder, bounded by the retention, and what waits to be written.",
        query(f"sum by (instance) ({series(metrics.EVIDENCE_FOLDER)})", "{{instance}}, folder"),
        query(f"sum by (instance) ({series(metrics.EVIDENCE_QUEUE)})", "{{instance}}, queue"),
    )
    damaged = graph(
        "Files set aside",
        "Files of evidence or state that could not be read. The rest serves on; the log names each, and "
        "latentwatch evidence repair saves what can be read of evidence.",
        query(f"sum by (instance) ({series(metrics.EVIDENCE_DAMAGED)})", "{{instance}}, evidence"),
        query(f"sum by (instance) ({series(metrics.STATE_ASIDE)})", "{{instance}}, state"),
    )
    return [
        sent.span(8).unit(units.OpsPerSecond),
        stored.span(8).unit(units.BytesIEC),
        damaged.span(8).unit(units.Short),
    ]


# -- engines


def _engines() -> Panel:
    return table(
        "Engines",
        "Each engine process: does it score, the watchlist's own model, and how long ago did it say something.",
        rows_of(unnamed(series(metrics.ENGINE_ARMED))),
        rows_of(f"time() - {series(metrics.REPLICA_LAST_SEEN)}"),
        rows_of(unnamed(series(metrics.STREAM_CONNECTED))),
        rows_of(unnamed(series(metrics.ENGINE_MODEL))),
        names={
            "replica": "engine",
            "instance": "collector",
            "match": "model",
            "Value #A": "scores",
            "reason": "why not",
            "Value #B": "silent for",
            "Value #C": "stream open",
        },
        hide=("job", "Value #D"),
    ).override_by_name("silent for", IN_SECONDS)


def _engine_counters() -> list[Panel]:
    panels: list[Panel] = []
    for name, (title, words) in ENGINE_COUNTERS.items():
        by_engine = query(f"sum by (replica) ({rate(metrics.ENGINE_COUNTERS[name])})", "{{replica}}")
        unit = TOKENS_PER_SECOND if name.endswith(("_tokens", "_rows")) else units.OpsPerSecond
        panels.append(graph(title, words, by_engine).unit(unit).span(8).height(6))
    return panels


def _spooled() -> Panel:
    by_engine = query(f"sum by (replica) ({series(metrics.ENGINE_COUNTERS['spool_bytes'])})", "{{replica}}")
    panel = graph("Spooled", "What engines keep on their disks until a collector holds it.", by_engine)
    return panel.unit(units.BytesIEC).span(8).height(6)
