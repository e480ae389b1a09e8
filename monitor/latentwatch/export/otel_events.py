"""Exceedances as OpenTelemetry events, sent over OTLP: one `gen_ai.evaluation.result` for each request and feature.

The event is a log record in the trace of the client's request: its parent is the span of the incoming traceparent. The
server's own span of the request (vLLM's `llm_request`) is made only once the request ended and cannot be named here; it
stands in the same trace and carries the same response id. Attributes follow the GenAI conventions (status Development)
of open-telemetry/semantic-conventions-genai; what they lack is under `latentwatch.`.

An event is sent at least once: after a collector was killed, those of its last seconds may come again.
"""

from __future__ import annotations

import urllib.parse
import uuid
from collections.abc import Sequence
from typing import Any, Final

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExportResult
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from latentwatch import __version__, host
from latentwatch.evidence.records import Exceeded, Record
from latentwatch.evidence.segment import Watched

EVENT_NAME: Final = "gen_ai.evaluation.result"
SCOPE: Final = InstrumentationScope("latentwatch", __version__)
_SEVERITIES: Final = {
    "critical": SeverityNumber.ERROR,
    "warning": SeverityNumber.WARN,
    "info": SeverityNumber.INFO,
    "none": SeverityNumber.INFO,
}
_OF_INSTANCES: Final = uuid.UUID("4d63009a-8d0f-11ee-aad7-4c796ed8e320")
"""The namespace that the semantic conventions name for ids made of what an instance is."""
_TRACE_CONTEXT: Final = TraceContextTextMapPropagator()


def resource(instance: str) -> Resource:
    """This collector; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES of the environment come on top.

    Args: instance: what tells this collector from others and stays over a restart, so that its series go on; empty
          where nothing does, then it is another one after each start.
    """
    named = uuid.uuid5(_OF_INSTANCES, instance) if instance else uuid.uuid4()
    own = {
        "service.name": "latentwatch-collector",
        "service.version": __version__,
        "service.instance.id": str(named),
        "host.name": host.host_name(),
    }
    return Resource({key: value for key, value in own.items() if value}).merge(OTELResourceDetector().detect())


def channel_options(endpoint: str) -> tuple[tuple[str, Any], ...]:
    """Of gRPC: a receiver on this host is reached without the environment's proxy."""
    direct = host.is_loopback(urllib.parse.urlsplit(endpoint).hostname or "")
    return (("grpc.enable_http_proxy", 0),) if direct else ()


class EventSender:
    """A `RecordTarget` of evidence.writer: the writer's thread, bounds and counts stand around it."""

    def __init__(self, endpoint: str, watched: Watched, instance: str = "") -> None:
        """Args: endpoint: http://host:port, or https:// for TLS. Headers and certificates by OTEL_EXPORTER_OTLP_*.
        instance: see `resource`.
        """
        self._exporter = OTLPLogExporter(
            endpoint=endpoint,
            insecure=endpoint.startswith("http://"),
            channel_options=channel_options(endpoint),  # type: ignore[arg-type] # declared as one pair of strings
        )
        self._watched = watched
        self._resource = resource(instance)

    def write(self, records: Sequence[Record], now: float) -> None:
        """Send the events of these records. Raises: ConnectionError: the receiver did not take them in time."""
        made = [self._event(record, now) for record in records if isinstance(record, Exceeded)]
        if made and self._exporter.export(made) is not LogRecordExportResult.SUCCESS:
            raise ConnectionError(f"{len(made)} events were not taken by the OTLP receiver")

    def prune(self, now: float) -> None:
        """Nothing is kept here."""

    def close(self) -> None:
        """Close the channel."""
        self._exporter.shutdown()

    def _event(self, exceeded: Exceeded, now: float) -> ReadableLogRecord:
        request, exceedance = exceeded.request.info, exceeded.exceedance
        feature = self._watched.features[exceedance.feature]
        phase = exceedance.phase.name.lower()
        record = LogRecord(
            timestamp=int(exceedance.seconds * 1e9),
            observed_timestamp=int(now * 1e9),
            # An empty carrier would take over the context of this thread, which is none.
            context=_TRACE_CONTEXT.extract({"traceparent": request.traceparent}),
            severity_number=_SEVERITIES[feature.severity],
            severity_text=feature.severity,
            event_name=EVENT_NAME,
            attributes={
                "gen_ai.evaluation.name": feature.id,
                "gen_ai.evaluation.score.value": exceedance.value,
                "gen_ai.evaluation.score.label": "exceeded",
                "gen_ai.evaluation.explanation": f"{feature.label}: {exceedance.value:.4g} over the limit "
                f"{feature.limit:g} at position {exceedance.position}, {phase}",
                "gen_ai.response.id": request.response_id or request.request_id,
                "gen_ai.request.model": request.model_name,
                "latentwatch.request.id": request.request_id,
                "latentwatch.replica": request.replica,
                "latentwatch.feature.severity": feature.severity,
                "latentwatch.feature.limit": feature.limit or 0.0,
                "latentwatch.token.position": exceedance.position,
                "latentwatch.token.phase": phase,
            },
        )
        return ReadableLogRecord(record, self._resource, SCOPE)
