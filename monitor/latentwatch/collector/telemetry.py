"""OTLP from a running collector: events of exceedances, and the metrics now and then. Each in a thread of its own."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.evidence.records import Exceeded, Record
from latentwatch.evidence.segment import Watched
from latentwatch.evidence.writer import NOTHING_WRITTEN, Writer, WriterTotals
from latentwatch.export import otlp_environment
from latentwatch.export.families import Family
from latentwatch.export.otlp_environment import FROM_ENVIRONMENT

if TYPE_CHECKING:
    from latentwatch.export.otel_metrics import MetricSender

_QUEUE_BYTES: Final = 4 << 20
"""Some 16,000 events: a receiver may be away for a minute of many, and an old event wakes nobody."""


@dataclass(frozen=True)
class TelemetrySettings:
    """Where OTLP goes."""

    endpoint: str
    """http://host:port or https://host:port of an OTLP receiver that speaks gRPC; "env": as the environment says."""
    metrics_seconds: float = 0.0
    """How often the metrics are sent; 0 sends none, since /metrics has them."""
    instance: str = ""
    """What stays of this collector over a restart, for `service.instance.id`; empty: nothing does."""

    def __post_init__(self) -> None:
        if self.endpoint != FROM_ENVIRONMENT and not self.endpoint.startswith(("http://", "https://")):
            raise ConfigRefused(
                f"--otlp {self.endpoint}",
                found="it is no http:// or https:// address, and not 'env'",
                instead="Give the gRPC port of an OTLP receiver, such as http://127.0.0.1:4317.",
                reason=RefusalReason.OTLP_ENDPOINT,
            )
        if self.metrics_seconds < 0:
            raise ConfigRefused(
                f"--otlp-metrics {self.metrics_seconds:g}",
                found="it is below 0",
                instead="Give seconds between two sendings, or 0 for none.",
                reason=RefusalReason.OTLP_INTERVAL,
            )


@dataclass(frozen=True)
class OtlpFacts:
    """What was sent over OTLP; as it stands, for a collector that sends nothing."""

    events: WriterTotals = NOTHING_WRITTEN
    failed_metrics: int = 0


class Telemetry:
    """What a collector sends over OTLP."""

    def __init__(self, settings: TelemetrySettings, watched: Watched, clock: Callable[[], float]) -> None:
        """Raises: ConfigRefused "package_missing": OpenTelemetry is not installed; "otlp_endpoint"; "tls_unusable"."""
        otlp_environment.check(os.environ)
        endpoint = functools.partial(otlp_environment.endpoint, settings.endpoint, env=os.environ)
        events_to, metrics_to = endpoint("logs"), endpoint("metrics") if settings.metrics_seconds else None
        try:
            from latentwatch.export.otel_events import EventSender
            from latentwatch.export.otel_metrics import MetricSender
        except ImportError as error:
            raise ConfigRefused(
                "--otlp",
                found=f"{error.name} is not installed",
                instead="Run in a clone of the repository: pip install '.[otel]'",
                reason=RefusalReason.PACKAGE_MISSING,
            ) from error
        try:
            events = EventSender(events_to, watched, settings.instance)
            metrics = MetricSender(metrics_to, settings.instance) if metrics_to else None
        except Exception as error:
            # ValueError, or a kind of the library's own: what it could not read of the environment.
            raise ConfigRefused(
                "--otlp with the OTEL_EXPORTER_OTLP_* of the environment",
                found=str(error),
                instead="Correct that variable, or unset it.",
                reason=RefusalReason.OTLP_ENDPOINT,
            ) from error
        self._clock = clock
        self._interval = settings.metrics_seconds
        self._events = Writer(events, name="otlp", queue_bytes=_QUEUE_BYTES, clock=clock)
        self._metrics: MetricSender | None = metrics
        self._sending = ThreadPoolExecutor(1, "otlp-metrics")
        self._failed = 0

    @property
    def pushes(self) -> bool:
        """Whether the metrics are to be sent."""
        return self._metrics is not None

    def put(self, records: Sequence[Record]) -> None:
        """Queue the events of these records."""
        self._events.put([record for record in records if isinstance(record, Exceeded)])

    def wait_for_release(self) -> None:
        """See Writer."""
        self._events.wait_for_release()

    def release(self) -> None:
        """See Writer."""
        self._events.release()

    def facts(self) -> OtlpFacts:
        """Counts for /metrics."""
        return OtlpFacts(self._events.totals(), self._failed)

    async def push(self, families: Callable[[], Iterable[Family]], start_seconds: float) -> None:
        """Send the metrics for ever, where they are to be sent; `families` is called in this loop."""
        loop, sender = asyncio.get_running_loop(), self._metrics
        while sender is not None:
            await asyncio.sleep(self._interval)
            taken, now = list(families()), self._clock()
            send = functools.partial(sender.send, taken, start_seconds=start_seconds, now=now)
            sent = await loop.run_in_executor(self._sending, send)
            self._failed += not sent

    def close(self) -> None:
        """Send what is queued and close the channels; waits for the network, but not long."""
        self._events.close(2.0)
        self._sending.shutdown(wait=False, cancel_futures=True)
        if self._metrics:
            self._metrics.close()
