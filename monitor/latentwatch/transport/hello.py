"""Who sends on a stream: the first thing that its two ends agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from latentwatch.facts import EngineIdentity

PROTOCOL: Final = 1


@dataclass(frozen=True)
class Hello(EngineIdentity):
    """Who sends, and what it scores with. Fields as in proto/latentwatch/v1/stream.proto."""

    forwards: bool = False
    """A collector that sends reports; `replica` is its name, `engine` and `model_name` are empty."""
