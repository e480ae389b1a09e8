"""Who sends on a stream: the first thing that its two ends agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
