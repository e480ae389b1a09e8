"""Bounds of the collector: what it keeps, for how long, and from how many engines."""

from __future__ import annotations

from dataclasses import dataclass, fields

from latentwatch.errors import ConfigRefused


@dataclass(frozen=True)
class Bounds:
    """Each bound caps memory; what falls out of one is counted on /metrics."""

    open_requests: int = 4096
    """Requests with running statistics: twice vLLM's usual --max-num-seqs for 8 engines of 256.
    Each costs 13 bytes a feature."""
    evict_after_seconds: float = 60.0
    """When all slots are taken, one that was quiet for so long goes to the newcomer. If none was, the newcomer's tokens
    are counted but it gets no statistics of its own: evicting requests that run would cost more and keep nothing."""
    closed_requests: int = 10_000
    """Request summaries kept after the end, for the API and the page."""
    flagged_requests: int = 2_000
    """Summaries with an exceedance that are kept beyond `closed_requests`: those are the ones that are looked up."""
    summary_features: int = 128
    """Features kept per summary, the most abnormal ones; a summary names how many it left out."""
    exceedances: int = 10_000
    """Exceedance events kept for the API and the page."""
    replicas: int = 256
    """Engine processes known at one time; a further one is refused."""
    models: int = 8
    """Served model names; each has a series per feature, so they are the factor of the series count."""
    feature_samples: int = 300_000
    """Samples on /metrics that have a feature as a label, over all models: 8 models of 1,024 features with all that is
    known of each are 211,900. What is beyond is withheld, and how much is on the page too."""
    boots_per_replica: int = 4
    """Boots whose sequence marks are kept, so that a late resend of an earlier boot is not counted twice."""
    sequence_marks: int = 4096
    """Sequence marks kept of boots that are forgotten otherwise: an engine that was cut off for an hour sends again
    what it was never told had arrived. About 300 bytes each."""
    stream_gone_seconds: float = 600.0
    """Without a stream for so long, a boot's open requests are closed as lost."""
    forward_bytes: int = 32 << 20
    """Rows of ended requests that wait for a gateway, bytes; beyond it the oldest without an exceedance go first."""
    request_idle_seconds: float = 3600.0
    """Without a token for so long, a request is closed as lost: its engine forgot to say how it ended."""
    replica_forgotten_seconds: float = 900.0
    """Without a stream for so long, a replica's health series go: long enough for an alert, and a pod that was replaced
    does not stay for ever."""
    window_seconds: float = 2.0
    """Width of a point on the live page; the page asks as often."""
    windows: int = 180
    """Points kept: six minutes."""

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            if not value > 0:
                raise ConfigRefused(
                    f"bound {bound.name}",
                    found=f"it is {value!r}",
                    instead="Give a number above 0.",
                    reason="config_value",
                )
