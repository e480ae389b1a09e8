"""The two questions that the page answers first, in words: is anything wrong, and is everything seen?

An answer to the first is worth as much as the answer to the second, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from latentwatch.collector.health.cause import COVERAGE_GOAL, FoundCause
from latentwatch.facts import ExceedanceView
from latentwatch.names import ModelMatch, Severity
from latentwatch.watchlist.file import Feature

_POOR_COVERAGE: Final = 0.9
_SAID: Final = ("no_engine", "engine_silent", "engine_not_armed", "model_differs", "coverage_low")
"""Causes that the verdict has words of its own for."""
_RANK: Final = {"ok": 0, "notice": 0, "unknown": 0, "waiting": 1, "attention": 1, "problem": 2}

Level = Literal["ok", "waiting", "attention", "problem"]


@dataclass(frozen=True)
class Verdict:
    """An answer in words."""

    level: Level
    headline: str
    detail: str


@dataclass(frozen=True)
class Coverage:
    """Tokens since the collector started, and how many of them were seen lately."""

    tokens: dict[str, int]
    """By state: scored, inherited, unseen, dropped."""
    missing: dict[str, int]
    """Unseen and dropped ones by reason; zeros left out."""
    seen_ratio: float | None
    """Scored and inherited tokens among all, 0..1; None before the first token."""
    recent_seen_ratio: float | None
    """The same over the windows shown."""
    tokens_per_second: float
    """Over the last five whole windows."""


@dataclass(frozen=True)
class Engine:
    """One engine process."""

    replica: str
    model_name: str
    engine: str
    state: Literal["connected", "not armed", "disconnected"]
    reason: str
    text: str
    last_seen_seconds_ago: float
    open_requests: int
    engine_version: str
    plugin_version: str
    model_match: str
    """same, differs, unknown or not_stated: whether it serves the model that the watchlist states."""
    model_text: str
    """What differs, or was not compared."""


def is_anything_wrong(
    exceeded: Mapping[Severity, int],
    requests: Mapping[Severity, int],
    latest: Sequence[ExceedanceView],
    drifting: Sequence[Feature],
    seen: Verdict,
    minutes: float,
) -> Verdict:
    """What pages, the critical before the rest, and requests before drift.

    Args: exceeded: exceedances in the last `minutes`, by severity.   requests: which those were of, as far as they are
          still listed.   latest: newest first.   drifting: features of which a detector alarms, the strongest first.
    """
    lately = f"in the last {minutes:g} minutes"
    critical = [feature for feature in drifting if feature.severity is Severity.CRITICAL]
    for severity, drifts in ((Severity.CRITICAL, critical), (Severity.WARNING, drifting)):
        level: Level = "problem" if severity is Severity.CRITICAL else "attention"
        if count := exceeded[severity]:
            newest = next((event for event in latest if event.severity is severity), None)
            return Verdict(
                level,
                f"{count:,} {severity} {'exceedance' if count == 1 else 'exceedances'}",
                f"{_in_requests(requests[severity])}{lately}.".capitalize()
                + (f" Latest: {newest.label or newest.feature}." if newest else ""),
            )
        if drifts:
            said = "1 feature drifts" if len(drifting) == 1 else f"{len(drifting):,} features drift"
            return Verdict(level, said, f"From the baseline. Most of all: {drifts[0].label or drifts[0].id}.")
    if seen.level == "waiting":
        return Verdict("waiting", "Nothing to judge yet", "No engine is connected.")
    nothing = f"No critical or warning limit was exceeded {lately}"
    if seen.level == "problem":
        return Verdict("waiting", "Nothing wrong in what was seen", f"{nothing}, but not everything was seen.")
    return Verdict("ok", "Nothing is wrong", f"{nothing}.")


def is_everything_seen(
    coverage: Coverage, engines: Sequence[Engine], minutes: float, causes: Sequence[FoundCause] = ()
) -> Verdict:
    """Whether every token of the last `minutes` was scored, else the first thing to look at.

    Args: causes: what is wrong with the monitor, the worst first; nobody reads "everything is seen" beside a full disk.
    """
    verdict = _of_engines(coverage, engines, minutes)
    worse = [cause for cause in causes if cause.name not in _SAID and _RANK[cause.level] > _RANK[verdict.level]]
    if not worse:
        return verdict
    level: Level = "problem" if worse[0].level == "problem" else "attention"
    return Verdict(level, worse[0].headline, f"{worse[0].found[:1].upper()}{worse[0].found[1:]}".rstrip(".") + ".")


def _of_engines(coverage: Coverage, engines: Sequence[Engine], minutes: float) -> Verdict:
    lately = f"in the last {minutes:g} minutes"
    blind = [engine for engine in engines if engine.state == "not armed"]
    away = [engine for engine in engines if engine.state == "disconnected"]
    recent = coverage.recent_seen_ratio
    if not engines:
        been = any(coverage.tokens.values())
        detail = "The last one left a while ago." if been else "Tokens are counted as soon as one connects."
        return Verdict("waiting", "Waiting for an engine", detail)
    if blind:
        why = blind[0].text or blind[0].reason or "It gave no reason."
        return Verdict("problem", f"{_engines(blind)} not scoring", why)
    if len(away) == len(engines):
        heard = f"{away[0].replica} was last heard {_ago(away[0].last_seen_seconds_ago)} ago"
        return Verdict("problem", "No engine is connected", f"{heard}; the figures are the last known.")
    if others := [engine for engine in engines if engine.model_match == ModelMatch.DIFFERS]:
        detail = (
            f"{others[0].model_text[:1].upper()}{others[0].model_text[1:]}. Its scores are of another model's features."
        )
        return Verdict("attention", f"{others[0].replica} serves another model", detail)
    if recent is not None and recent < COVERAGE_GOAL:
        reasons = ", ".join(reason.replace("_", " ") for reason in coverage.missing)
        detail = f"{lately.capitalize()}. Missing since the start: {reasons}."
        return Verdict(
            "problem" if recent < _POOR_COVERAGE else "attention", f"{_percent(recent)} of tokens seen", detail
        )
    if away:
        return Verdict("attention", f"{_engines(away)} away", f"{away[0].replica} has no stream to this collector.")
    if recent is None:
        return Verdict("ok", "Everything is seen", f"No token came {lately}.")
    return Verdict("ok", "Everything is seen", f"{_percent(recent)} of tokens {lately}.")


def _in_requests(count: int) -> str:
    return f"of {count:,} {'request' if count == 1 else 'requests'} " if count else ""


def _percent(ratio: float) -> str:
    """Rounded down, so that 100 % means all."""
    return f"{int(ratio * 10_000) / 100:g} %"


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _engines(engines: Sequence[Engine]) -> str:
    return f"{engines[0].replica} is" if len(engines) == 1 else f"{len(engines)} engines are"
