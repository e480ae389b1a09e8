"""How much each bounded part of a collector holds, and may hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentwatch.evidence.writer import QUEUE_BYTES

if TYPE_CHECKING:
    from latentwatch.collector.process_facts import ProcessFacts
    from latentwatch.collector.snapshot import Snapshot


def fullness(snapshot: Snapshot, process: ProcessFacts) -> tuple[tuple[str, int, int], ...]:
    """Name of the part, which has the unit, what is in it, and its bound."""
    receiver, bounds = process.receiver, snapshot.bounds
    return (
        ("streams", receiver.streams, receiver.max_streams),
        ("merge_queue_messages", receiver.queue.waiting, receiver.max_streams),
        ("replicas", len(snapshot.replicas) + len(snapshot.forwarders), bounds.replicas),
        ("models", len(snapshot.models), bounds.models),
        ("open_requests", snapshot.collector.open_requests, bounds.open_requests),
        ("evidence_queue_bytes", process.evidence.writer.queued_bytes, QUEUE_BYTES),
    )
