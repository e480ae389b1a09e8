"""What a collector's process and parts say of themselves, beside its state."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentwatch.collector.durability.state_facts import StateFacts
from latentwatch.collector.evidence import EvidenceFacts
from latentwatch.collector.federation.client import ReportClientFacts
from latentwatch.collector.telemetry import OtlpFacts
from latentwatch.transport.servicer import ReceiverFacts


@dataclass(frozen=True)
class DiskFacts:
    """The disk under one folder of the collector's."""

    folder: str
    """Which option named it: state or evidence."""
    free_bytes: int
    """For this user."""
    size_bytes: int


@dataclass(frozen=True)
class ProcessFacts:
    """What the operating system says of this process."""

    start_seconds: float
    resident_bytes: int | None
    """None where it does not say."""
    cpu_seconds: float
    state: StateFacts = field(default_factory=StateFacts)
    evidence: EvidenceFacts = field(default_factory=EvidenceFacts)
    otlp: OtlpFacts = field(default_factory=OtlpFacts)
    report_client: ReportClientFacts = field(default_factory=ReportClientFacts)
    receiver: ReceiverFacts = field(default_factory=ReceiverFacts)
    disks: tuple[DiskFacts, ...] = ()
    """Under the folders that were given, of those that the system tells of."""
