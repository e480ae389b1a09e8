"""What two ends of a stream say to each other, as plain values: the contract of sender, receiver and collector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from latentwatch.step.batch import StepBatch

if TYPE_CHECKING:
    from latentwatch.transport.report import Report

PROTOCOL: Final = 1


@dataclass(frozen=True)
class Hello:
    """Who sends, and what it scores with. Fields as in proto/latentwatch/v1/stream.proto."""

    replica: str
    boot_id: str
    engine: str
    model_name: str
    watchlist_sha256: str
    armed: bool
    not_armed_reason: str
    not_armed_text: str
    plugin_version: str
    engine_version: str
    forwards: bool = False
    """A collector that sends reports; `replica` is its name, `engine` and `model_name` are empty."""


class Sink(Protocol):
    """Where a receiver hands what it accepted; the collector's pipeline implements it. No I/O, no clock."""

    def hello(self, hello: Hello, now: float) -> int:
        """Accept a stream and return the highest sequence already held for its (replica, boot_id), 0 for none.

        Raises: StreamRefused: another watchlist, another protocol, a replica name that cannot be a label.
        """

    def observe(self, hello: Hello, sequence: int, batch: StepBatch, now: float) -> None:
        """Take one batch into the state. A sequence at or below the highest one held is a counted duplicate."""

    def merge(self, hello: Hello, sequence: int, report: Report, now: float) -> None:
        """Take one report of a collector that forwards, as `observe` takes a batch."""

    def commit(self) -> None:
        """Called before a sender is told what is held: it forgets that then. Never raises."""

    def goodbye(self, hello: Hello, now: float) -> None:
        """The stream of this replica ended, for whatever reason."""
