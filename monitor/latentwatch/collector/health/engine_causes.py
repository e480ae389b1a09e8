"""Causes by which tokens are not scored, or what was scored does not arrive. Pure functions of the facts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from latentwatch.collector.fullness import fullness
from latentwatch.collector.health.cause import COVERAGE_GOAL, Cause, HealthFacts, duration, listed
from latentwatch.errors import RefusalReason

SILENT_SECONDS: Final = 60.0
_LATE_SHARE: Final = 0.01
_FULL_SHARE: Final = 0.9
_WAIT_SECONDS: Final = 5.0
_MISMATCH: Final = RefusalReason.WATCHLIST_MISMATCH
_HARMLESS: Final = (_MISMATCH, RefusalReason.SUPERSEDED)
"""The first has a cause of its own; by the second an engine replaced a stream of its own."""


def _no_engine(facts: HealthFacts) -> str:
    return "" if facts.snapshot.replicas else "no engine streams here, and none did in the last 15 minutes"


def _silent(facts: HealthFacts) -> str:
    now = facts.snapshot.now
    silent = [one for one in facts.snapshot.replicas if now - one.last_seen_seconds > SILENT_SECONDS]
    return _each(f"{one.replica} was last heard {duration(now - one.last_seen_seconds)} ago" for one in silent)


def _not_armed(facts: HealthFacts) -> str:
    blind = [one for one in facts.snapshot.replicas if not one.armed]
    return _each(f"{one.replica}: {one.not_armed_text or one.not_armed_reason or 'it gave no reason'}" for one in blind)


def _mismatch(facts: HealthFacts) -> str:
    return _refused(facts, facts.rose("refused").get(_MISMATCH, 0), (_MISMATCH,))


def _stream_refused(facts: HealthFacts) -> str:
    risen = {reason: count for reason, count in facts.rose("refused").items() if reason not in _HARMLESS}
    return _refused(facts, sum(risen.values()), tuple(risen))


def _refused(facts: HealthFacts, times: float, reasons: tuple[str, ...]) -> str:
    """How often, for what, and the latest in full: of a mismatch that names both hashes."""
    if not times:
        return ""
    known = {refusal.reason: refusal for refusal in facts.process.receiver.refusals}
    latest = max((known[reason] for reason in reasons if reason in known), key=lambda one: one.seconds, default=None)
    return f"{times:.0f} times lately ({listed(reasons)})" + (f"; the latest: {latest.text}" if latest else "")


def _coverage(facts: HealthFacts) -> str:
    if facts.seen_ratio is None or facts.seen_ratio >= COVERAGE_GOAL:
        return ""
    most = sorted(facts.missing, key=lambda reason: -facts.missing[reason])
    seen = f"{facts.seen_ratio:.2%} of the tokens of the last minutes were seen"
    return f"{seen}; missing since the start: {listed(most)}"


def _dropped(facts: HealthFacts) -> str:
    return _each(f"{count:.0f} lately, {reason}" for reason, count in facts.rose("dropped_tokens").items())


def _books_lost(facts: HealthFacts) -> str:
    return _each(f"{count:.0f} tokens of {replica} lately" for replica, count in facts.rose("lost_tokens").items())


def _untracked(facts: HealthFacts) -> str:
    count = facts.rose("requests_evicted").get("", 0)
    return f"{count:.0f} requests lately had no statistics of their own: more ran than fit" if count else ""


def _excess(facts: HealthFacts) -> str:
    count = facts.rose("excess_tokens").get("", 0)
    return f"{count:.0f} tokens lately beyond what the engine reported" if count else ""


def _exporters(facts: HealthFacts) -> str:
    return _each(f"{replica}, {count:.0f} times lately" for replica, count in facts.rose("exporter_restarts").items())


def _unattributed(facts: HealthFacts) -> str:
    return _each(f"{count:.0f} rows of {replica} lately" for replica, count in facts.rose("unattributed_rows").items())


def _spool(facts: HealthFacts) -> str:
    failed = {**facts.rose("spool_failures"), **facts.rose("spool_refused")}
    return _each(f"{replica}, {count:.0f} times lately" for replica, count in failed.items())


def _late(facts: HealthFacts) -> str:
    late, steps = facts.rose("late_steps").get("", 0), facts.rose("steps").get("", 0)
    if not steps or late / steps <= _LATE_SHARE:
        return ""
    return f"{late / steps:.0%} of the steps of the last minutes arrived more than 5 s after they were computed"


def _full(facts: HealthFacts) -> str:
    rows = [
        f"{name} {depth:.0f} of {capacity:.0f}"
        for name, depth, capacity in fullness(facts.snapshot, facts.process)
        if capacity and depth > _FULL_SHARE * capacity
    ]
    oldest = facts.process.receiver.queue.oldest_seconds
    return listed(rows + ([f"a message waits for {oldest:.0f} s"] if oldest > _WAIT_SECONDS else []), 6)


def _sidecars(facts: HealthFacts) -> str:
    now = facts.snapshot.now
    silent = [one for one in facts.snapshot.forwarders if now - one.last_seen_seconds > SILENT_SECONDS]
    return _each(f"{one.collector} was last heard {duration(now - one.last_seen_seconds)} ago" for one in silent)


def _gateway(facts: HealthFacts) -> str:
    if facts.snapshot.forward is None or facts.process.report_client.connected:
        return ""
    oldest = facts.snapshot.forward.oldest_seconds
    since = f"; the oldest report waits for {duration(facts.snapshot.now - oldest)}" if oldest else ""
    return f"it does not answer{since}"


def _shed(facts: HealthFacts) -> str:
    rows = {"this collector": facts.rose("forward_shed").get("", 0), **facts.rose("forwarder_shed")}
    return _each(f"{count:.0f} requests of {who} lately" for who, count in rows.items() if count)


def _each(words: Iterable[str]) -> str:
    return listed(words)


CAUSES: Final = (
    Cause(
        "no_engine",
        "engines",
        "problem",
        "No engine streams here",
        _no_engine,
        "Start vLLM with LATENTWATCH_WATCHLIST and LATENTWATCH_COLLECTOR; look for 'latentwatch' in its log.",
        alert="LatentwatchNoEngine",
    ),
    Cause(
        "engine_silent",
        "engines",
        "problem",
        "An engine no longer reports",
        _silent,
        "Does it serve? Is its exporter process alive?",
        alert="LatentwatchReplicaSilent",
    ),
    Cause(
        "engine_not_armed",
        "engines",
        "problem",
        "An engine serves without scoring",
        _not_armed,
        "Mend what it says and start the engine again.",
        alert="LatentwatchEngineNotArmed",
    ),
    Cause(
        RefusalReason.WATCHLIST_MISMATCH.value,
        "engines",
        "problem",
        "Engines that score with another watchlist are refused",
        _mismatch,
        "Start engines and collector with the same watchlist file.",
        alert="LatentwatchWatchlistMismatch",
    ),
    Cause(
        "stream_refused",
        "engines",
        "attention",
        "Streams or requests are refused",
        _stream_refused,
        "The runbook has each reason.",
        alert="LatentwatchStreamRefused",
    ),
    Cause(
        "coverage_low",
        "engines",
        "problem",
        "Tokens go unwatched",
        _coverage,
        "The runbook has each reason.",
        alert="LatentwatchCoverageLow",
    ),
    Cause(
        "tokens_dropped",
        "engines",
        "attention",
        "Scores are lost on their way",
        _dropped,
        "The runbook has each reason.",
        alert="LatentwatchTokensDropped",
    ),
    Cause(
        "books_lost",
        "engines",
        "problem",
        "A sender gave up tokens with their books, which coverage does not count",
        _books_lost,
        "The collector was away for longer than the buffer lasts: give engines a spool, or the buffer more room.",
    ),
    Cause(
        "requests_untracked",
        "engines",
        "problem",
        "Requests run without statistics of their own",
        _untracked,
        "Run another collector for some of the engines.",
        alert="LatentwatchRequestsUntracked",
    ),
    Cause(
        "accounting_broken",
        "engines",
        "attention",
        "More tokens are counted than the engine reported",
        _excess,
        "That is a bug of latentwatch: report it with the versions and the engine's options.",
        alert="LatentwatchAccountingBroken",
    ),
    Cause(
        "rows_unattributed",
        "engines",
        "attention",
        "Rows came of requests that the exporter did not know",
        _unattributed,
        "After a restart of the exporter it passes; otherwise report it as a bug.",
    ),
    Cause(
        "exporter_restarts",
        "engines",
        "attention",
        "An exporter process dies and is started again",
        _exporters,
        "The engine's log says how it ended: look for memory limits and signals.",
    ),
    Cause(
        "spool_failing",
        "engines",
        "attention",
        "An engine's spool cannot be used",
        _spool,
        "Free space on the disk of LATENTWATCH_SPOOL, or restore it; scores wait in memory meanwhile.",
    ),
    Cause(
        "ingest_late",
        "engines",
        "attention",
        "Scores arrive late",
        _late,
        "Look at the collector's CPU and the network. Without load it is an engine's clock that is behind.",
        alert="LatentwatchIngestLagHigh",
    ),
    Cause(
        "nearly_full",
        "engines",
        "attention",
        "A bound of the collector is nearly reached",
        _full,
        "Run another collector for some of the engines.",
    ),
    Cause(
        "sidecar_silent",
        "engines",
        "problem",
        "A collector that forwards here no longer reports",
        _sidecars,
        "Is it alive, and does its --forward-to lead here?",
    ),
    Cause(
        "gateway_away",
        "engines",
        "problem",
        "The gateway of --forward-to is away",
        _gateway,
        "Start it, or correct the address; counts wait for it and none is lost.",
    ),
    Cause(
        "reports_shed",
        "engines",
        "attention",
        "The gateway cannot show every request",
        _shed,
        "It was away for longer than the rows of requests fit in memory; counts are whole.",
    ),
)
