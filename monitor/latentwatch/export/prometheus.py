"""Prometheus text and OpenMetrics of families, through prometheus_client.

At 1,024 features (20,000 lines) a page takes some tenths of a second: render it where nothing else waits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import Metric, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.openmetrics import exposition as open_metrics_exposition
from prometheus_client.samples import Exemplar

from latentwatch.export.families import ExemplarLine, Family
from latentwatch.export.metrics import Kind

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_EXEMPLAR_CHARACTERS: Final = 128
"""OpenMetrics' bound on the names and values of an exemplar's labels together; prometheus_client looks at it only
where it counts itself."""
_PLAIN_ID: Final = re.compile(r"[A-Za-z0-9._:/@=+-]+")
"""Ids hold the client's text, and parsers differ on quotes in exemplars: no client shall be able to break a scrape."""


@dataclass(frozen=True)
class FamilyCollector:
    """What prometheus_client calls a collector, of one moment."""

    families: Iterable[Family]

    def collect(self) -> Iterator[Metric]:
        """A metric for each family, in their order; one without series still says that it exists."""
        for family in self.families:
            yield _CLIENT_METRICS[family.metric.kind](family)


def render(families: Iterable[Family], *, open_metrics: bool) -> bytes:
    """The whole page."""
    generate = open_metrics_exposition.generate_latest if open_metrics else exposition.generate_latest
    return bytes(generate(FamilyCollector(families)))


def negotiate(accept: str) -> tuple[str, bool]:
    """Content type for an Accept header, and whether it is OpenMetrics; text for everything that does not name it.

    prometheus_client's choose_encoder gives OpenMetrics to who refuses it with q=0, and fails where a version is not
    of numbers.
    """
    for part in accept.split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        if media == "application/openmetrics-text" and "q=0" not in parameters and "q=0.0" not in parameters:
            return OPEN_METRICS, True
    return TEXT, False


def _counter(family: Family) -> Metric:
    made = CounterMetricFamily(family.metric.family, family.metric.help, labels=family.metric.labels)
    exemplars = {series: _exemplar(line) for series, line in family.exemplars.items()}
    for series, (row, value) in enumerate(zip(_rows(family), family.values, strict=True)):
        made.add_metric(row, value, exemplar=exemplars.get(series))
    return made


def _gauge(family: Family) -> Metric:
    made = GaugeMetricFamily(family.metric.family, family.metric.help, labels=family.metric.labels)
    for row, value in zip(_rows(family), family.values, strict=True):
        made.add_metric(row, value)
    return made


def _info(family: Family) -> Metric:
    made = InfoMetricFamily(family.metric.family, family.metric.help, labels=family.metric.labels)
    for row in _rows(family):
        made.add_metric(row, {})
    return made


def _histogram(family: Family) -> Metric:
    made = HistogramMetricFamily(family.metric.family, family.metric.help, labels=family.metric.labels)
    edges, counts = family.edges_SB.tolist(), family.cumulative_SB.tolist()
    for row, bounds, cumulative, total, shown in zip(
        _rows(family), edges, counts, family.sum_S, family.sums, strict=True
    ):
        buckets = list(zip((*map(repr, bounds), "+Inf"), cumulative, strict=True))
        made.add_metric(row, buckets, total if shown else None)
    return made


_CLIENT_METRICS: Final[Mapping[Kind, Callable[[Family], Metric]]] = {
    "counter": _counter,
    "gauge": _gauge,
    "info": _info,
    "histogram": _histogram,
}


def _rows(family: Family) -> Iterator[list[str]]:
    """Values of the labels by series, fit for UTF-8. prometheus_client would leave out a label without a value."""
    for row in family.labels:
        assert len(row) == len(family.metric.labels), (family.metric.name, row)
        yield [value if value.isascii() else value.encode("utf-8", "replace").decode() for value in row]


def _exemplar(line: ExemplarLine) -> Exemplar:
    """With those of its labels that are plain ids and, in their order, fit the standard's bound."""
    room, shown = _EXEMPLAR_CHARACTERS, {}
    for name, value in line.labels:
        if _PLAIN_ID.fullmatch(value) and len(name) + len(value) <= room:
            room -= len(name) + len(value)
            shown[name] = value
    return Exemplar(shown, line.value, line.seconds)
