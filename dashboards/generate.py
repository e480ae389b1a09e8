#!/usr/bin/env python3
"""Writes dashboards/grafana/*.json: `python dashboards/generate.py`. `--check` only compares.

Standard library only. The JSON is committed and never edited by hand. Each dashboard is a list of rows, each row a list
of panels from left to right; places, ids and reference letters are given here, so that none can overlap or repeat.

Selectors: HERE keeps a metric to the chosen collectors, MODEL to the chosen models as well. Recorded series have lost
job and instance, so they are chosen by model alone.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "grafana"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
HERE = 'job=~"$job",instance=~"$instance"'
MODEL = f'{HERE},model_name=~"$model_name"'
RECORDED = 'model_name=~"$model_name"'
COLUMNS = 24

# Okabe and Ito's palette: told apart by people who do not see red and green alike.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"

Panel = dict[str, Any]


# -- parts


def target(expr: str, legend: str = "", *, format: str = "time_series", exemplars: bool = False) -> Panel:
    """One query. Tables and stats are asked at one moment only."""
    return {
        "datasource": SOURCE,
        "expr": " ".join(expr.split()),
        "legendFormat": legend or "__auto",
        "format": format,
        "exemplar": exemplars,
        "instant": format == "table",
        "range": format != "table",
    }


def steps(*values: tuple[float | None, str]) -> Panel:
    """Thresholds: (from value, colour), the first one from None."""
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in values]}


PLAIN = steps((None, BLUE))
NONE_IS_GOOD = steps((None, GREEN), (1, RED))
SOME_IS_ODD = steps((None, GREEN), (1, ORANGE))
COVERAGE = steps((None, RED), (0.9856, ORANGE), (0.999, GREEN))


def panel(
    kind: str, title: str, description: str, targets: list[Panel], *, unit: str, width: int, **more: Any
) -> Panel:
    options, custom, thresholds = more.pop("options", {}), more.pop("custom", {}), more.pop("thresholds", PLAIN)
    overrides, links, height = more.pop("overrides", []), more.pop("links", []), more.pop("height", 8)
    limits = {name: more.pop(name) for name in ("min", "max", "decimals", "mappings") if name in more}
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "targets": [{"refId": letter} | asked for letter, asked in zip(string.ascii_uppercase, targets, strict=False)],
        "options": options,
        "fieldConfig": {
            "defaults": {"unit": unit, "custom": custom, "thresholds": thresholds, "noValue": "no data", "links": links}
            | limits,
            "overrides": overrides,
        },
        "gridPos": {"w": width, "h": height},
        **more,
    }


def stat(title: str, description: str, expr: str, *, unit: str = "short", width: int = 4, **more: Any) -> Panel:
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": more.pop("fields", ""), "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": more.pop("text", "auto"),
    }
    asked = [target(expr, more.pop("legend", ""))]
    return panel("stat", title, description, asked, unit=unit, width=width, height=4, options=options, **more)


def graph(title: str, description: str, *targets: Panel, unit: str = "short", width: int = 12, **more: Any) -> Panel:
    custom = {
        "lineWidth": 1,
        "fillOpacity": more.pop("fill", 8),
        "showPoints": "never",
        "stacking": {"mode": more.pop("stacking", "none"), "group": "A"},
        "thresholdsStyle": {"mode": more.pop("threshold_style", "off")},
    }
    options = {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel(
        "timeseries", title, description, list(targets), unit=unit, width=width, custom=custom, options=options, **more
    )


def heatmap(title: str, description: str, expr: str, *, width: int = 12, **more: Any) -> Panel:
    """Of a classic histogram. Unit "short": the values are scores in units of their own."""
    options = {
        "calculate": False,
        "yAxis": {"unit": "short"},
        "color": {"mode": "scheme", "scheme": "Cividis", "steps": 64},
        "cellGap": 1,
    }
    asked = [target(expr, "{{le}}", format="heatmap")]
    return panel("heatmap", title, description, asked, unit="short", width=width, options=options, **more)


def table(
    title: str, description: str, *targets: Panel, names: dict[str, str], hide: tuple[str, ...] = (), **more: Any
) -> Panel:
    """Queries joined by their labels; `names` renames columns, in order."""
    transformations = [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {
                "renameByName": names,
                "indexByName": {name: index for index, name in enumerate(names)},
                "excludeByName": dict.fromkeys(("Time", "__name__", *hide), True),
            },
        },
    ]
    return panel(
        "table",
        title,
        description,
        list(targets),
        unit=more.pop("unit", "short"),
        width=more.pop("width", COLUMNS),
        transformations=transformations,
        options={"showHeader": True, "cellHeight": "sm"},
        custom={"align": "auto", "filterable": True},
        **more,
    )


def markdown(title: str, description: str, content: str, *, width: int = COLUMNS, height: int = 5) -> Panel:
    options = {"mode": "markdown", "content": content}
    return panel("text", title, description, [], unit="short", width=width, height=height, options=options)


def unit_of(column: str, unit: str) -> Panel:
    return {"matcher": {"id": "byName", "options": column}, "properties": [{"id": "unit", "value": unit}]}


def link_of(column: str, title: str, url: str) -> Panel:
    links = [{"title": title, "url": url, "targetBlank": True}]
    return {"matcher": {"id": "byName", "options": column}, "properties": [{"id": "links", "value": links}]}


def named(expr: str) -> str:
    """`expr` by feature, with the words for people from latentwatch_feature_info."""
    return f"({expr}) * on (feature) group_left (label) group by (feature, label) (latentwatch_feature_info{{{HERE}}})"


# -- dashboards


def choice(name: str, metric: str, *, all: bool = True, label: str = "") -> Panel:
    """A template variable: the values of a label of a metric."""
    asked = f"label_values({metric}, {name})"
    return {
        "name": name,
        "label": label or name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": asked, "refId": "A"},
        "definition": asked,
        "refresh": 2,
        "sort": 1,
        "multi": all,
        "includeAll": all,
    } | ({"allValue": ".*", "current": {"text": "All", "value": "$__all"}} if all else {})


DATASOURCE = {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus", "refresh": 1}
JOB = choice("job", "latentwatch_build_info")
INSTANCE = choice("instance", 'latentwatch_build_info{job=~"$job"}', label="collector")
MODEL_NAME = choice("model_name", f"latentwatch_tokens_total{{{HERE}}}", label="model")
FEATURE = choice("feature", f"latentwatch_feature_info{{{HERE}}}", all=False)
REQUEST_ID = {"name": "request_id", "label": "request id", "type": "textbox", "query": "", "current": {"value": ""}}


def annotation(name: str, expr: str, color: str, title: str, *, shown: bool = True) -> Panel:
    return {
        "name": name,
        "datasource": SOURCE,
        "enable": shown,
        "iconColor": color,
        "expr": " ".join(expr.split()),
        "titleFormat": title,
        "step": "60s",
    }


def appeared(metric: str, labels: str) -> str:
    """Series that were not there five minutes before, by the labels that say what was deployed."""
    now, before = (f"count by ({labels}) ({metric}{{{HERE}}}{offset})" for offset in ("", " offset 5m"))
    return f"{now} unless {before}"


ANNOTATIONS = [
    annotation("Alerts", 'ALERTS{alertname=~"Latentwatch.*",alertstate="firing"}', RED, "{{alertname}} ({{severity}})"),
    annotation("Collector version", appeared("latentwatch_build_info", "version"), BLUE, "latentwatch {{version}}"),
    annotation("Watchlist", appeared("latentwatch_watchlist_info", "name, sha256"), ORANGE, "{{name}} {{sha256}}"),
]


def dashboard(
    uid: str, title: str, description: str, variables: list[Panel], rows: list[tuple[str, list[Panel]]]
) -> Panel:
    panels: list[Panel] = []
    y = 0
    for name, members in rows:
        panels.append(
            {"type": "row", "title": name, "collapsed": False, "panels": [], "gridPos": _at(0, y, COLUMNS, 1)}
        )
        y += 1
        x = height = 0
        for member in members:
            width = member["gridPos"]["w"]
            if x + width > COLUMNS:
                y, x, height = y + height, 0, 0
            panels.append(member | {"gridPos": _at(x, y, width, member["gridPos"]["h"])})
            x, height = x + width, max(height, member["gridPos"]["h"])
        y += height
    links = {"type": "dashboards", "tags": ["latentwatch"], "title": "latentwatch", "asDropdown": True}
    return {
        "uid": f"latentwatch-{uid}",
        "title": f"latentwatch / {title}",
        "description": description,
        "tags": ["latentwatch"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "timezone": "browser",
        "time": {"from": "now-3h", "to": "now"},
        "links": [links | {"includeVars": True, "keepTime": True, "targetBlank": False, "icon": "external link"}],
        "annotations": {"list": ANNOTATIONS},
        "templating": {"list": [DATASOURCE, *variables]},
        "panels": [{"id": number} | made for number, made in enumerate(panels, start=1)],
    }


def _at(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def exceedances_graph(selector: str, by: str, legend: str, width: int = 12) -> Panel:
    return graph(
        "Exceedances",
        "Requests that went above a limit, each counted once per feature. The dots are exemplars: each carries the "
        "request's id, and the client's trace id where it sent one.",
        target(
            f"sum by ({by}) (increase(latentwatch_exceedances_total{{{selector}}}[$__rate_interval]))",
            legend,
            exemplars=True,
        ),
        width=width,
        fill=40,
    )


def overview() -> Panel:
    fired = "feature:latentwatch_feature_fired:ratio_rate5m"
    now = f"sum by (feature) (increase(latentwatch_exceedances_total{{{MODEL}}}[$__rate_interval]))"
    exceeded = f"sum by (feature, severity) (increase(latentwatch_exceedances_total{{{MODEL}}}[$__range]))"
    wrong = [
        stat(
            "Critical exceedances",
            "Requests over a critical limit in the chosen time.",
            f'sum(increase(latentwatch_exceedances_total{{{MODEL},severity="critical"}}[$__range])) or vector(0)',
            thresholds=NONE_IS_GOOD,
        ),
        stat(
            "Warning exceedances",
            "Requests over a warning limit in the chosen time.",
            f'sum(increase(latentwatch_exceedances_total{{{MODEL},severity="warning"}}[$__range])) or vector(0)',
            thresholds=SOME_IS_ODD,
        ),
        stat(
            "Alerts firing",
            "Alerts of latentwatch that fire now, the watchdog left out.",
            'count(ALERTS{alertname=~"Latentwatch.*",alertstate="firing"}) or vector(0)',
            thresholds=NONE_IS_GOOD,
        ),
        stat(
            "Tokens seen",
            "The worst model's share of tokens that were scored in the last 5 minutes. The objective is 99.9 %. An "
            "answer to the left is worth as much as this figure.",
            f"min(model:latentwatch_coverage:ratio_rate5m{{{RECORDED}}})",
            unit="percentunit",
            thresholds=COVERAGE,
            decimals=2,
        ),
        stat(
            "Engines streaming",
            "Engine processes with an open stream to a collector.",
            f"sum(latentwatch_stream_connected{{{HERE}}})",
        ),
        stat(
            "Engines not scoring",
            "Engines that run the plugin and score nothing; the alert LatentwatchEngineNotArmed has the reason.",
            f"count(latentwatch_engine_armed{{{HERE}}} == 0) or vector(0)",
            thresholds=NONE_IS_GOOD,
        ),
        graph(
            "Exceedances by feature",
            "Requests that went above a limit, the ten features with most. The dots are exemplars with the request's "
            "id.",
            target(
                f"topk(10, {named(now)})",
                "{{label}} ({{feature}})",
                exemplars=True,
            ),
            fill=40,
        ),
        table(
            "Features by exceedances",
            "What went above its limit in the chosen time, most first. A feature above its limit is evidence, not "
            "proof.",
            target(f"topk(32, {named(exceeded)})", format="table"),
            names={
                "feature": "feature",
                "label": "what it is",
                "severity": "severity",
                "Value": "requests over the limit",
            },
            width=12,
            decimals=0,
            overrides=[
                link_of(
                    "feature",
                    "This feature in depth",
                    "/d/latentwatch-feature?var-feature=${__value.text}&${__url_time_range}",
                )
            ],
        ),
    ]
    seen = [
        graph(
            "Tokens seen",
            "Share of each model's tokens whose activations were scored, by this request or by the one whose prefix-"
            "cache entry it reused. Objective: 99.9 %.",
            target(f"model:latentwatch_coverage:ratio_rate5m{{{RECORDED}}}", "{{model_name}}"),
            unit="percentunit",
            max=1,
            thresholds=COVERAGE,
            threshold_style="line",
        ),
        graph(
            "Error budget left",
            "Of the 0.1 % of tokens that may go unseen, the share that is left, counted over the last 3 days. Below 0 "
            "the objective is missed.",
            target(f"1 - (1 - model:latentwatch_coverage:ratio_rate3d{{{RECORDED}}}) / 0.001", "{{model_name}}"),
            unit="percentunit",
            max=1,
            thresholds=steps((None, RED), (0, ORANGE), (0.5, GREEN)),
            threshold_style="line",
        ),
        graph(
            "Tokens by what became of them",
            "scored: evaluated now. inherited: scored by the request whose cache entry was reused. unseen: never "
            "computed under our eyes. dropped: computed, and the scores lost.",
            target(f"sum by (state) (rate(latentwatch_tokens_total{{{MODEL}}}[$__rate_interval]))", "{{state}}"),
            unit="tokens/s",
            stacking="normal",
            fill=40,
        ),
        graph(
            "Tokens that nobody watched",
            "Unseen and dropped tokens by reason; the runbook's entry LatentwatchCoverageLow says what to do for each.",
            target(
                f'sum by (state, reason) (rate(latentwatch_tokens_total{{{MODEL},state=~"unseen|dropped"}}'
                "[$__rate_interval]))",
                "{{state}}: {{reason}}",
            ),
            unit="tokens/s",
            stacking="normal",
            fill=40,
        ),
    ]
    drift = [
        table(
            "Drift, the strongest evidence first",
            "Evidence that a feature no longer behaves as in the baseline, as the decimal logarithm of a statistic "
            "that "
            "alarms above its limit. Needs a collector with a baseline.",
            target(
                f"topk(20, max by (model_name, feature, kind) (latentwatch_drift_log10_evalue{{{MODEL}}}))",
                format="table",
            ),
            names={"model_name": "model", "feature": "feature", "kind": "kind", "Value": "log10 evidence"},
            width=12,
            decimals=2,
            overrides=[
                link_of(
                    "feature",
                    "This feature in depth",
                    "/d/latentwatch-feature?var-feature=${__value.text}&${__url_time_range}",
                )
            ],
        ),
        graph(
            "Evidence and limits",
            "The ten features with most evidence of drift, and the limits of each kind of detector.",
            target(
                f"topk(10, max by (feature, kind) (latentwatch_drift_log10_evalue{{{MODEL}}}))", "{{feature}}, {{kind}}"
            ),
            target(f"max by (kind) (latentwatch_drift_limit_log10_evalue{{{MODEL}}})", "limit, {{kind}}"),
        ),
        stat(
            "Features drifting",
            "Features of which a detector is above its limit.",
            f"count(max by (model_name, feature) (latentwatch_drift_log10_evalue{{{MODEL}}} >= on (job, instance, "
            f"model_name, kind) "
            f"group_left () latentwatch_drift_limit_log10_evalue{{{MODEL}}})) or vector(0)",
            thresholds=NONE_IS_GOOD,
        ),
        stat(
            "Models without drift detection",
            "Models whose collector has no baseline for them.",
            f"count(latentwatch_drift_armed{{{MODEL}}} == 0) or vector(0)",
            thresholds=SOME_IS_ODD,
        ),
        stat(
            "Age of the oldest baseline",
            "Since it was calibrated; after a month it says little about traffic of today.",
            f"time() - min(latentwatch_drift_baseline_created_timestamp_seconds{{{MODEL}}})",
            unit="s",
        ),
        graph(
            "What the detectors took",
            "Windows with requests, and those of them left out of a later baseline because something alarmed.",
            target(
                f"sum by (model_name) (rate(latentwatch_drift_windows_total{{{MODEL}}}[$__rate_interval]))",
                "{{model_name}}, windows",
            ),
            target(
                f"sum by (model_name) (rate(latentwatch_drift_excluded_windows_total{{{MODEL}}}[$__rate_interval]))",
                "{{model_name}}, left out",
            ),
            target(
                f"sum by (model_name) (rate(latentwatch_drift_requests_total{{{MODEL}}}[$__rate_interval]))",
                "{{model_name}}, requests",
            ),
            unit="ops",
            width=12,
            height=4,
        ),
    ]
    traffic = [
        graph(
            "Requests ended",
            "finished, aborted by the client, or lost with their engine.",
            target(f"sum by (outcome) (rate(latentwatch_requests_total{{{MODEL}}}[$__rate_interval]))", "{{outcome}}"),
            unit="reqps",
            width=8,
        ),
        graph(
            "Requests running",
            "Requests that began and have not ended.",
            target(f"sum by (model_name) (latentwatch_open_requests{{{MODEL}}})", "{{model_name}}"),
            width=8,
        ),
        graph(
            "Firing rate, the ten highest",
            "Share of scored tokens on which a sparse feature fired. A feature that fires on a large share of tokens "
            "is costly to ship and says little.",
            target(f"topk(10, {named(f'max by (feature) ({fired}{{{RECORDED}}})')})", "{{label}} ({{feature}})"),
            unit="percentunit",
            width=8,
        ),
    ]
    rows = [
        ("Is anything wrong?", wrong),
        ("Is everything seen?", seen),
        ("Does it drift?", drift),
        ("Traffic", traffic),
    ]
    words = "Is anything wrong, and is everything seen?"
    return dashboard("overview", "Overview", words, [JOB, INSTANCE, MODEL_NAME], rows)


def feature() -> Panel:
    one = f'{MODEL},feature="$feature"'
    recorded = f'{RECORDED},feature="$feature"'
    bucket = f"sum by (le) (rate(latentwatch_feature_request_max_bucket{{{one}}}[$__rate_interval]))"
    about = [
        stat(
            "What it is",
            "The feature's label on the watchlist. A label is what somebody made of it, not what it is.",
            f'group by (label) (latentwatch_feature_info{{{HERE},feature="$feature"}})',
            width=10,
            legend="{{label}}",
            text="name",
        ),
        stat(
            "Severity",
            "critical pages, warning opens a ticket, info and none do neither.",
            f'group by (severity, hook_point) (latentwatch_feature_info{{{HERE},feature="$feature"}})',
            width=5,
            legend="{{severity}}, {{hook_point}}",
            text="name",
        ),
        stat(
            "Limit",
            "A request above it is an exceedance; in the feature's own units.",
            f'max(latentwatch_feature_limit{{{HERE},feature="$feature"}})',
            width=3,
        ),
        stat(
            "Exceedances",
            "Requests above the limit in the chosen time.",
            f"sum(increase(latentwatch_exceedances_total{{{one}}}[$__range]))",
            width=3,
            thresholds=NONE_IS_GOOD,
            decimals=0,
        ),
        stat(
            "Fires on",
            "Share of scored tokens in the last 5 minutes. A dense feature (a probe) scores every token and has none.",
            f"max(feature:latentwatch_feature_fired:ratio_rate5m{{{recorded}}})",
            unit="percentunit",
            width=3,
        ),
    ]
    requests = [
        exceedances_graph(one, "model_name, severity", "{{model_name}} ({{severity}})"),
        graph(
            "Where the requests are",
            "Quantiles of the statistic that the limit is on, one value a request, beside the limit.",
            *(target(f"histogram_quantile({q}, {bucket})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)),
            target(f'max(latentwatch_feature_limit{{{HERE},feature="$feature"}})', "limit"),
        ),
        heatmap(
            "Every request",
            "How many requests ended with which value of the statistic. Two clouds, one above the limit, are what a "
            "good feature shows in an incident.",
            f"sum by (le) (increase(latentwatch_feature_request_max_bucket{{{one}}}[$__rate_interval]))",
        ),
        graph(
            "Share of requests over the limit",
            "Exceedances among the requests that ended.",
            target(
                f"sum by (model_name) (rate(latentwatch_exceedances_total{{{one}}}[$__rate_interval])) / "
                f"(sum by (model_name) (rate(latentwatch_requests_total{{{MODEL}}}[$__rate_interval])) > 0)",
                "{{model_name}}",
            ),
            unit="percentunit",
        ),
    ]
    tokens = [
        graph(
            "Firing rate",
            "Share of scored tokens on which it fired, over 5 minutes and over an hour. A level that stays up after a "
            "deploy speaks for the model, a spike for its users.",
            target(f"feature:latentwatch_feature_fired:ratio_rate5m{{{recorded}}}", "{{model_name}}, 5 minutes"),
            target(f"feature:latentwatch_feature_fired:ratio_rate1h{{{recorded}}}", "{{model_name}}, 1 hour"),
            unit="percentunit",
            width=8,
        ),
        graph(
            "Requests in which it fired",
            "At least once, of the requests that ended.",
            target(
                f"sum by (model_name) (rate(latentwatch_feature_requests_total{{{one}}}[$__rate_interval]))",
                "{{model_name}}",
            ),
            unit="reqps",
            width=8,
        ),
        graph(
            "Fires by collector",
            "One collector far from the others is one engine far from the others: other traffic, or a broken replica.",
            target(
                f"sum by (instance) (rate(latentwatch_feature_fired_tokens_total{{{one}}}[$__rate_interval]))",
                "{{instance}}",
            ),
            unit="tokens/s",
            width=8,
        ),
    ]
    drift = [
        graph(
            "Evidence of drift",
            "By kind of detector: rate (in how many requests it is active), shape (with which values), replica (one "
            "engine "
            "against the others), coactivation (with another feature), canary (prompts that never change).",
            target(f"max by (kind) (latentwatch_drift_log10_evalue{{{one}}})", "{{kind}}"),
            target(f"max by (kind) (latentwatch_drift_limit_log10_evalue{{{MODEL}}})", "limit, {{kind}}"),
        ),
        graph(
            "Requests against the baseline",
            "Requests in which it is active, divided by those that the baseline expects.",
            target(f"max by (model_name) (latentwatch_drift_rate_ratio{{{one}}})", "{{model_name}}"),
        ),
        stat(
            "Drifts since",
            "When the oldest change began, by the detector's own estimate; nothing where no detector alarms.",
            f"(min(latentwatch_drift_since_timestamp_seconds{{{one}}} > 0) * 1000) or vector(0)",
            unit="dateTimeFromNow",
            width=6,
            mappings=[{"type": "value", "options": {"0": {"text": "no drift with a known beginning"}}}],
        ),
    ]
    rows = [("The feature", about), ("Requests", requests), ("Tokens", tokens), ("Drift", drift)]
    words = "One feature of the watchlist in depth."
    return dashboard("feature", "Feature", words, [JOB, INSTANCE, MODEL_NAME, FEATURE], rows)


def requests() -> Panel:
    how = (
        "Metrics carry no request ids. They are in the **exemplars** below (the dots), and at the collector that saw "
        "the "
        "request.\n\n"
        "Open it: [the request ${request_id} at ${instance}](http://${instance}/#request=${request_id}) · "
        "[latest exceedances at ${instance}](http://${instance}/v1/exceedances) · [live page](http://${instance}/)\n\n"
        "Choose one collector and type the id that the client's response carried above. Your browser must reach the "
        "collector; else use `curl` from inside, as the runbook says."
    )
    find = [
        markdown("How to find a request", "From a page to the request, and from there to your gateway's log.", how),
        exceedances_graph(MODEL, "feature, severity", "{{feature}} ({{severity}})"),
        table(
            "Who saw what",
            "Exceedances in the chosen time by collector: the one to ask for the requests.",
            target(
                "sum by (instance, model_name, feature, severity) "
                f"(increase(latentwatch_exceedances_total{{{MODEL}}}[$__range])) > 0",
                format="table",
            ),
            names={
                "instance": "collector",
                "model_name": "model",
                "feature": "feature",
                "severity": "severity",
                "Value": "requests",
            },
            width=12,
            decimals=0,
            overrides=[link_of("collector", "Its live page", "http://${__value.text}/")],
        ),
    ]
    shape = [
        graph(
            "How requests end",
            "Requests that are lost ended with their engine: their last tokens were never reported.",
            target(f"sum by (outcome) (rate(latentwatch_requests_total{{{MODEL}}}[$__rate_interval]))", "{{outcome}}"),
            unit="reqps",
            stacking="normal",
            fill=40,
        ),
        graph(
            "Prompt and output tokens",
            "Tokens by the part of the request that they belong to.",
            target(f"sum by (phase) (rate(latentwatch_tokens_total{{{MODEL}}}[$__rate_interval]))", "{{phase}}"),
            unit="tokens/s",
        ),
        heatmap(
            "Residual norm",
            "Euclidean norm of the residual stream of every scored token, all hook points together. A cloud that moves"
            " as a whole is another checkpoint, dtype or prompt template: every score moves with it.",
            f"sum by (le) (increase(latentwatch_residual_norm_bucket{{{MODEL}}}[$__rate_interval]))",
        ),
        graph(
            "Median residual norm by hook point",
            "A step without a deploy deserves a question.",
            target(
                "histogram_quantile(0.5, sum by (hook_point, le) "
                f"(rate(latentwatch_residual_norm_bucket{{{MODEL}}}[$__rate_interval])))",
                "{{hook_point}}",
            ),
        ),
    ]
    rows = [("From a page to the request", find), ("What requests look like", shape)]
    words = "Which requests exceeded a limit, where to ask for them, and what requests look like."
    return dashboard("requests", "Request forensics", words, [JOB, INSTANCE, MODEL_NAME, REQUEST_ID], rows)


ENGINE_COUNTERS = (
    ("steps", "Steps", "Steps that the engines ran.", "ops"),
    ("ring_dropped_steps", "Steps dropped at the ring", "The exporter did not keep up: give the pod more CPU.", "ops"),
    ("op_silent_steps", "Silent steps", "Steps whose graph had no score op. Anything above 0 needs a restart.", "ops"),
    ("shed_batches", "Batches shed", "The sender gave up scores because the collector was away or slow.", "ops"),
    ("shed_critical_tokens", "Critical tokens shed", "Above a critical limit, and their scores are gone.", "tokens/s"),
    ("shed_warning_tokens", "Warning tokens shed", "Above a limit, none of them a critical one's.", "tokens/s"),
    ("lost_tokens", "Tokens given up", "With their books: beyond every bound, or refused.", "tokens/s"),
    ("spool_failures", "Spool failures", "The disk is full or gone; scores wait in memory.", "ops"),
    ("spool_refused", "Spool refusals", "Foreign or damaged files, and boots that no collector takes.", "ops"),
    ("reconnects", "Reconnects", "Streams that senders opened again.", "ops"),
    ("exporter_restarts", "Exporter restarts", "Starts of exporter processes after the first.", "ops"),
    ("recomputed_tokens", "Tokens recomputed", "After a preemption; their first scores stand.", "tokens/s"),
    ("surplus_tokens", "Surplus rows", "Rows computed past the end of a request; tokens of none.", "tokens/s"),
    ("unattributed_rows", "Unattributed rows", "Rows of requests that the exporter did not know.", "tokens/s"),
    ("unannounced_requests", "Unannounced requests", "Begun and ended while the exporter read nothing.", "ops"),
    ("untraced_requests", "Untraced requests", "Served without the trace context of their client.", "ops"),
)


def health() -> Panel:
    lag = f"sum by (le) (rate(latentwatch_ingest_lag_seconds_bucket{{{HERE}}}[$__rate_interval]))"
    collectors = [
        stat("Collectors up", "Scrape targets of the chosen job that answer.", f"sum(up{{{HERE}}})", width=3),
        stat(
            "Collectors down",
            "Scrape targets of the chosen job that do not answer.",
            f"count(up{{{HERE}}} == 0) or vector(0)",
            width=3,
            thresholds=NONE_IS_GOOD,
        ),
        stat(
            "Watchlists in use",
            "Distinct watchlist files over the chosen collectors. More than one is a rollout, or a mistake.",
            f"count(group by (sha256) (latentwatch_watchlist_info{{{HERE}}}))",
            width=3,
            thresholds=steps((None, GREEN), (2, ORANGE)),
        ),
        stat(
            "Features watched",
            "On the largest watchlist in use.",
            f"max(count by (instance) (latentwatch_feature_info{{{HERE}}}))",
            width=3,
        ),
        stat(
            "State is safe",
            "Collectors whose acknowledgements survive their death: started with --state, on a disk that works.",
            f"sum(latentwatch_state_durable{{{HERE}}})",
            width=3,
        ),
        stat(
            "Oldest checkpoint",
            "Age of the oldest newest checkpoint; a collector without --state has none.",
            f"time() - min(latentwatch_state_checkpoint_timestamp_seconds{{{HERE}}} > 0)",
            unit="s",
            width=3,
            thresholds=steps((None, GREEN), (600, RED)),
        ),
        stat(
            "Up since",
            "Start of the collector that started last.",
            f"max(process_start_time_seconds{{{HERE}}}) * 1000",
            unit="dateTimeFromNow",
            width=3,
        ),
        stat(
            "Samples withheld",
            "Samples of features that collectors left out of their page, because it would have grown beyond its bound.",
            f"sum(latentwatch_series_withheld{{{HERE}}})",
            width=3,
            thresholds=SOME_IS_ODD,
        ),
        table(
            "Versions and watchlists",
            "What runs where.",
            target(f"latentwatch_build_info{{{HERE}}}", format="table"),
            target(f"latentwatch_watchlist_info{{{HERE}}}", format="table"),
            names={
                "instance": "collector",
                "version": "version",
                "name": "watchlist",
                "sha256": "sha256",
                "features": "features",
            },
            hide=("job", "Value #A", "Value #B"),
            height=6,
        ),
    ]
    ingest = [
        graph(
            "Lag",
            "From the engine's hand-over of a step to its merge at the collector, by the clocks of both hosts.",
            *(target(f"histogram_quantile({q}, {lag})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)),
            unit="s",
            width=8,
        ),
        graph(
            "Messages",
            "Batches received; duplicates were sent again after a reconnect and ignored; lost ones never came.",
            target(f"sum(rate(latentwatch_collector_messages_total{{{HERE}}}[$__rate_interval]))", "received"),
            target(f"sum(rate(latentwatch_collector_duplicates_total{{{HERE}}}[$__rate_interval]))", "duplicates"),
            target(f"sum(rate(latentwatch_collector_lost_sequences_total{{{HERE}}}[$__rate_interval]))", "lost"),
            unit="ops",
            width=8,
        ),
        graph(
            "Streams refused",
            "By reason; the runbook's entry LatentwatchStreamRefused says what to do for each.",
            target(
                f"sum by (reason) (rate(latentwatch_streams_refused_total{{{HERE}}}[$__rate_interval])) > 0 "
                f"or sum(rate(latentwatch_streams_refused_total{{{HERE}}}[$__rate_interval]))",
                "{{reason}}",
            ),
            unit="ops",
            width=8,
        ),
        graph(
            "What the collector could not hold",
            "Requests without statistics are a hole (LatentwatchRequestsUntracked); the lists only show less history. "
            "Excess tokens are a bug.",
            target(
                f"sum(rate(latentwatch_requests_evicted_total{{{HERE}}}[$__rate_interval]))",
                "requests without statistics",
            ),
            target(
                f"sum(rate(latentwatch_request_summaries_evicted_total{{{HERE}}}[$__rate_interval]))",
                "request summaries",
            ),
            target(f"sum(rate(latentwatch_events_evicted_total{{{HERE}}}[$__rate_interval]))", "exceedance events"),
            target(
                f"sum(rate(latentwatch_accounting_excess_tokens_total{{{HERE}}}[$__rate_interval]))", "excess tokens"
            ),
            unit="ops",
            width=8,
        ),
        graph(
            "CPU",
            "Cores in use; a collector has one core's worth of work at most.",
            target(f"rate(process_cpu_seconds_total{{{HERE}}}[$__rate_interval])", "{{instance}}"),
            unit="percentunit",
            width=8,
        ),
        graph(
            "Memory",
            "Resident. Bounded by the watchlist and the collector's bounds, whatever the traffic.",
            target(f"process_resident_memory_bytes{{{HERE}}}", "{{instance}}"),
            unit="bytes",
            width=8,
        ),
        graph(
            "Journal",
            "Events written since the newest checkpoint; it shrinks at each checkpoint.",
            target(f"latentwatch_state_journal_bytes{{{HERE}}}", "{{instance}}"),
            unit="bytes",
            width=8,
        ),
        graph(
            "State writes that failed",
            "The collector goes on in memory and tries again; until then its death would lose what it acknowledged.",
            target(f"rate(latentwatch_state_write_failures_total{{{HERE}}}[$__rate_interval])", "{{instance}}"),
            unit="ops",
            width=8,
        ),
        graph(
            "Events resumed at the start",
            "Read back from the journal of the process before.",
            target(f"latentwatch_state_resumed_events{{{HERE}}}", "{{instance}}"),
            width=8,
        ),
    ]
    stages = [
        graph(
            "How full each stage is",
            "Share of its bound. At 100 % a stage refuses or gives up the oldest, which the counters of losses show.",
            target(
                f"max by (stage) (latentwatch_stage_depth{{{HERE}}} / latentwatch_stage_capacity{{{HERE}}})",
                "{{stage}}",
            ),
            unit="percentunit",
            width=8,
        ),
        graph(
            "Waiting to be merged",
            "Messages, at most one a stream: streams take turns by the bytes that they send.",
            target(
                f'sum by (instance) (latentwatch_stage_depth{{{HERE}, stage="merge_queue_messages"}})', "{{instance}}"
            ),
            width=8,
        ),
        graph(
            "Longest wait for a turn",
            "Of the message that waits longest. Seconds mean too many engines, or no core of its own.",
            target(f"max by (instance) (latentwatch_merge_queue_oldest_seconds{{{HERE}}})", "{{instance}}"),
            unit="s",
            width=8,
        ),
    ]
    since_cut = f"latentwatch_forward_oldest_timestamp_seconds{{{HERE}}}"
    forwarding = [
        table(
            "Sidecars",
            "Each collector that forwards to one of these, and how long ago it reported.",
            target(f"latentwatch_forwarder_connected{{{HERE}}}", format="table"),
            target(f"time() - latentwatch_forwarder_last_seen_timestamp_seconds{{{HERE}}}", format="table"),
            names={
                "collector": "sidecar",
                "instance": "gateway",
                "Value #A": "stream open",
                "Value #B": "silent for",
            },
            hide=("job",),
            height=6,
            overrides=[unit_of("silent for", "s")],
        ),
        graph(
            "Reports to the gateway",
            "One a second and sidecar; more after an outage. Resent ones were on their way when a stream ended.",
            target(f"sum(rate(latentwatch_forward_reports_total{{{HERE}}}[$__rate_interval]))", "cut"),
            target(f"sum(rate(latentwatch_forward_resent_reports_total{{{HERE}}}[$__rate_interval]))", "resent"),
            target(f"sum(rate(latentwatch_forward_reconnects_total{{{HERE}}}[$__rate_interval]))", "reconnects"),
            target(f"sum(latentwatch_forward_connected{{{HERE}}})", "sidecars connected"),
            width=8,
        ),
        graph(
            "Oldest report without an answer",
            "The gateway is away or slow while this grows; counts wait for it and none is lost.",
            target(f"max by (instance) ((time() - {since_cut}) * ({since_cut} > bool 0))", "{{instance}}"),
            target(f"max(latentwatch_forward_waiting_reports{{{HERE}}})", "reports that wait, at most 8"),
            unit="s",
            width=8,
        ),
        graph(
            "Rows of requests that wait",
            "In memory. At the bound the oldest are shed, those without an exceedance first.",
            target(f"max by (instance) (latentwatch_forward_waiting_bytes{{{HERE}}})", "{{instance}}"),
            target(f"max(latentwatch_forward_capacity_bytes{{{HERE}}})", "bound"),
            unit="bytes",
            width=8,
        ),
        graph(
            "Rows and crossings shed",
            "Requests that the gateway cannot look up: as sidecars count it, and as they told their gateway.",
            target(
                f"sum by (kind) (rate(latentwatch_forward_shed_total{{{HERE}}}[$__rate_interval]))",
                "{{kind}}, shed here",
            ),
            target(
                f"sum by (collector, kind) (rate(latentwatch_forwarder_shed_total{{{HERE}}}[$__rate_interval]))",
                "{{collector}}, {{kind}}",
            ),
            unit="ops",
        ),
    ]
    evidence = [
        graph(
            "Records written",
            "Exceedances, request summaries and activations that went into the evidence folder.",
            target(f"sum by (kind) (rate(latentwatch_evidence_written_total{{{HERE}}}[$__rate_interval]))", "{{kind}}"),
            unit="ops",
            width=6,
        ),
        graph(
            "Records lost",
            "Evidence that was not written: the queue was full, or the disk failed. Metrics and pages do not need it.",
            target(
                f"sum by (kind, reason) (rate(latentwatch_evidence_dropped_total{{{HERE}}}[$__rate_interval]))",
                "{{kind}}: {{reason}}",
            ),
            unit="ops",
            width=6,
        ),
        graph(
            "Sent over OTLP",
            "Events of exceedances by what became of them, and pushes of metrics that the receiver did not take.",
            target(
                f"sum by (outcome) (rate(latentwatch_otlp_events_total{{{HERE}}}[$__rate_interval]))", "{{outcome}}"
            ),
            target(
                f"sum(rate(latentwatch_otlp_metrics_failures_total{{{HERE}}}[$__rate_interval]))", "metrics not taken"
            ),
            unit="ops",
            width=6,
        ),
        graph(
            "Evidence on disk",
            "Size of the folder, bounded by the retention, and what waits to be written.",
            target(f"sum by (instance) (latentwatch_evidence_folder_bytes{{{HERE}}})", "{{instance}}, folder"),
            target(f"sum by (instance) (latentwatch_evidence_queue_bytes{{{HERE}}})", "{{instance}}, queue"),
            unit="bytes",
            width=6,
        ),
    ]
    engines = [
        table(
            "Engines",
            "Each engine process: does it score, and how long ago did it say something.",
            target(f"latentwatch_engine_armed{{{HERE}}}", format="table"),
            target(f"time() - latentwatch_replica_last_seen_timestamp_seconds{{{HERE}}}", format="table"),
            target(f"latentwatch_stream_connected{{{HERE}}}", format="table"),
            names={
                "replica": "engine",
                "instance": "collector",
                "Value #A": "scores",
                "reason": "why not",
                "Value #B": "silent for",
                "Value #C": "stream open",
            },
            hide=("job",),
            overrides=[unit_of("silent for", "s")],
        ),
        *(
            graph(
                title,
                words,
                target(
                    f"sum by (replica) (rate(latentwatch_engine_{name}_total{{{HERE}}}[$__rate_interval]))",
                    "{{replica}}",
                ),
                unit=unit,
                width=8,
                height=6,
            )
            for name, title, words, unit in ENGINE_COUNTERS
        ),
        graph(
            "Spooled",
            "What engines keep on their disks until a collector holds it.",
            target(f"sum by (replica) (latentwatch_engine_spool_bytes{{{HERE}}})", "{{replica}}"),
            unit="bytes",
            width=8,
            height=6,
        ),
    ]
    rows = [
        ("Collectors", collectors),
        ("Ingest", ingest),
        ("Stages", stages),
        ("Forwarding", forwarding),
        ("Evidence", evidence),
        ("Engines", engines),
    ]
    words = "Collectors, the streams to them, and the engines behind: what every other figure rests on."
    return dashboard("health", "Collector and engine health", words, [JOB, INSTANCE], rows)


def rendered() -> dict[str, str]:
    """File name to content."""
    made = (overview(), feature(), requests(), health())
    return {f"{board['uid'].removeprefix('latentwatch-')}.json": json.dumps(board, indent=1) + "\n" for board in made}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file differs")
    check = parser.parse_args().check
    files = rendered()
    there = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    if check:
        stale = sorted(name for name in files.keys() | there.keys() if files.get(name) != there.get(name))
        for name in stale:
            print(f"dashboards/grafana/{name}: differs; run: python dashboards/generate.py", file=sys.stderr)
        return int(bool(stale))
    FOLDER.mkdir(exist_ok=True)
    for name in there.keys() - files.keys():
        (FOLDER / name).unlink()
    for name, text in files.items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
