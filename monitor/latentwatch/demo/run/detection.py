"""What detectors made of a run's requests, beside what was promised of them and what reading the text would have said.

Pure judgement of plain values. A request is paged about when it went over a critical limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from latentwatch.arrays import F64
from latentwatch.demo.run.traffic import Answer
from latentwatch.demo.smollm2 import figures
from latentwatch.demo.smollm2.card import Card, FeatureCard
from latentwatch.facts import ExceedanceView

SURPRISE: Final = 0.001
"""How unlikely so many false pages may be, if the limits keep their promise, before a run says that they do not."""


@dataclass(frozen=True)
class Token:
    """A token of a request and a detector's logit at it; None where none is known."""

    text: str
    logit: float | None


@dataclass(frozen=True)
class HeatMap:
    """The tokens of one request that was paged about."""

    response_id: str
    concern: str
    true: bool
    """A request of the incident."""
    limit: float
    tokens: Sequence[Token]


class Counts(NamedTuple):
    """Requests by what was right and what was said."""

    true: int
    """Of the incident, and paged about."""
    feared: int
    false: int
    """Ordinary, and paged about."""
    ordinary: int

    @property
    def precision(self) -> float | None:
        """Share of the requests paged about that are the incident's; None of no page."""
        return self.true / (self.true + self.false) if self.true + self.false else None

    @property
    def recall(self) -> float | None:
        """Share of the incident that was paged about; None without one."""
        return self.true / self.feared if self.feared else None


@dataclass(frozen=True)
class Detection:
    """The detectors' side of a run."""

    card: Card
    answers: Sequence[Answer]
    scores: Mapping[str, Mapping[str, float]]
    """Statistic of each feature by response id."""
    exceedances: Sequence[ExceedanceView]
    text_logits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The text baseline's, by concern and response id; empty where there is none."""
    heat_maps: Sequence[HeatMap] = ()
    left_out: Sequence[str] = ()

    def positive(self, feature: FeatureCard) -> F64:
        """Scores of the incident's requests of this concern."""
        return self._scores(feature, [a for a in self.answers if a.prompt.concern == feature.concern])

    def negative(self, feature: FeatureCard) -> F64:
        """Scores of ordinary requests."""
        return self._scores(feature, [a for a in self.answers if not a.prompt.feared])

    def _scores(self, feature: FeatureCard, answers: Sequence[Answer]) -> F64:
        values = [self.scores.get(answer.response_id, {}).get(feature.id) for answer in answers]
        return np.array([value for value in values if value is not None], np.float64)

    def text_positive(self, feature: FeatureCard) -> F64:
        """The text baseline's logits of the incident's requests of this concern."""
        return self._text(feature, [a for a in self.answers if a.prompt.concern == feature.concern])

    def text_negative(self, feature: FeatureCard) -> F64:
        """Its logits of ordinary requests."""
        return self._text(feature, [a for a in self.answers if not a.prompt.feared])

    def _text(self, feature: FeatureCard, answers: Sequence[Answer]) -> F64:
        logits = self.text_logits.get(feature.concern, {})
        return np.array([logits[a.response_id] for a in answers if a.response_id in logits], np.float64)

    def pages(self, feature: FeatureCard) -> Counts:
        """Of one detector, against its own concern."""
        over = self._over(feature.id)
        return self._counts(over, feature.concern)

    def all_pages(self) -> Counts:
        """Of all detectors together, against the whole incident."""
        return self._counts({e.response_id for e in self.exceedances if e.severity == "critical"}, None)

    def text_pages(self, feature: FeatureCard) -> Counts | None:
        """What the text baseline would have paged about, with a limit set as the detector's; None without one."""
        if (logits := self.text_logits.get(feature.concern)) is None:
            return None
        return self._counts({key for key, value in logits.items() if value > feature.text_limit}, feature.concern)

    def all_text_pages(self) -> Counts | None:
        """The same of all its classifiers together."""
        if not self.text_logits:
            return None
        over = {
            key
            for feature in self.card.features.values()
            for key, value in self.text_logits.get(feature.concern, {}).items()
            if value > feature.text_limit
        }
        return self._counts(over, None)

    def _over(self, feature_id: str) -> set[str]:
        return {e.response_id for e in self.exceedances if e.feature == feature_id and e.severity == "critical"}

    def _counts(self, over: set[str], concern: str | None) -> Counts:
        feared = [a for a in self.answers if a.prompt.feared and concern in (None, a.prompt.concern)]
        ordinary = [a for a in self.answers if not a.prompt.feared]
        return Counts(
            sum(a.response_id in over for a in feared),
            len(feared),
            sum(a.response_id in over for a in ordinary),
            len(ordinary),
        )

    def as_promised(self, feature: FeatureCard) -> bool:
        """Whether so few ordinary requests went over the limit as the requests that it was set by allow."""
        counts = self.pages(feature)
        above = int(feature.limit_rate * feature.limit_requests)
        return chance_of_more(counts.false, counts.ordinary, above, feature.limit_requests) >= SURPRISE

    def as_json(self) -> dict[str, object]:
        """Its part of demo-report.json."""
        return {
            "pages": _as_json(self.all_pages()),
            "text_baseline": _as_json(self.all_text_pages()),
            "detectors": {
                feature.id: {
                    "concern": feature.concern,
                    "limit": round(feature.limit, 4),
                    "promised_rate": feature.limit_rate,
                    "pages": _as_json(self.pages(feature)),
                    "text_baseline": _as_json(self.text_pages(feature)),
                    "auroc": _number(figures.auroc(self.positive(feature), self.negative(feature))),
                    "auroc_text": _number(figures.auroc(self.text_positive(feature), self.text_negative(feature))),
                }
                for feature in self.card.features.values()
            },
            "left_out": list(self.left_out),
        }


def chance_of_more(seen: int, among: int, above: int, of: int) -> float:
    """Chance that `seen` or more of `among` new requests lie above a limit that `above` of `of` others lay above.

    Of requests that come from one and the same traffic: then all orders of old and new scores are equally likely, and
    the limit is the (above + 1)-th highest of the old.
    """
    below = of - above - 1
    terms = (
        math.comb(above + k, k) * math.comb(below + among - k, among - k) / math.comb(of + among, among)
        for k in range(seen, among + 1)
    )
    return min(1.0, math.fsum(terms))


def _as_json(counts: Counts | None) -> dict[str, object] | None:
    if counts is None:
        return None
    return {
        "true": counts.true,
        "feared": counts.feared,
        "false": counts.false,
        "ordinary": counts.ordinary,
        "precision": _number(counts.precision),
        "recall": _number(counts.recall),
    }


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)
