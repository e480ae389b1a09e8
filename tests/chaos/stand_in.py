"""What a test tells a stand-in for an engine. Apart from it, so that collectors need not import what an engine does."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

SPARSE, DENSE, HOOKS = 32, 1, 1


@dataclass(frozen=True)
class Config:
    """What one engine process is told."""

    collector: str
    watchlist_sha256: str
    steps_file: str
    """Where the times of its steps go: float64 [steps, 3], seconds: begin, the model's part, the whole."""
    replica: str = "chaos/0"
    requests: int = 8
    steps_per_second: float = 100.0
    restart_seconds: float = 0.05
    """What an exporter that dies again and again is waited for at most; in production a minute."""
    stuck_seconds: float = 120.0
    """exporter_process.STUCK_SECONDS."""
    max_owed: int = 4096
    """step_tap.MAX_OWED."""
    slot_rows: int = 48
    """Rows that a slot of the ring has room for: the more, the fewer slots."""
    seed: int = 0


def arguments(config: Config) -> list[str]:
    """The command line of an engine process."""
    return [sys.executable, "-m", "tests.chaos.engine", json.dumps(asdict(config))]
