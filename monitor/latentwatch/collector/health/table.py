"""The table: every cause there is, and which of them are so now.

It feeds /healthz?verbose, the live page, `latentwatch doctor` and, as latentwatch_health_cause, the alert rules. A test
walks each row through all four.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from latentwatch.collector.health import engine_causes, judgement_causes, storage_causes
from latentwatch.collector.health.cause import Cause, FoundCause, HealthFacts, Level

CAUSES: Final[Mapping[str, Cause]] = {
    cause.name: cause for cause in (*engine_causes.CAUSES, *storage_causes.CAUSES, *judgement_causes.CAUSES)
}
_ORDER: Final[tuple[Level, ...]] = ("problem", "attention", "unknown", "notice")


def found_causes(facts: HealthFacts) -> list[FoundCause]:
    """Those that are so, the worst first, then in the order of the data path."""
    found = []
    for cause in CAUSES.values():
        if text := cause.found(facts):
            found.append(
                FoundCause(cause.name, cause.part, cause.level, cause.headline, text, cause.instead, cause.alert)
            )
    return sorted(found, key=lambda one: _ORDER.index(one.level))
