"""An OTLP receiver: a real gRPC server in this process, with the services of the OpenTelemetry protocol."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class OtlpReceiver(
    logs_service_pb2_grpc.LogsServiceServicer,
    metrics_service_pb2_grpc.MetricsServiceServicer,
    trace_service_pb2_grpc.TraceServiceServicer,
):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.url = ""
        self.logs: list[Any] = []
        self.metrics: list[Any] = []
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.headers: list[dict[str, Any]] = []
        self.shown: list[str] = []
        """Names on the certificates that senders showed."""

    def Export(self, request: Any, context: Any) -> Any:
        self.headers.append({item.key: item.value for item in context.invocation_metadata()})
        self.shown += [name.decode() for name in context.auth_context().get("x509_common_name", [])]
        if isinstance(request, logs_service_pb2.ExportLogsServiceRequest):
            for part in request.resource_logs:
                self.resources.append(attributes(part.resource))
                self.logs += [record for scope in part.scope_logs for record in scope.log_records]
            return logs_service_pb2.ExportLogsServiceResponse()
        if isinstance(request, metrics_service_pb2.ExportMetricsServiceRequest):
            self.resources += [attributes(part.resource) for part in request.resource_metrics]
            self.metrics.append(
                {m.name: m for part in request.resource_metrics for scope in part.scope_metrics for m in scope.metrics}
            )
            return metrics_service_pb2.ExportMetricsServiceResponse()
        self.spans += [s for part in request.resource_spans for scope in part.scope_spans for s in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def otlp_receiver(credentials: grpc.ServerCredentials | None = None) -> Iterator[OtlpReceiver]:
    """One on a port of this host; over TLS with credentials."""
    receiver, server = OtlpReceiver(), grpc.server(futures.ThreadPoolExecutor(8))
    logs_service_pb2_grpc.add_LogsServiceServicer_to_server(receiver, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(receiver, server)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    if credentials is None:
        receiver.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    else:
        receiver.url = f"https://127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(0)


def attributes(of: Any) -> dict[str, Any]:
    """The attributes of a resource, record, span or point as plain values."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in of.attributes}
