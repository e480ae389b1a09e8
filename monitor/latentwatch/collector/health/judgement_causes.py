"""Causes by which a score, a rate or a time is worth less than it looks. Pure functions of the facts."""

from __future__ import annotations

from typing import Final

from latentwatch.collector.health.cause import Cause, HealthFacts, duration, listed
from latentwatch.names import ModelMatch

OLD_SECONDS: Final = 30 * 86_400.0
_AHEAD_SECONDS: Final = 1.0
_NO_BASELINE: Final = "no_baseline"


def _model_differs(facts: HealthFacts) -> str:
    others = [one for one in facts.snapshot.replicas if one.model_match == ModelMatch.DIFFERS]
    return listed(f"{one.replica}: {one.model_text or 'it does not say what differs'}" for one in others)


def _stale(facts: HealthFacts) -> str:
    stale = [model for model in facts.snapshot.drift if not model.armed and model.reason != _NO_BASELINE]
    return listed(f"{model.model_name}: {model.reason}" for model in stale)


def _old(facts: HealthFacts) -> str:
    ages = {m.model_name: facts.snapshot.now - m.baseline_created_seconds for m in facts.snapshot.drift if m.armed}
    known = {m.model_name for m in facts.snapshot.drift if m.baseline_created_seconds}
    return listed(f"{name}: {duration(age)}" for name, age in ages.items() if name in known and age > OLD_SECONDS)


def _none(facts: HealthFacts) -> str:
    return listed(model.model_name for model in facts.snapshot.drift if model.reason == _NO_BASELINE)


def _gate(facts: HealthFacts) -> str:
    models = {one.model_name for one in facts.snapshot.replicas}
    return f"no record says how well the features of {listed(sorted(models))} do here" if models else ""


def _clock(facts: HealthFacts) -> str:
    snapshot = facts.snapshot
    ahead = [(one.replica, one.clock_ahead_seconds) for one in snapshot.replicas]
    ahead += [(one.collector, one.clock_ahead_seconds) for one in snapshot.forwarders]
    return listed(f"that of {name} by {seconds:.1f} s or more" for name, seconds in ahead if seconds > _AHEAD_SECONDS)


CAUSES: Final = (
    Cause(
        "model_differs",
        "judgement",
        "attention",
        "An engine serves another model than the watchlist was built for",
        _model_differs,
        "Build the watchlist for the model that is served, or serve the one that it states.",
        alert="LatentwatchModelDiffers",
    ),
    Cause(
        "baseline_stale",
        "judgement",
        "attention",
        "Drift is not measured: the baseline is of something else",
        _stale,
        "Calibrate one for the model as it is served.",
        alert="LatentwatchBaselineStale",
    ),
    Cause(
        "baseline_old",
        "judgement",
        "attention",
        "Drift is measured against an old baseline",
        _old,
        "Bring it up to date with 'latentwatch calibrate --update'.",
        alert="LatentwatchBaselineOld",
    ),
    Cause(
        "baseline_none",
        "judgement",
        "notice",
        "Drift is not measured: there is no baseline",
        _none,
        "Make one of traffic that you trust with 'latentwatch calibrate'.",
        alert="",
        why_no_alert="a choice of who starts it, not an event",
    ),
    Cause(
        "gate_missing",
        "judgement",
        "unknown",
        "Nobody can say how reliable the features are on this model",
        _gate,
        "Read a feature above its limit as a reason to look, not as a finding.",
        alert="",
        why_no_alert="no version writes such a record yet",
    ),
    Cause(
        "clock_skew",
        "judgement",
        "attention",
        "A clock is ahead of this collector's",
        _clock,
        "Synchronise the clocks of both hosts: times, lag and baselines go by them.",
    ),
)
