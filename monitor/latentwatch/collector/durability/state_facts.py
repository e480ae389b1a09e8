"""How a state is doing on its disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StateFacts:
    """How well the state is kept on a disk; as it stands, for a collector that keeps it in memory only."""

    in_memory: bool = True
    """Nothing is to be kept on a disk."""
    durable: bool = False
    """What is acknowledged from now on survives the death of this process."""
    checkpoint_seconds: float = 0.0
    """When the newest checkpoint was taken, seconds since the Unix epoch; 0 for never."""
    journal_bytes: int = 0
    write_failures: int = 0
    resumed_events: int = 0
    """Events that were read back from the journal at the start."""
    last_error: str = ""
    """Why the last failed write failed, in the system's words; empty where none did."""
    files_aside: int = 0
    """Files of a state that could not be read, or not to their end; nothing reads or removes them."""
