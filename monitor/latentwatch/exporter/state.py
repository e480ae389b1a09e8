"""What an exporter notes in the checkpoint after each step: how far it came, as whom, and what the ledger knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from latentwatch.exporter.ledger_state import LedgerState
from latentwatch.step.batch import EngineCounters

_SUMS = (
    "shed_batches",
    "reconnects",
    "shed_critical_tokens",
    "shed_warning_tokens",
    "lost_tokens",
    "spool_failures",
)
"""Fields of EngineCounters that each exporter counts from zero."""


@dataclass(frozen=True)
class ExporterState:
    """Of one engine's exporter, between two steps."""

    read: int = 0
    """Steps of the ring."""
    waits: bool = False
    """The last of them waits in the ring for the next one."""
    sequence: int = 0
    """The highest number that was given to a batch."""
    acked: int = 0
    dropped: Sequence[Sequence[int]] = ()
    """Numbers, first and last, of batches that were given up since the last commit, and are in `counters`."""
    forgotten_tokens: int = 0
    """Of batches that were too many for the checkpoint: they wait in the exporter's memory only."""
    forgotten_to: int = 0
    """The highest number of those."""
    counters: EngineCounters = field(default_factory=EngineCounters)
    ledger: LedgerState = field(default_factory=LedgerState)

    def to_bytes(self) -> bytes:
        head = {name: value for name, value in vars(self).items() if name not in ("counters", "ledger")}
        head["counters"] = vars(self.counters)
        return json.dumps(head).encode() + b"\n" + self.ledger.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> ExporterState:
        at = data.index(b"\n") + 1
        head = json.loads(data[:at])
        counters = EngineCounters(**head.pop("counters"))
        return cls(**head, counters=counters, ledger=LedgerState.from_bytes(data[at:]))

    def before(self) -> EngineCounters:
        """What the exporters before counted of what each counts from zero. Of batches that only one's memory had, those
        that nobody acknowledged are lost with it.
        """
        sums = {name: value for name, value in asdict(self.counters).items() if name in _SUMS}
        if self.acked < self.forgotten_to:
            sums["lost_tokens"] += self.forgotten_tokens
        return EngineCounters(**sums)


def added(before: EngineCounters, own: EngineCounters) -> EngineCounters:
    """Both together."""
    return EngineCounters(**{name: value + getattr(before, name) for name, value in vars(own).items()})
