"""What a demo run saw, and whether the invariants held. Pure values and judgements; no I/O.

Times are seconds since the Unix epoch, all from this machine's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from latentwatch.demo.run.detection import Detection
from latentwatch.demo.run.traffic import Answer
from latentwatch.demo.run.watch import EngineTokens, Sample
from latentwatch.demo.run.webhook import Page
from latentwatch.facts import ExceedanceView
from latentwatch.names import TokenState
from latentwatch.watchlist.file import Feature

PAGING_ALERT = "LatentwatchCriticalExceedance"
PAGER = "pager"
"""Receiver of pages in the sample Alertmanager configuration."""


@dataclass(frozen=True)
class Moments:
    """The way of the first anomalous token. None: it was not reached, or not shown."""

    sent_at: float
    """The client sent the request."""
    token_at: float
    """The client received the anomalous output token, or sent the anomalous prompt token."""
    metrics_at: float | None
    rule_at: float | None
    page_at: float | None


@dataclass(frozen=True)
class Check:
    """One thing that had to hold."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True)
class Run:
    """Everything that a demo run saw."""

    started_at: float
    traffic_at: float
    incident_planned: tuple[float, float]
    """Begin and end of the incident phase in the plan."""
    answers: Sequence[Answer]
    exceedances: Sequence[ExceedanceView]
    samples: Sequence[Sample]
    """The collector's /metrics during the traffic, in order; the last one is the settled state."""
    scores: Mapping[str, Mapping[str, float]]
    """Statistic of each feature by response id, as the collector's API tells it."""
    features: Sequence[Feature]
    engine: EngineTokens
    pages: Sequence[Page]
    paging: str
    """Empty where Prometheus and Alertmanager ran, else why there is no page step."""
    versions: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""
    """What the run does and does not show."""
    detection: Detection | None = None
    """What was promised of the detectors, and how they did; None where nothing was promised."""

    @cached_property
    def by_id(self) -> Mapping[str, Answer]:
        return {answer.response_id: answer for answer in self.answers}

    @cached_property
    def incident(self) -> tuple[float, float]:
        """From sending the first feared request to the last token of the last one."""
        feared = [answer for answer in self.answers if answer.prompt.feared]
        if not feared:
            return self.incident_planned
        return min(answer.sent_at for answer in feared), max(answer.finished_at for answer in feared)

    def is_inside(self, exceedance: ExceedanceView) -> bool:
        """Whether a feared request caused it. Ordinary requests that run in the incident's window are outside."""
        answer = self.by_id.get(exceedance.response_id)
        return answer is not None and answer.prompt.feared

    @cached_property
    def inside(self) -> Sequence[ExceedanceView]:
        return [exceedance for exceedance in self.exceedances if self.is_inside(exceedance)]

    @cached_property
    def outside(self) -> Sequence[ExceedanceView]:
        return [exceedance for exceedance in self.exceedances if not self.is_inside(exceedance)]

    @cached_property
    def caught(self) -> int:
        """Feared requests with at least one critical exceedance."""
        return len({exceedance.response_id for exceedance in self.inside if exceedance.severity == "critical"})

    @cached_property
    def moments(self) -> Moments | None:
        """The way of the earliest critical exceedance's token; None where there was none whose time is known."""
        found = [
            (received, self.by_id[exceedance.response_id].sent_at)
            for exceedance in self.inside
            if exceedance.severity == "critical"
            and (received := self.by_id[exceedance.response_id].received_at(exceedance.position)) is not None
        ]
        if not found:
            return None
        token_at, sent_at = min(found)
        # False alarms before the incident must not count as its detection.
        before = max((sample.critical for sample in self.samples if sample.at <= token_at), default=0)
        metrics_at = (sample.at for sample in self.samples if sample.at > token_at and sample.critical > before)
        pages = (page for page in self.pages if page.alert == PAGING_ALERT and page.at > token_at)
        first_page = next(pages, None)
        return Moments(
            sent_at=sent_at,
            token_at=token_at,
            metrics_at=next(metrics_at, None),
            rule_at=None if first_page is None else first_page.starts_at,
            page_at=None if first_page is None else first_page.at,
        )

    @property
    def seconds_to_metrics(self) -> float | None:
        """From the first anomalous token to /metrics; None where it was not reached."""
        moments = self.moments
        return None if moments is None or moments.metrics_at is None else moments.metrics_at - moments.token_at

    @property
    def seconds_to_page(self) -> float | None:
        """From the first anomalous token to the webhook; None where it was not reached or not shown."""
        moments = self.moments
        return None if moments is None or moments.page_at is None else moments.page_at - moments.token_at

    @property
    def settled(self) -> Sample:
        return self.samples[-1]

    def checks(self) -> list[Check]:
        """The demo's invariants; the run has passed when all hold."""
        states, fed = self.settled.states, self.engine.fed
        dropped = states.get("dropped", 0)
        critical_outside = sum(exceedance.severity == "critical" for exceedance in self.outside)
        checks = [
            Check(
                "every token accounted for",
                self.settled.tokens == fed,
                f"vLLM fed {fed:,} tokens, latentwatch accounts for {self.settled.tokens:,}",
            ),
            Check("nothing dropped", dropped == 0, f"{dropped:,} tokens dropped"),
            Check("tokens were scored", states.get("scored", 0) > 0, f"{states.get('scored', 0):,} tokens scored"),
            Check(
                "every exceedance listed",
                len(self.exceedances) == self.settled.exceedances,
                f"{self.settled.exceedances} counted on /metrics, {len(self.exceedances)} listed by the API",
            ),
            Check(
                "the incident was seen",
                self.caught > 0,
                f"{self.caught} of {self.feared} feared requests went over a critical limit",
            ),
        ]
        if self.detection is None:
            text = f"{critical_outside} on ordinary requests"
            checks.append(Check("no critical exceedance outside", critical_outside == 0, text))
        else:
            checks += _promise_checks(self.detection)
        return checks if self.paging else checks + self._page_checks()

    def _page_checks(self) -> list[Check]:
        others = sorted({page.alert for page in self.pages if page.receiver == PAGER} - {PAGING_ALERT})
        arrived = self.moments is not None and self.moments.page_at is not None
        return [
            Check("the page arrived", arrived, "at the webhook" if arrived else "no page at the webhook"),
            Check("no other page", not others, ", ".join(others) or "none"),
        ]

    @property
    def feared(self) -> int:
        """Feared requests in the traffic."""
        return sum(answer.prompt.feared for answer in self.answers)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks())

    def as_json(self) -> dict[str, object]:
        """The content of demo-report.json. Times in seconds, null where a step was not shown or not reached."""
        return {
            "passed": self.passed,
            "checks": [{"name": check.name, "held": check.passed, "text": check.text} for check in self.checks()],
            "tokens": self._tokens_as_json(),
            "exceedances": {
                "inside": len(self.inside),
                "outside": len(self.outside),
                "critical_outside": sum(exceedance.severity == "critical" for exceedance in self.outside),
                "feared_requests": self.feared,
                "feared_requests_caught": self.caught,
            },
            "seconds_to_metrics": _rounded(self.seconds_to_metrics),
            "seconds_to_page": _rounded(self.seconds_to_page),
            "paging": self.paging or "shown",
            "requests": len(self.answers),
            "traffic_seconds": _rounded(self.settled.at - self.traffic_at),
            "started_at_unix_seconds": _rounded(self.started_at),
            "versions": dict(self.versions),
            **({} if self.detection is None else {"detection": self.detection.as_json()}),
        }

    def _tokens_as_json(self) -> dict[str, object]:
        states = self.settled.states
        return {
            "engine": self.engine.fed,
            **{state.name.lower(): states.get(state.name.lower(), 0) for state in TokenState},
            "engine_prompt": self.engine.prompt,
            "engine_output": self.engine.output,
            "engine_finished_requests": self.engine.finished,
            "reasons": {f"{state}:{reason}": count for (state, reason), count in self.settled.reasons.items() if count},
        }


def _promise_checks(detection: Detection) -> list[Check]:
    """Every critical page is one of the incident's or a false one, and of those there are no more than was promised."""
    checks = []
    for feature in detection.card.features.values():
        counts = detection.pages(feature)
        text = f"{counts.false} of {counts.ordinary} ordinary requests, promised {feature.limit_rate:.1%}"
        name = f"false pages as promised: {feature.concern.replace('_', ' ')}"
        checks.append(Check(name, detection.as_promised(feature), text))
    return checks


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
