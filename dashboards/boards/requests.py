"""Which requests exceeded a limit, where to ask for them, and what requests look like."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import TextBoxVariable
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard, VariableOption
from latentwatch.export import metrics

from .parts import (
    INSTANCE,
    JOB,
    MODEL_NAME,
    STACKED,
    TOKENS_PER_SECOND,
    Panel,
    dashboard_of,
    exceedances_graph,
    graph,
    heatmap,
    markdown,
    opens,
    query,
    rows_of,
    table,
)
from .queries import MODEL, increase, rate

REQUEST_ID = TextBoxVariable("request_id").label("request id").default_value("").current(VariableOption(value=""))

HOW_TO_FIND = """\
Metrics carry no request ids. They are in the **exemplars** below (the dots), and at the collector that saw the request.

Open it: [the request ${request_id} at ${instance}](http://${instance}/#request=${request_id}) · \
[latest exceedances at ${instance}](http://${instance}/v1/exceedances) · [live page](http://${instance}/)

Choose one collector and type the id that the client's response carried above. Your browser must reach the collector; \
else use `curl` from inside, as the runbook says."""


def board() -> Dashboard:
    """From a page to the request behind it."""
    rows = {"From a page to the request": _find(), "What requests look like": [*_shape(), *_norms()]}
    words = "Which requests exceeded a limit, where to ask for them, and what requests look like."
    return dashboard_of("requests", "Request forensics", words, [JOB, INSTANCE, MODEL_NAME, REQUEST_ID], rows)


def _find() -> list[Panel]:
    chosen = increase(metrics.EXCEEDANCES, MODEL, over="$__range")
    who = table(
        "Who saw what",
        "Exceedances in the chosen time by collector: the one to ask for the requests.",
        rows_of(f"sum by (instance, model_name, feature, severity) ({chosen}) > 0"),
        names={
            "instance": "collector",
            "model_name": "model",
            "feature": "feature",
            "severity": "severity",
            "Value": "requests",
        },
    )
    page = opens("Its live page", "http://${__value.text}/")
    return [
        markdown(
            "How to find a request", "From a page to the request, and from there to your gateway's log.", HOW_TO_FIND
        ),
        exceedances_graph(MODEL, "feature, severity", "{{feature}} ({{severity}})"),
        who.span(12).decimals(0).override_by_name("collector", page),
    ]


def _shape() -> list[Panel]:
    ends = graph(
        "How requests end",
        "Requests that are lost ended with their engine: their last tokens were never reported.",
        query(f"sum by (outcome) ({rate(metrics.REQUESTS, MODEL)})", "{{outcome}}"),
    )
    lengths = graph(
        "Prompt and output tokens",
        "Tokens by the part of the request that they belong to.",
        query(f"sum by (phase) ({rate(metrics.TOKENS, MODEL)})", "{{phase}}"),
    )
    return [
        ends.unit(units.RequestsPerSecond).stacking(STACKED).fill_opacity(40),
        lengths.unit(TOKENS_PER_SECOND),
    ]


def _norms() -> list[Panel]:
    by_hook = f"sum by (hook_point, le) ({rate(metrics.RESIDUAL_NORM, MODEL)})"
    return [
        heatmap(
            "Residual norm",
            "Euclidean norm of the residual stream of every scored token, all hook points together. A cloud that moves "
            "as a whole is another checkpoint, dtype or prompt template: every score moves with it.",
            f"sum by (le) ({increase(metrics.RESIDUAL_NORM, MODEL)})",
        ),
        graph(
            "Median residual norm by hook point",
            "A step without a deploy deserves a question.",
            query(f"histogram_quantile(0.5, {by_hook})", "{{hook_point}}"),
        ),
    ]
