"""What boards are made of: panels with one look, and the variables, annotations and links around them.

A panel is a builder of Grafana's own SDK that has the look already; a board says on it what differs, and an option that
Grafana does not have is an error. Places and ids follow from the order, so that none can overlap or repeat.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from grafana_foundation_sdk.builders import common, dashboard, prometheus, text, timeseries
from grafana_foundation_sdk.builders import heatmap as heatmaps
from grafana_foundation_sdk.builders import stat as stats
from grafana_foundation_sdk.builders import table as tables
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode
from latentwatch.collector.health.cause import COVERAGE_GOAL
from latentwatch.export import metrics
from latentwatch.export.metrics import Metric

from .queries import checked, increase, series

Query = prometheus.Dataquery
Panel = Builder[models.Panel]
Variable = Builder[models.VariableModel]
Styled = TypeVar("Styled", stats.Panel, timeseries.Panel, heatmaps.Panel, tables.Panel, text.Panel)

SOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS: Final = 24
TOKENS_PER_SECOND: Final = "tokens/s"

# Okabe and Ito's palette: told apart by people who do not see red and green alike.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"


def steps(*values: tuple[float | None, str]) -> dashboard.ThresholdsConfig:
    """Thresholds: (from value, colour), the first one from None."""
    made = [models.Threshold(value=value, color=color) for value, color in values]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(made)


PLAIN: Final = steps((None, BLUE))
NONE_IS_GOOD: Final = steps((None, GREEN), (1, RED))
SOME_IS_ODD: Final = steps((None, GREEN), (1, ORANGE))
ERROR_BUDGET: Final = round(1 - COVERAGE_GOAL, 6)
COVERAGE: Final = steps((None, RED), (round(1 - 14.4 * ERROR_BUDGET, 6), ORANGE), (COVERAGE_GOAL, GREEN))
"""Red where the alert LatentwatchCoverageLow pages: at 14.4 times the budget."""


# -- queries


def query(expr: str, legend: str = "__auto", format: PromQueryFormat = PromQueryFormat.TIME_SERIES) -> Query:
    """Over the whole time on the screen; for a table, at its end alone. Raises ConfigRefused as `checked` does."""
    asked = Query().datasource(SOURCE).expr(checked(expr)).legend_format(legend).format(format).exemplar(False)
    return asked.instant() if format is PromQueryFormat.TABLE else asked.range()


def rows_of(expr: str) -> Query:
    """For a table."""
    return query(expr, format=PromQueryFormat.TABLE)


def quantiles(by_le: str) -> list[Query]:
    """Of a histogram's rates by `le`."""
    return [query(f"histogram_quantile({q}, {by_le})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)]


# -- panels


def _styled(
    panel: Styled, title: str, description: str, queries: Sequence[Query], *, width: int, height: int = 8
) -> Styled:
    lettered = zip(string.ascii_uppercase, queries, strict=False)
    return (
        panel.title(title)
        .description(description)
        .datasource(SOURCE)
        .targets([asked.ref_id(letter) for letter, asked in lettered])
        .unit(units.Short)
        .thresholds(PLAIN)
        .no_value("no data")
        .span(width)
        .height(height)
    )


def stat(title: str, description: str, expr: str, legend: str = "__auto") -> stats.Panel:
    """The latest value, large."""
    latest = common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False)
    return (
        _styled(stats.Panel(), title, description, [query(expr, legend)], width=4, height=4)
        .reduce_options(latest)
        .color_mode(looks.BigValueColorMode.VALUE)
        .graph_mode(looks.BigValueGraphMode.NONE)
        .text_mode(looks.BigValueTextMode.AUTO)
    )


def graph(title: str, description: str, *queries: Query) -> timeseries.Panel:
    """Lines over time, with a table of the latest and the highest values, the highest first: not all may have room."""
    legend = common.VizLegendOptions().show_legend(True).calcs(["lastNotNull", "max"]).sort_by("Max").sort_desc(True)
    return (
        _styled(timeseries.Panel(), title, description, queries, width=12)
        .line_width(1)
        .fill_opacity(0)
        .show_points(looks.VisibilityMode.NEVER)
        .legend(legend.display_mode(looks.LegendDisplayMode.TABLE).placement(looks.LegendPlacement.BOTTOM))
        .tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING))
    )


STACKED: Final = common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A")
BESIDE: Final = (
    common.VizLegendOptions()
    .show_legend(True)
    .display_mode(looks.LegendDisplayMode.LIST)
    .placement(looks.LegendPlacement.RIGHT)
)
"""The legend of a graph that is too low for a table."""
AS_LIMIT: Final = [
    models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": RED}),
    models.DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [6, 4]}),
]
"""How a limit is told from what is compared with it."""
AS_LINES: Final = common.GraphThresholdsStyleConfig().mode(looks.GraphThresholdsStyleMode.LINE)


def heatmap(title: str, description: str, expr: str) -> heatmaps.Panel:
    """Of a classic histogram. Unit "short": the values are scores in units of their own."""
    asked = query(expr, "{{le}}", PromQueryFormat.HEATMAP)
    color = heatmaps.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Cividis").steps(64)
    return (
        _styled(heatmaps.Panel(), title, description, [asked], width=12)
        .calculate(False)
        .y_axis(heatmaps.YAxisConfig().unit(units.Short))
        .color(color)
        .cell_gap(1)
    )


def table(
    title: str, description: str, *queries: Query, names: dict[str, str], hide: tuple[str, ...] = ()
) -> tables.Panel:
    """Queries joined by their labels; `names` renames columns, in order."""
    organized = {
        "renameByName": names,
        "indexByName": {name: index for index, name in enumerate(names)},
        "excludeByName": dict.fromkeys(("Time", "__name__", *hide), True),
    }
    return (
        _styled(tables.Panel(), title, description, queries, width=COLUMNS)
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(models.DataTransformerConfig(id_val="organize", options=organized))
        .show_header(True)
        .cell_height(looks.TableCellHeight.SM)
        .align(looks.FieldTextAlignment.AUTO)
        .min_width(80)
        .no_value("–")
        .filterable(True)
    )


def markdown(title: str, description: str, content: str) -> text.Panel:
    """Words, over the whole width."""
    panel = _styled(text.Panel(), title, description, [], width=COLUMNS, height=5)
    return panel.mode(TextMode.MARKDOWN).content(content)


def exceedances_graph(where: str, by: str, legend: str) -> timeseries.Panel:
    """Exceedances by some labels, with exemplars."""
    words = (
        "Requests that went above a limit, each counted once per feature. The dots are exemplars: each carries the "
        "request's id, and the client's trace id where it sent one."
    )
    asked = query(f"sum by ({by}) ({increase(metrics.EXCEEDANCES, where)})", legend)
    return graph("Exceedances", words, asked.exemplar(True)).fill_opacity(40)


def opens(title: str, url: str) -> list[models.DynamicConfigValue]:
    """For a column of a table: each of its values is a link."""
    return [models.DynamicConfigValue("links", [{"title": title, "url": url, "targetBlank": True}])]


IN_SECONDS: Final = [models.DynamicConfigValue("unit", units.Seconds)]
FEATURE_IN_DEPTH: Final = opens(
    "This feature in depth", "/d/latentwatch-feature?var-feature=${__value.text}&${__url_time_range}"
)


# -- boards


def choice(name: str, asked: str, label: str = "") -> dashboard.QueryVariable:
    """A template variable: one of the values of a label."""
    return (
        dashboard.QueryVariable(name)
        .label(label or name)
        .datasource(SOURCE)
        .query({"query": f"label_values({checked(asked)}, {name})", "refId": "A"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )


def choices(name: str, asked: str, label: str = "") -> dashboard.QueryVariable:
    """A template variable: any of the values of a label, at first all."""
    everything = models.VariableOption(text="All", value="$__all")
    return choice(name, asked, label).multi(True).include_all(True).all_value(".*").current(everything)


DATASOURCE: Final = dashboard.DatasourceVariable("datasource").label("data source").type("prometheus")
JOB: Final = choices("job", metrics.BUILD_INFO.name)
INSTANCE: Final = choices("instance", series(metrics.BUILD_INFO, 'job=~"$job"'), "collector")
MODEL_NAME: Final = choices("model_name", series(metrics.TOKENS), "model")


class Annotation(models.AnnotationQuery):
    """An annotation by Prometheus, with the two fields of its own that the SDK does not know."""

    def __init__(self, name: str, expr: str, color: str, title: str) -> None:
        super().__init__(name=name, datasource=SOURCE, icon_color=color, expr=checked(expr))
        self.title = title

    def to_json(self) -> dict[str, object]:
        return super().to_json() | {"titleFormat": self.title, "step": "60s"}


def appeared(metric: Metric, labels: str) -> str:
    """Series that were not there five minutes before, by the labels that say what was deployed."""
    now, before = (f"count by ({labels}) ({series(metric)}{offset})" for offset in ("", " offset 5m"))
    return f"{now} unless {before}"


_FIRING: Final = 'ALERTS{alertname=~"Latentwatch.*",alertstate="firing"}'
ANNOTATIONS: Final[list[models.AnnotationQuery]] = [
    Annotation("Alerts", _FIRING, RED, "{{alertname}} ({{severity}})"),
    Annotation("Collector version", appeared(metrics.BUILD_INFO, "version"), BLUE, "latentwatch {{version}}"),
    Annotation("Watchlist", appeared(metrics.WATCHLIST_INFO, "name, sha256"), ORANGE, "{{name}} {{sha256}}"),
]


def dashboard_of(
    name: str, title: str, description: str, variables: Sequence[Variable], rows: Mapping[str, Sequence[Panel]]
) -> models.Dashboard:
    """A board at /d/latentwatch-<name>: titled rows of panels, from left to right."""
    made = (
        dashboard.Dashboard(f"latentwatch / {title}")
        .uid(f"latentwatch-{name}")
        .description(description)
        .tags(["latentwatch"])
        .version(1)
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-3h", "now")
        .link(_other_boards())
        .variables([DATASOURCE, *variables])
    )
    for row, panels in rows.items():
        made.with_row(dashboard.Row(row))
        for panel in panels:
            made.with_panel(panel)
    board = made.build()
    board.annotations = models.AnnotationContainer(ANNOTATIONS)
    for number, placed in enumerate(board.panels or [], start=1):
        placed.id_val = number
    return board


def _other_boards() -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("latentwatch").type(models.DashboardLinkType.DASHBOARDS).tags(["latentwatch"])
    return link.as_dropdown(True).include_vars(True).keep_time(True).icon("external link")
