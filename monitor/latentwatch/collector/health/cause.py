"""A row of the table of health causes, and what it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from latentwatch.collector.process_facts import ProcessFacts
    from latentwatch.collector.snapshot import Snapshot


Part = Literal["engines", "storage", "judgement"]
"""What suffers: that tokens are scored and arrive, that what was found is stored, what a score or a rate is worth."""
Level = Literal["problem", "attention", "notice", "unknown"]
"""Something is lost now; somebody should look; a choice that somebody should know of; nobody can say."""
HEALTH_ALERT: Final = "LatentwatchHealth"
"""The rule on latentwatch_health_cause, for causes that no other rule is on."""
COVERAGE_GOAL: Final = 0.999
"""The share of tokens seen below which something is missing; the objective of the coverage alert."""
_NAMED: Final = 3


@dataclass(frozen=True)
class HealthFacts:
    """Everything that the causes look at, at one moment."""

    snapshot: Snapshot
    process: ProcessFacts
    recent: Mapping[tuple[str, str], float]
    """By how much counts rose in the last minutes; see recent_counts."""
    seen_ratio: float | None
    """Tokens scored or inherited among those of the windows of the live page; None without tokens."""
    missing: Mapping[str, int]
    """Tokens that were not, since the start, by reason."""

    def rose(self, name: str) -> dict[str, float]:
        """Of one count, by label, what rose; the most first."""
        risen = {label: value for (of, label), value in self.recent.items() if of == name and value > 0}
        return dict(sorted(risen.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Cause:
    """Something that may be wrong. A row says once what it is, when it is so, what to do and which alert says it."""

    name: str
    part: Part
    level: Level
    headline: str
    """What is so, in a few words."""
    found: Callable[[HealthFacts], str]
    """Who and how much, in a sentence; empty where it is not so. Pure."""
    instead: str
    """What to do."""
    alert: str = HEALTH_ALERT
    """The rule that fires on it; empty where none does."""
    why_no_alert: str = ""


@dataclass(frozen=True)
class FoundCause:
    """A cause that is so now."""

    name: str
    part: Part
    level: Level
    headline: str
    found: str
    instead: str
    alert: str
    """The entry of the runbook; empty where there is none."""


def listed(words: Iterable[str], most: int = _NAMED) -> str:
    """The first of them, and how many more there are."""
    every = list(words)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def duration(seconds: float) -> str:
    """As people say it."""
    for most, unit, word in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < most:
            return f"{seconds / unit:.0f} {word}"
    return f"{seconds / 86_400:.0f} days"
