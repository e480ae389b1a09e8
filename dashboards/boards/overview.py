"""Is anything wrong, and is everything seen?"""

from __future__ import annotations

from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard
from latentwatch.export import metrics

from .parts import (
    AS_LIMIT,
    AS_LINES,
    BESIDE,
    COVERAGE,
    ERROR_BUDGET,
    FEATURE_IN_DEPTH,
    GREEN,
    INSTANCE,
    JOB,
    MODEL_NAME,
    NONE_IS_GOOD,
    ORANGE,
    RED,
    SOME_IS_ODD,
    STACKED,
    TOKENS_PER_SECOND,
    Panel,
    dashboard_of,
    graph,
    query,
    rows_of,
    stat,
    steps,
    table,
)
from .queries import MODEL, RECORDED, increase, named, rate, series

COVERAGE_5M = f"model:latentwatch_coverage:ratio_rate5m{{{RECORDED}}}"
COVERAGE_3D = f"model:latentwatch_coverage:ratio_rate3d{{{RECORDED}}}"


def board() -> Dashboard:
    """What the person on call opens first."""
    rows = {
        "Is anything wrong?": [*_alarms(), *_blindness(), *_exceedances()],
        "Is everything seen?": [*_coverage(), *_tokens()],
        "Does it drift?": [*_drift_evidence(), *_drift_counts(), _drift_traffic()],
        "Traffic": _traffic(),
    }
    words = "Is anything wrong, and is everything seen?"
    return dashboard_of("overview", "Overview", words, [JOB, INSTANCE, MODEL_NAME], rows)


def _exceeded(severity: str) -> str:
    where = f'{MODEL},severity="{severity}"'
    return f"sum({increase(metrics.EXCEEDANCES, where, over='$__range')}) or vector(0)"


def _alarms() -> list[Panel]:
    return [
        stat(
            "Critical exceedances",
            "Requests over a critical limit in the chosen time.",
            _exceeded("critical"),
        )
        .thresholds(NONE_IS_GOOD)
        .decimals(0),
        stat(
            "Warning exceedances",
            "Requests over a warning limit in the chosen time.",
            _exceeded("warning"),
        )
        .thresholds(SOME_IS_ODD)
        .decimals(0),
        stat(
            "Alerts firing",
            "Alerts of latentwatch that fire now, the watchdog left out.",
            'count(ALERTS{alertname=~"Latentwatch.*",alertstate="firing"}) or vector(0)',
        ).thresholds(NONE_IS_GOOD),
    ]


def _blindness() -> list[Panel]:
    seen = stat(
        "Tokens seen",
        "The worst model's share of tokens that were scored in the last 5 minutes. The objective is 99.9 %. An answer "
        "to the left is worth as much as this figure.",
        f"min({COVERAGE_5M})",
    )
    return [
        seen.unit(units.PercentUnit).thresholds(COVERAGE).decimals(2),
        stat(
            "Engines streaming",
            "Engine processes with an open stream to a collector.",
            f"sum({series(metrics.STREAM_CONNECTED)})",
        ),
        stat(
            "Engines not scoring",
            "Engines that run the plugin and score nothing; the alert LatentwatchEngineNotArmed has the reason.",
            f"count({series(metrics.ENGINE_ARMED)} == 0) or vector(0)",
        ).thresholds(NONE_IS_GOOD),
    ]


def _exceedances() -> list[Panel]:
    now = f"sum by (feature) ({increase(metrics.EXCEEDANCES, MODEL)})"
    chosen = f"sum by (feature, severity) ({increase(metrics.EXCEEDANCES, MODEL, over='$__range')})"
    by_feature = graph(
        "Exceedances by feature",
        "Requests that went above a limit, the ten features with most. The dots are exemplars with the request's id.",
        query(f"topk(10, {named(now)})", "{{label}} ({{feature}})").exemplar(True),
    )
    most = table(
        "Features by exceedances",
        "What went above its limit in the chosen time, most first. A feature above its limit is evidence, not proof.",
        rows_of(f"topk(32, {named(chosen)}) > 0"),
        names={
            "feature": "feature",
            "label": "what it is",
            "severity": "severity",
            "Value": "requests",
        },
    )
    return [by_feature.fill_opacity(40), most.span(12).decimals(0).override_by_name("feature", FEATURE_IN_DEPTH)]


def _coverage() -> list[Panel]:
    seen = graph(
        "Tokens seen",
        "Share of each model's tokens whose activations were scored, by this request or by the one whose prefix-cache "
        "entry it reused. Objective: 99.9 %. Tokens that a KV connector leaves unseen are not in it.",
        query(COVERAGE_5M, "{{model_name}}"),
    )
    budget = graph(
        "Error budget left",
        "Of the 0.1 % of tokens that may go unseen, the share that is left, counted over the last 3 days. Below 0 the "
        "objective is missed.",
        query(f"1 - (1 - {COVERAGE_3D}) / {ERROR_BUDGET}", "{{model_name}}"),
    ).thresholds(steps((None, RED), (0, ORANGE), (0.5, GREEN)))
    return [
        panel.unit(units.PercentUnit).max(1).thresholds_style(AS_LINES) for panel in (seen.thresholds(COVERAGE), budget)
    ]


def _tokens() -> list[Panel]:
    nobody = f'{MODEL},state=~"unseen|dropped"'
    panels = (
        graph(
            "Tokens by what became of them",
            "scored: evaluated now. inherited: scored by the request whose cache entry was reused. unseen: never "
            "computed under our eyes. dropped: computed, and the scores lost.",
            query(f"sum by (state) ({rate(metrics.TOKENS, MODEL)})", "{{state}}"),
        ),
        graph(
            "Tokens that nobody watched",
            "Unseen and dropped tokens by reason; the runbook's entry LatentwatchCoverageLow says what to do for each.",
            query(f"sum by (state, reason) ({rate(metrics.TOKENS, nobody)})", "{{state}}: {{reason}}"),
        ),
    )
    return [panel.unit(TOKENS_PER_SECOND).stacking(STACKED).fill_opacity(40) for panel in panels]


def _drift_evidence() -> list[Panel]:
    evidence, limit = series(metrics.DRIFT_LOG10_EVALUE, MODEL), series(metrics.DRIFT_LIMIT, MODEL)
    strongest = table(
        "Drift, the strongest evidence first",
        "Evidence that a feature no longer behaves as in the baseline, as the decimal logarithm of a statistic that "
        "alarms above its limit. Needs a collector with a baseline.",
        rows_of(f"topk(20, max by (model_name, feature, kind) ({evidence}))"),
        names={"model_name": "model", "feature": "feature", "kind": "kind", "Value": "log10 evidence"},
    )
    limits = graph(
        "Evidence and limits",
        "The ten features with most evidence of drift, and the limits of each kind of detector.",
        query(f"topk(10, max by (feature, kind) ({evidence}))", "{{feature}}, {{kind}}"),
        query(f"max by (model_name) ({series(metrics.DRIFT_COMMON_LOG10_EVALUE, MODEL)})", "all features together"),
        query(f"max by (kind) ({limit})", "limit, {{kind}}"),
    )
    return [
        strongest.span(12).decimals(2).override_by_name("feature", FEATURE_IN_DEPTH),
        limits.override_by_regexp("/^limit/", AS_LIMIT),
    ]


def _drift_counts() -> list[Panel]:
    evidence, limit = series(metrics.DRIFT_LOG10_EVALUE, MODEL), series(metrics.DRIFT_LIMIT, MODEL)
    above = f"{evidence} >= on (job, instance, model_name, kind) group_left () {limit}"
    return [
        stat(
            "Features drifting",
            "Features of which a detector is above its limit.",
            f"count(max by (model_name, feature) ({above})) or vector(0)",
        ).thresholds(NONE_IS_GOOD),
        stat(
            "All features together",
            "Active requests / expected ones that all features have in common, of the model where most are.",
            f"max({series(metrics.DRIFT_COMMON_RATIO, MODEL)}) or vector(1)",
        ).decimals(2),
        stat(
            "Without a baseline",
            "Models whose collector has no baseline for them.",
            f"count({series(metrics.DRIFT_ARMED, MODEL)} == 0) or vector(0)",
        ).thresholds(SOME_IS_ODD),
        stat(
            "Age of the oldest baseline",
            "Since it was calibrated; after a month it says little about traffic of today.",
            f"time() - min({series(metrics.DRIFT_BASELINE_CREATED, MODEL)})",
        ).unit(units.Seconds),
    ]


def _drift_traffic() -> Panel:
    counted = {
        "windows": metrics.DRIFT_WINDOWS,
        "left out": metrics.DRIFT_EXCLUDED_WINDOWS,
        "requests": metrics.DRIFT_REQUESTS,
        "counted without a name": metrics.DRIFT_UNNAMED_REQUESTS,
    }
    panel = graph(
        "What the detectors took",
        "Windows with requests, and those of them left out of a later baseline because something alarmed.",
        *(
            query(f"sum by (model_name) ({rate(metric, MODEL)})", f"{{{{model_name}}}}, {words}")
            for words, metric in counted.items()
        ),
    )
    return panel.unit(units.OpsPerSecond).span(8).height(4).legend(BESIDE)


def _traffic() -> list[Panel]:
    fired = f"max by (feature) (feature:latentwatch_feature_fired:ratio_rate5m{{{RECORDED}}})"
    ended = graph(
        "Requests ended",
        "finished, aborted by the client, or lost with their engine.",
        query(f"sum by (outcome) ({rate(metrics.REQUESTS, MODEL)})", "{{outcome}}"),
    )
    running = graph(
        "Requests running",
        "Requests that began and have not ended.",
        query(f"sum by (model_name) ({series(metrics.OPEN_REQUESTS, MODEL)})", "{{model_name}}"),
    )
    firing = graph(
        "Firing rate, the ten highest",
        "Share of scored tokens on which a sparse feature fired. A feature that fires on a large share of tokens is "
        "costly to ship and says little.",
        query(f"topk(10, {named(fired)})", "{{label}} ({{feature}})"),
    )
    return [ended.unit(units.RequestsPerSecond).span(8), running.span(8), firing.unit(units.PercentUnit).span(8)]
