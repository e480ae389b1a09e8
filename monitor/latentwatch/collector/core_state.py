"""What a checkpoint holds: the state of a collector and of the listeners that have one."""

from __future__ import annotations

from dataclasses import dataclass

from latentwatch.collector.federation.outbox import OutboxState
from latentwatch.collector.state import CollectorStateData
from latentwatch.drift.model import ModelDriftState


@dataclass(frozen=True)
class CoreState:
    """Everything that the next batch or reading depends on, as values that nothing changes."""

    collector: CollectorStateData
    drift: dict[str, ModelDriftState]
    """By model name."""
    outbox: OutboxState | None
    """None where nothing was ever forwarded."""
