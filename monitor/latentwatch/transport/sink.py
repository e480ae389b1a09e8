"""Where a receiver hands what it accepted: the contract of receiver and collector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from latentwatch.step.batch import StepBatch
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import Report


@dataclass(frozen=True)
class ReceivedBatch:
    """A batch, the number that its stream gave it, and the message that said so: whoever stores it encodes nothing."""

    sequence: int
    batch: StepBatch
    message: bytes
    """codec.encode_batch of it, or what decodes to the same."""


@dataclass(frozen=True)
class ReceivedReport:
    """The same for a report."""

    sequence: int
    report: Report
    message: bytes


class Sink(Protocol):
    """Takes what a receiver accepted; collector.ingest implements it. No I/O, no clock."""

    def hello(self, hello: Hello, now: float) -> int:
        """Accept a stream and return the highest sequence already held for its (replica, boot_id), 0 for none.

        Raises: StreamRefused: another watchlist, another protocol, a replica name that cannot be a label.
        """

    def observe(self, hello: Hello, received: ReceivedBatch, now: float) -> None:
        """Take one batch into the state. A sequence at or below the highest one held is a counted duplicate."""

    def merge(self, hello: Hello, received: ReceivedReport, now: float) -> None:
        """Take one report of a collector that forwards, as `observe` takes a batch."""

    def commit(self) -> None:
        """Called before a sender is told what is held: it forgets that then. Never raises."""

    def goodbye(self, hello: Hello, now: float) -> None:
        """The stream of this replica ended, for whatever reason."""
