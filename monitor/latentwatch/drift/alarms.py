"""What an alarm says: which features, which way, by how much, since when, and whether the model or its input moved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from latentwatch.drift.common import COMMON, RISE

if TYPE_CHECKING:
    from latentwatch.drift.detection import CommonReading

_NAMED: Final = 5
"""Features that a sentence names."""
_SDS: Final = 1.96


@dataclass(frozen=True)
class TopRequest:
    """A request that showed much of a feature."""

    request_id: str
    value: float
    seconds: float


@dataclass(frozen=True)
class Alarm:
    """One detector above its limit, and what is known about it."""

    feature: str
    """Empty for kind "common", which is of all of them."""
    kind: str
    direction: Literal["up", "down"]
    """Of the rate; for kind "shape" of the values."""
    log10_evalue: float
    log10_limit: float
    since_seconds: float
    """When the change began, by the detector's own estimate."""
    rate_ratio: float | None
    """Active requests / those that the baseline expects; since the change for kind "rate", else lately."""
    rate_ratio_low: float | None
    rate_ratio_high: float | None
    replica: str
    """The replica that differs; empty unless kind is "replica"."""
    partner: str
    """The feature that it fires with; empty unless kind is "coactivation"."""
    canary_moved: bool | None
    """Whether the same prompts score differently, that is, the model moved and not the traffic; None without canary."""
    requests: list[TopRequest]
    """With the largest values of the last hour or two."""
    stand_out: list[str] = field(default_factory=list)
    """Of kind "common": features that drift beyond what all do, the strongest first."""
    text: str = ""


def common_alarm(reading: CommonReading, stand_out: Sequence[str], canary_moved: bool | None) -> Alarm:
    """The one alarm of a movement that all features have in common."""
    moved = reading.movement
    reach = _SDS * moved.sd
    return with_text(
        Alarm(
            feature="",
            kind=COMMON,
            direction="up" if reading.direction == RISE else "down",
            log10_evalue=reading.log10_evalue,
            log10_limit=reading.log10_limit,
            since_seconds=reading.since_seconds,
            rate_ratio=math.exp(moved.seen_log_ratio),
            rate_ratio_low=finite(math.exp(moved.seen_log_ratio - reach)),
            rate_ratio_high=finite(math.exp(moved.seen_log_ratio + reach)),
            replica="",
            partner="",
            canary_moved=canary_moved,
            requests=[],
            stand_out=list(stand_out),
        )
    )


def with_text(alarm: Alarm) -> Alarm:
    """The same, saying in words what it is."""
    return dataclasses.replace(alarm, text=sentence(alarm))


def sentence(alarm: Alarm) -> str:
    """One alarm in words: what changed, by how much, and whether the model or its input did."""
    cause = {
        None: "No canary runs, so this does not tell the model from its input.",
        True: "The canary moved too: the model, its weights or its configuration changed.",
        False: "The canary did not move: the input changed, not the model.",
    }[alarm.canary_moved]
    return f"{_common(alarm) if alarm.kind == COMMON else _of_feature(alarm)}. {cause}"


def _of_feature(alarm: Alarm) -> str:
    up = alarm.direction == "up"
    what = {
        "rate": f"fires in {'more' if up else 'fewer'} requests,{_ratio(alarm, 'its baseline')}",
        "shape": f"fires with {'larger' if up else 'smaller'} values than in the baseline",
        "replica": f"fires in {'more' if up else 'fewer'} requests on replica {alarm.replica} than on the others",
        "coactivation": f"fires together with {alarm.partner} more often than the rates of the two explain",
        "canary": "scores otherwise on prompts that have not changed",
    }[alarm.kind]
    return f"{alarm.feature} {what}"


def _common(alarm: Alarm) -> str:
    more = f", and {len(alarm.stand_out) - _NAMED} more" if len(alarm.stand_out) > _NAMED else ""
    beyond = f"{', '.join(alarm.stand_out[:_NAMED])}{more} beyond that" if alarm.stand_out else "none beyond the others"
    way = "more" if alarm.direction == "up" else "fewer"
    return f"All features together fire in {way} requests,{_ratio(alarm, 'their baseline')}; {beyond}"


def _ratio(alarm: Alarm, of_what: str) -> str:
    if alarm.rate_ratio is None:
        return ""
    low, high = alarm.rate_ratio_low, alarm.rate_ratio_high
    between = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    return f" at {alarm.rate_ratio:.2f} times {of_what}{between}"


def finite(value: float) -> float | None:
    """None for what JSON has no number for."""
    return float(value) if math.isfinite(value) else None
