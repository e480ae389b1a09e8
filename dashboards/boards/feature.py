"""One feature of the watchlist in depth."""

from __future__ import annotations

from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import BigValueTextMode
from grafana_foundation_sdk.models.dashboard import Dashboard, ValueMap, ValueMappingResult
from latentwatch.export import metrics

from .parts import (
    AS_LIMIT,
    INSTANCE,
    JOB,
    MODEL_NAME,
    NONE_IS_GOOD,
    TOKENS_PER_SECOND,
    Panel,
    choice,
    dashboard_of,
    exceedances_graph,
    graph,
    heatmap,
    quantiles,
    query,
    stat,
)
from .queries import HERE, MODEL, RECORDED, increase, rate, series

CHOSEN = 'feature="$feature"'
ONE = f"{MODEL},{CHOSEN}"
FEATURE = choice("feature", series(metrics.FEATURE_INFO))
LIMIT = f"max({series(metrics.FEATURE_LIMIT, f'{HERE},{CHOSEN}')})"
FIRED_5M = f"feature:latentwatch_feature_fired:ratio_rate5m{{{RECORDED},{CHOSEN}}}"
FIRED_1H = f"feature:latentwatch_feature_fired:ratio_rate1h{{{RECORDED},{CHOSEN}}}"


def board() -> Dashboard:
    """What a row of the overview's tables opens."""
    rows = {
        "The feature": [*_identity(), *_figures()],
        "Requests": [*_exceedances(), *_every_request()],
        "Tokens": _tokens(),
        "Drift": [*_drift(), _drifts_since()],
    }
    words = "One feature of the watchlist in depth."
    return dashboard_of("feature", "Feature", words, [JOB, INSTANCE, MODEL_NAME, FEATURE], rows)


def _identity() -> list[Panel]:
    info = series(metrics.FEATURE_INFO, f"{HERE},{CHOSEN}")
    label = stat(
        "What it is",
        "The feature's label on the watchlist. A label is what somebody made of it, not what it is.",
        f"group by (label) ({info})",
        "{{label}}",
    )
    severity = stat(
        "Severity",
        "critical pages, warning opens a ticket, info and none do neither.",
        f"group by (severity, hook_point) ({info})",
        "{{severity}}, {{hook_point}}",
    )
    return [label.span(10).text_mode(BigValueTextMode.NAME), severity.span(5).text_mode(BigValueTextMode.NAME)]


def _figures() -> list[Panel]:
    exceeded = stat(
        "Exceedances",
        "Requests above the limit in the chosen time.",
        f"sum({increase(metrics.EXCEEDANCES, ONE, over='$__range')})",
    )
    fires = stat(
        "Fires on",
        "Share of scored tokens in the last 5 minutes. A dense feature (a probe) scores every token and has none.",
        f"max({FIRED_5M})",
    )
    return [
        stat("Limit", "A request above it is an exceedance; in the feature's own units.", LIMIT).span(3),
        exceeded.span(3).thresholds(NONE_IS_GOOD).decimals(0),
        fires.span(3).unit(units.PercentUnit),
    ]


def _exceedances() -> list[Panel]:
    buckets = f"sum by (le) ({rate(metrics.FEATURE_REQUEST_MAX, ONE)})"
    return [
        exceedances_graph(ONE, "model_name, severity", "{{model_name}} ({{severity}})"),
        graph(
            "Where the requests are",
            "Quantiles of the statistic that the limit is on, one value a request, beside the limit.",
            *quantiles(buckets),
            query(LIMIT, "limit"),
        ).override_by_name("limit", AS_LIMIT),
    ]


def _every_request() -> list[Panel]:
    over = f"sum by (model_name) ({rate(metrics.EXCEEDANCES, ONE)})"
    ended = f"sum by (model_name) ({rate(metrics.REQUESTS, MODEL)})"
    return [
        heatmap(
            "Every request",
            "How many requests ended with which value of the statistic. Two clouds, one above the limit, are what a "
            "good feature shows in an incident.",
            f"sum by (le) ({increase(metrics.FEATURE_REQUEST_MAX, ONE)})",
        ),
        graph(
            "Share of requests over the limit",
            "Exceedances among the requests that ended.",
            query(f"{over} / ({ended} > 0)", "{{model_name}}"),
        )
        .unit(units.PercentUnit)
        .min(0)
        .axis_soft_max(0.01),
    ]


def _tokens() -> list[Panel]:
    firing = graph(
        "Firing rate",
        "Share of scored tokens on which it fired, over 5 minutes and over an hour. A level that stays up after a "
        "deploy speaks for the model, a spike for its users.",
        query(FIRED_5M, "{{model_name}}, 5 minutes"),
        query(FIRED_1H, "{{model_name}}, 1 hour"),
    )
    requests = graph(
        "Requests in which it fired",
        "At least once, of the requests that ended.",
        query(f"sum by (model_name) ({rate(metrics.FEATURE_REQUESTS, ONE)})", "{{model_name}}"),
    )
    by_collector = graph(
        "Fires by collector",
        "One collector far from the others is one engine far from the others: other traffic, or a broken replica.",
        query(f"sum by (instance) ({rate(metrics.FEATURE_FIRED_TOKENS, ONE)})", "{{instance}}"),
    )
    return [
        firing.span(8).unit(units.PercentUnit),
        requests.span(8).unit(units.RequestsPerSecond),
        by_collector.span(8).unit(TOKENS_PER_SECOND),
    ]


def _drift() -> list[Panel]:
    return [
        graph(
            "Evidence of drift",
            "By kind of detector: rate (in how many requests it is active), shape (with which values), replica (one "
            "engine against the others), coactivation (with another feature), canary (prompts that never change).",
            query(f"max by (kind) ({series(metrics.DRIFT_LOG10_EVALUE, ONE)})", "{{kind}}"),
            query(f"max by (kind) ({series(metrics.DRIFT_LIMIT, MODEL)})", "limit, {{kind}}"),
        ).override_by_regexp("/^limit/", AS_LIMIT),
        graph(
            "Requests against the baseline",
            "Requests in which it is active, divided by those that the baseline expects.",
            query(f"max by (model_name) ({series(metrics.DRIFT_RATE_RATIO, ONE)})", "{{model_name}}"),
        ),
    ]


def _drifts_since() -> Panel:
    panel = stat(
        "Drifts since",
        "When the oldest change began, by the detector's own estimate; nothing where no detector alarms.",
        f"(min({series(metrics.DRIFT_SINCE, ONE)} > 0) * 1000) or vector(0)",
    )
    unknown = ValueMappingResult(text="no drift with a known beginning")
    return panel.unit(units.DateTimeFromNow).span(6).mappings([ValueMap({"0": unknown})])
