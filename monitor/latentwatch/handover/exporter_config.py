"""What an engine's worker tells its exporter, once: JSON in a memory file that both have open.

Both ends are of one installation, so a field that one of them does not know is a mistake and raises.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from latentwatch.facts import EngineIdentity
from latentwatch.handover.ring import Geometry
from latentwatch.names import Reason, Severity


@dataclass(frozen=True)
class WatchedFeature:
    """What a sender that must shed scores has to know of a feature."""

    severity: Severity
    matters_from: float
    """The activation from which on a token is given up last."""
    dense: bool


@dataclass(frozen=True)
class CachedBlocks:
    """The KV cache whose hits inherit scores."""

    blocks: int
    block_size: int
    """tokens"""


@dataclass(frozen=True)
class ExporterConfig:
    """Everything that an exporter does not read from its environment."""

    engine_pid: int
    ring_fd: int
    geometry: Geometry
    collector: str
    """Address, `unix:///path` or `host:port`."""
    drafts: bool
    """Whether steps hold draft tokens that may be rejected."""
    cached_reason: Reason
    """Why a token from the cache has no score of its own."""
    cached_blocks: CachedBlocks | None
    """None: hits inherit nothing."""
    features: tuple[WatchedFeature, ...]
    identity: EngineIdentity

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ExporterConfig:
        told: dict[str, Any] = json.loads(text)
        blocks = told.pop("cached_blocks")
        return cls(
            geometry=Geometry(**told.pop("geometry")),
            cached_reason=Reason(told.pop("cached_reason")),
            cached_blocks=None if blocks is None else CachedBlocks(**blocks),
            features=tuple(
                WatchedFeature(Severity(feature.pop("severity")), **feature) for feature in told.pop("features")
            ),
            identity=EngineIdentity(**told.pop("identity")),
            **told,
        )
