"""A demo run as it might have been: for tests of the judgement and the report, without any process."""

from __future__ import annotations

from collections import Counter

import numpy as np
from latentwatch.demo.run.outcome import PAGER, PAGING_ALERT, Run
from latentwatch.demo.run.traffic import Answer, Prompt
from latentwatch.demo.run.watch import EngineTokens, Sample
from latentwatch.demo.run.webhook import Page
from latentwatch.facts import ExceedanceView
from latentwatch.names import Severity
from latentwatch.watchlist.file import Feature, Limit

BEGAN = 1_700_000_000.0
LABELS = ("Deceiving the user", "Complying with a jailbreak", "Seeking power or resources")


def an_exceedance(
    seconds: float,
    response_id: str,
    feature: str,
    label: str,
    *,
    severity: str = "critical",
    value: float = 3.0,
    limit: float = 2.0,
    position: int = 35,
) -> ExceedanceView:
    """As the collector's API tells one of an output token."""
    return ExceedanceView(
        seconds=seconds,
        request_id=f"{response_id}-0123abcd",
        response_id=response_id,
        trace_id="",
        model_name="m",
        feature=feature,
        label=label,
        severity=Severity(severity),
        phase="output",
        position=position,
        value=value,
        limit=limit,
        peak=value,
        tail_probability=None,
    )


def features() -> list[Feature]:
    """Three critical probes, twelve sparse features of lesser severities."""
    probes = [
        Feature(f"probe.{i}", label, Severity.CRITICAL, "probe", "none", "logit", Limit("rolling_mean", 2.0, 4))
        for i, label in enumerate(LABELS)
    ]
    kinds = (Severity.WARNING, Severity.INFO, Severity.NONE)
    sparse = [Feature(f"sae.{i}", f"Topic {i} <b>", kinds[i % 3], "sae", "exact", "activation") for i in range(12)]
    return probes + sparse


def a_run(*, seed: int = 0, paging: str = "") -> Run:
    """200 requests over 40 seconds, 30 of them feared between seconds 18 and 26, all as it should be."""
    rng = np.random.default_rng(seed)
    watched = features()
    answers, scores, exceedances = [], {}, []
    for i in range(200):
        feared = i >= 170
        sent = BEGAN + float(rng.uniform(18, 25) if feared else rng.uniform(0, 39))
        prompt = Prompt(f"topic {i % 6}", ({"role": "user", "content": f"Question {i} <script>"},), feared)
        token_times = tuple(sent + 0.1 + 0.01 * j for j in range(20))
        answer = Answer(
            f"chatcmpl-demo-{i:04d}", prompt, sent, token_times[-1], "An answer & more.", 30, 20, token_times
        )
        answers.append(answer)
        hot = int(rng.integers(3)) if feared else -1
        scores[answer.response_id] = {
            feature.id: float(rng.normal(4.0, 0.8) if j == hot else rng.normal(-3.0, 1.0))
            for j, feature in enumerate(watched)
        }
        if feared and scores[answer.response_id][f"probe.{hot}"] > 2.0:
            value = scores[answer.response_id][f"probe.{hot}"]
            exceedances.append(
                an_exceedance(sent + 0.3, answer.response_id, f"probe.{hot}", LABELS[hot], value=value, limit=2.0)
            )
    samples = _samples(answers, exceedances, watched, rng)
    first = min(exceedances, key=lambda exceedance: exceedance.seconds)
    labels = {"alertname": PAGING_ALERT, "severity": "critical", "feature": first.feature}
    texts = {"summary": f"demo: {first.label} went over its critical limit", "description": "1 request(s) to model m"}
    return Run(
        started_at=BEGAN - 30.0,
        traffic_at=BEGAN,
        incident_planned=(BEGAN + 18.0, BEGAN + 26.0),
        answers=answers,
        exceedances=exceedances,
        samples=samples,
        scores=scores,
        features=watched,
        engine=EngineTokens(prompt=6000, output=4000, finished=200),
        pages=[] if paging else [Page(first.seconds + 2.0, PAGER, "firing", first.seconds + 1.0, labels, texts)],
        paging=paging,
        versions={"latentwatch": "0.1.0", "python": "3.11"},
    )


def _samples(
    answers: list[Answer], exceedances: list[ExceedanceView], watched: list[Feature], rng: np.random.Generator
) -> list[Sample]:
    """Four readings a second; the last one holds every token."""
    fired: Counter[str] = Counter()
    samples = []
    for at in np.arange(BEGAN, BEGAN + 41, 0.25).tolist():
        done = sum(answer.finished_at <= at for answer in answers)
        for i, feature in enumerate(watched):
            if not feature.dense:
                inside = BEGAN + 18 < at < BEGAN + 26
                fired[feature.id] += int(rng.poisson(6 if i % 4 == 0 and inside else 0.4))
        exceeded = Counter((e.feature, e.severity) for e in exceedances if e.seconds <= at)
        states = {"scored": 45 * done, "inherited": 4 * done, "unseen": 0, "dropped": 0}
        samples.append(Sample(at, states, {}, dict(fired), dict(exceeded)))
    return samples
