"""The metrics table over OTLP: the same families as /metrics, for a backend that is pushed to.

Names are those of OpenMetrics, without `_total`: a receiver that hands them to Prometheus adds it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Metric as OtelMetric

from latentwatch.export.families import Family
from latentwatch.export.otel_events import SCOPE, channel_options, resource

_CUMULATIVE = AggregationTemporality.CUMULATIVE


class MetricSender:
    """Sends families. One thread at a time."""

    def __init__(self, endpoint: str, instance: str = "") -> None:
        """Args: endpoint: http://host:port, or https:// for TLS. Headers and certificates by OTEL_EXPORTER_OTLP_*.
        instance: see `otel_events.resource`.
        """
        self._exporter = OTLPMetricExporter(
            endpoint=endpoint,
            insecure=endpoint.startswith("http://"),
            channel_options=channel_options(endpoint),  # type: ignore[arg-type] # declared as one pair of strings
        )
        self._resource = resource(instance)

    def send(self, families: Iterable[Family], *, start_seconds: float, now: float) -> bool:
        """Whether the receiver took them. Args: start_seconds: when the counters began at 0."""
        start, at = int(start_seconds * 1e9), int(now * 1e9)
        metrics = [
            OtelMetric(
                family.metric.name if family.metric.kind == "info" else family.metric.family,
                family.metric.help,
                "",
                data,
            )
            for family in families
            if (data := _data(family, start, at)).data_points
        ]
        scope = ScopeMetrics(SCOPE, metrics, "")
        sent = self._exporter.export(MetricsData([ResourceMetrics(self._resource, [scope], "")]))
        return sent is MetricExportResult.SUCCESS

    def close(self) -> None:
        """Close the channel."""
        self._exporter.shutdown()


def _data(family: Family, start: int, at: int) -> Sum | Gauge | Histogram:
    kind = family.metric.kind
    if kind == "histogram":
        return Histogram(list(_histograms(family, start, at)), _CUMULATIVE)
    points = [
        NumberDataPoint(_attributes(family, i), start, at, _number(value)) for i, value in enumerate(family.values)
    ]
    return Sum(points, _CUMULATIVE, is_monotonic=True) if kind == "counter" else Gauge(points)


def _histograms(family: Family, start: int, at: int) -> Iterator[HistogramDataPoint]:
    has_sum = family.sums
    for i, (edges_B, cumulative_B) in enumerate(
        zip(family.edges_SB.tolist(), family.cumulative_SB.tolist(), strict=True)
    ):
        counts = [high - low for low, high in zip([0, *cumulative_B], cumulative_B, strict=False)]
        # OTLP leaves out what is not known: the extremes always, the sum where values of both signs make it no counter.
        unknown: Any = None
        yield HistogramDataPoint(
            attributes=_attributes(family, i),
            start_time_unix_nano=start,
            time_unix_nano=at,
            count=cumulative_B[-1],
            sum=family.sum_S[i] if has_sum[i] else unknown,
            bucket_counts=counts,
            explicit_bounds=edges_B,
            min=unknown,
            max=unknown,
        )


def _attributes(family: Family, series: int) -> dict[str, str]:
    return dict(zip(family.metric.labels, family.labels[series], strict=True))


def _number(value: float) -> float:
    """A plain Python number: numpy's are no protobuf values."""
    return value.item() if hasattr(value, "item") else value
