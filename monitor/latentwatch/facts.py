"""The one shape of each fact: who is watched, who a request is, how far it got, what it exceeded, what it showed.

Whoever keeps, sends or shows a fact holds these and adds what only it knows. Times are seconds since the Unix epoch by
the collector's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np

from latentwatch.arrays import Array, axes
from latentwatch.names import Outcome, Phase, Severity, TokenState, trace_id

EXCEEDANCE = np.dtype(
    [
        ("feature", "<u2"),  # index in the watchlist
        ("phase", "u1"),
        ("position", "<i4"),  # of the token, 0 is the first prompt token; for a rolling mean the window's last one
        ("value", "<f8"),  # the statistic there
        ("seconds", "<f8"),
    ]
)
"""The first token at which a request's statistic for a feature went above its limit. Reports hold it: a change is a new
format there."""

FEATURE_STAT = np.dtype(
    [
        ("index", "<i2"),
        ("max", "<f4"),
        ("position", "<i4"),
        ("statistic", "<f4"),  # NaN for none
        ("statistic_position", "<i4"),  # -1 for none
        ("fired", "<i4"),
        ("exceeded", "?"),
    ]
)
"""One feature of a request. Evidence files and reports hold it: a change is a new format there."""

PhaseName = Literal["prompt", "output"]
OutcomeName = Literal["open", "finished", "aborted", "lost"]


IDENTITY_TEXT_CHARACTERS: Final = 512
"""Of each text of an identity that is no label: a collector refuses more, so an engine says no more."""


@dataclass(frozen=True)
class EngineIdentity:
    """Who is watched, by what; each stream to a collector begins with it."""

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
    model_match: str = ""
    """A ModelMatch; empty where nothing was compared, in an engine that is not armed or is older than this."""
    model_text: str = ""
    """What differs, or was not compared."""


@dataclass(frozen=True)
class RequestInfo:
    """Who a request is, as far as it is known."""

    request_id: str
    """The engine's own id; empty while it is unknown, because the request began before this collector."""
    replica: str
    model_name: str
    engine: str
    opened_seconds: float
    opening_seen: bool = False
    """False when it began before this collector, so that its first tokens are missing here."""
    adapter: str = ""
    """LoRA adapter name, empty for the base model."""
    traceparent: str = ""
    """W3C trace context of the client's request, empty where it sent none."""
    prompt_tokens: int | None = None
    response_id: str = ""
    """What its client was answered with, as the server told it; empty where none did (offline, an id unknown here)."""


@dataclass(frozen=True)
class RequestProgress:
    """How a request ended, or how far it is."""

    outcome: Outcome | None
    """None while it is open."""
    closed_seconds: float
    """Of an open request, when it was looked at."""
    tokens: Array
    """Accounted tokens by TokenState value, int64."""
    output_tokens: int | None = None
    total_tokens: int | None = None
    """As the engine reported them at the end."""

    @property
    def is_scored(self) -> bool:
        """Whether any of its tokens has a score."""
        return bool(self.tokens[TokenState.SCORED] or self.tokens[TokenState.INHERITED])


def is_whole(info: RequestInfo, progress: RequestProgress) -> bool:
    """Whether a request ended, was seen from its beginning, and has scores: only then it counts among others."""
    return progress.outcome is not None and info.opening_seen and progress.is_scored


@dataclass(frozen=True)
class FeatureSummary:
    """The features of one request that showed anything, the most abnormal first."""

    rows: Array = field(metadata=axes("features", dtype=FEATURE_STAT))
    exceeded: int
    """Features above their limit, those left out included."""
    left_out: int


@dataclass(frozen=True)
class Exceedance:
    """EXCEEDANCE, one by one."""

    feature: int
    phase: Phase
    position: int
    value: float
    seconds: float

    @classmethod
    def of(cls, record: Any) -> Exceedance:
        """An element of an array of EXCEEDANCE."""
        feature, phase, position, value, seconds = record.item()
        return cls(feature, Phase(phase), position, value, seconds)


# -- as pages and APIs tell them


@dataclass(frozen=True)
class ShownRequest:
    """A request in words and numbers."""

    request_id: str
    response_id: str
    """What the client was answered with; the engine's id where no server told."""
    trace_id: str
    """32 hex digits of the client's traceparent, empty where it sent none."""
    replica: str
    model_name: str
    engine: str
    adapter: str
    outcome: OutcomeName
    opened_seconds: float
    closed_seconds: float | None
    duration_seconds: float | None
    """From its opening to its end, as the collector's clock showed both. None while it is open, where its opening was
    not seen, and where the clock was set back by more than it took."""
    opening_seen: bool
    """False when it began before this collector, so that its first tokens are missing here."""
    prompt_tokens: int | None
    output_tokens: int | None
    total_tokens: int | None
    """As the engine reported them at the end."""
    tokens: Mapping[str, int]
    """As accounted here, by state: scored, inherited, unseen, dropped."""


@dataclass(frozen=True)
class ShownExceedance:
    """The first time that a request's statistic for a feature went above its limit."""

    seconds: float
    request_id: str
    """The engine's id; empty while it is unknown, because the request began before this collector."""
    response_id: str
    trace_id: str
    model_name: str
    feature: str
    label: str
    severity: Severity
    phase: PhaseName
    position: int
    """Token position of the exceedance, 0 is the first prompt token; for a rolling mean the window's last token."""
    value: float
    """The statistic at the exceedance."""
    limit: float


@dataclass(frozen=True)
class ExceedanceView(ShownExceedance):
    """An exceedance of a request that the collector still knows."""

    peak: float
    """The largest value of the statistic so far; final once the request is closed."""
    tail_probability: float | None
    """Share of the baseline's requests with at least `value`; None without a baseline."""


@dataclass(frozen=True)
class ShownFeature:
    """One feature of one request."""

    feature: str
    label: str
    severity: Severity
    units: str
    max: float
    position: int
    fired_tokens: int
    """Tokens on which it fired; 0 for a dense feature, which scores every token."""
    statistic: float | None
    """The limit's statistic, None while there is none (no full window, no token of its phase)."""
    statistic_position: int | None
    limit: float | None
    exceeded: bool


class Described(Protocol):
    """What is said of a watched feature, by a watchlist or by a copy of what it says."""

    @property
    def id(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def severity(self) -> str: ...
    @property
    def units(self) -> str: ...


def shown_exceedance(
    exceedance: Exceedance, feature: Described, limit: float, info: RequestInfo, *, trace: str | None = None
) -> dict[str, Any]:
    """The fields of a ShownExceedance. Args: trace: as of `shown_request`."""
    return {
        "seconds": exceedance.seconds,
        "request_id": info.request_id,
        "response_id": info.response_id or info.request_id,
        "trace_id": trace_id(info.traceparent) if trace is None else trace,
        "model_name": info.model_name,
        "feature": feature.id,
        "label": feature.label,
        "severity": Severity(feature.severity),
        "phase": exceedance.phase.name.lower(),
        "position": exceedance.position,
        "value": exceedance.value,
        "limit": limit,
    }


def shown_features(
    summary: FeatureSummary, features: Sequence[Described], limits: Sequence[float | None]
) -> tuple[ShownFeature, ...]:
    """A summary in words. Args: features, limits: of the watchlist, in its order."""
    return tuple(
        ShownFeature(
            feature=features[index].id,
            label=features[index].label,
            severity=Severity(features[index].severity),
            units=features[index].units,
            max=largest,
            position=position,
            fired_tokens=fired,
            statistic=statistic if statistic_position >= 0 else None,
            statistic_position=statistic_position if statistic_position >= 0 else None,
            limit=limits[index],
            exceeded=exceeded,
        )
        for index, largest, position, statistic, statistic_position, fired, exceeded in summary.rows.tolist()
    )


def _duration_seconds(info: RequestInfo, progress: RequestProgress) -> float | None:
    if progress.outcome is None or not info.opening_seen or progress.closed_seconds < info.opened_seconds:
        return None
    return progress.closed_seconds - info.opened_seconds


def shown_request(info: RequestInfo, progress: RequestProgress, *, trace: str | None = None) -> dict[str, Any]:
    """The fields of a ShownRequest. Args: trace: its trace id, where only that is known of the traceparent."""
    ended = progress.outcome is not None
    return {
        "request_id": info.request_id,
        "response_id": info.response_id or info.request_id,
        "trace_id": trace_id(info.traceparent) if trace is None else trace,
        "replica": info.replica,
        "model_name": info.model_name,
        "engine": info.engine,
        "adapter": info.adapter,
        "outcome": progress.outcome.name.lower() if progress.outcome is not None else "open",
        "opened_seconds": info.opened_seconds,
        "closed_seconds": progress.closed_seconds if ended else None,
        "duration_seconds": _duration_seconds(info, progress),
        "opening_seen": info.opening_seen,
        "prompt_tokens": info.prompt_tokens,
        "output_tokens": progress.output_tokens,
        "total_tokens": progress.total_tokens,
        "tokens": {state.name.lower(): int(progress.tokens[state]) for state in TokenState},
    }
