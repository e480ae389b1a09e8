"""A collector with something of everything that the live page shows, for pictures of it and for tests in a browser."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.evidence import EvidenceSettings
from latentwatch.collector.http.overview import Links
from latentwatch.collector.service import Service
from latentwatch.names import Severity, TokenState
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.file import Feature, Limit

from tests.support.collectors import collector
from tests.support.drift import random_baseline
from tests.support.streams import Piece, Tokens, hello, probe, received, sparse, step_batch, watchlist

TWICE: Final = "chatcmpl-order-4711-0123abcd"
"""The id of two requests."""
BAD: Final = "chatcmpl-b81c0f2e9d4a4f0fa2f7c1d7e6a05c33-00c0ffee"
"""A request that exceeds several limits, the rolling mean's among them."""
VIEWS: Final = {
    "page": "",
    "request": f"#request={BAD}",
    "twice": f"#request={TWICE}",
    "feature": "#feature=probe.deception",
    "sparse-feature": "#feature=l12.f8812",
    "help": "#help",
}
LINKS: Final = Links("https://wiki.example.org/latentwatch", "https://grafana.example.org")
_LONG: Final = "Explaining step by step how to get around a safety rule, in the voice of a character in a story"
_TOPICS: Final = ("Cooking recipes", "Python code", "Legal language", "Medical advice", "German text", "Chess openings",
                  "Travel", "Sarcasm")  # fmt: skip


def features() -> tuple[Feature, ...]:
    """Probes and sparse features with limits of every kind, and topics without one."""
    deception = probe("probe.deception", label="Deceiving the user", limit=Limit("rolling_mean", 1.2, 8, "output"))
    jailbreak = sparse("l12.f8812", label=_LONG, limit=Limit("max", 6.0), severity=Severity.CRITICAL, skip=1)
    leak = sparse("l12.f104", label="Leaking personal data", limit=Limit("max", 5.0, phase="output"))
    prompted = sparse("l20.f77", label="Asked for a weapon", limit=Limit("max", 7.0, phase="prompt"))
    refusal = sparse("l20.f3", label="Refusal", limit=Limit("max", 8.0), severity=Severity.INFO)
    return (
        dataclasses.replace(deception, evidence=_MEASURED),
        dataclasses.replace(jailbreak, evidence=_OF_SPARSE),
        *(leak, prompted, refusal),
        *(sparse(f"l12.f{200 + i}", label=label, severity=Severity.NONE) for i, label in enumerate(_TOPICS)),
    )


_MEASURED: Final[Any] = {
    "auroc": 0.962,
    "tpr_at_fpr_1pct": 0.81,
    "n": 2634,
    "n_positive": 311,
    "aggregation": "largest mean of 8 tokens",
    "split": "families held out",
    "confounds": ["fiction with a lying narrator", "negotiation"],
}
_OF_SPARSE: Final[Any] = {
    "auroc": 0.91,
    "base_rate": 0.0021,
    "label_source": "read by a person",
    "top_tokens": [
        {"before": "and then she said: of course, ", "token": "step", "after": " one is to", "activation": 11.4},
        {"before": "as long as it stays in the ", "token": "story", "after": ", nobody will", "activation": 9.8},
        {"before": "", "token": "Pretend", "after": " that the rules", "activation": 8.1},
    ],
}


@contextlib.contextmanager
def scene(folder: Path, **settings: Any) -> Iterator[Service]:
    """Six minutes of traffic of two engines, one of which is away, with an incident in it."""
    watched = features()
    settings.setdefault("evidence", EvidenceSettings(folder / "evidence"))
    settings.setdefault("links", LINKS)
    # In nearly every request all but one feature fire, and so they did before.
    sha256 = watchlist_file.write(watchlist(watched), folder / "w.safetensors").sha256
    baseline = random_baseline(watched, share=0.95, sha256=sha256)
    settings.setdefault("drift", DriftSettings(baseline))
    with collector(folder, watched, **settings) as made:
        _play(made, watched)
        yield made


def _play(service: Service, watched: tuple[Feature, ...]) -> None:
    rng, sink, now = np.random.default_rng(7), service.core.ingest, time.time()
    engines = [
        hello(replica=f"llama-7d9f-{name}/0", model_name="llama-3.1-8b", watchlist_sha256=service.core.watchlist.sha256)
        for name in ("x2k4", "q8w1")
    ]
    for who in engines:
        sink.hello(who, now - 360)
    requests = [_ordinary(rng, watched, i) for i in range(1, 120)]
    requests[70] = _twice(rng, watched, 71, 5.5)
    requests[100] = _bad(rng, watched, 101)
    requests[112] = _twice(rng, watched, 113, 9.0)
    for i, request in enumerate(requests):
        who = engines[i % 2 if i < 90 else 0]
        at = now - 355 + 355 * i / len(requests)
        piece = step_batch(
            [Piece(request, 0, request.total)],
            watched,
            step=i,
            time_unix_nano=int(at * 1e9),
            opened=[request.opened()],
            closed=[request.closed()],
        )
        sink.observe(who, received(i + 1, piece), at)
        service.core.drift.tick(at)
    sink.goodbye(engines[1], now - 80)
    service.core.drift.tick(now + 60)


def _ordinary(rng: np.random.Generator, watched: tuple[Feature, ...], handle: int, request_id: str = "") -> Tokens:
    prompt, total = int(rng.integers(10, 40)), int(rng.integers(60, 160))
    act = np.zeros((total, len(watched)), np.float32)
    act[:, 0] = rng.normal(-1.0, 0.6, total)
    fires = rng.random((total, len(watched) - 1)) < 0.04
    act[:, 1:] = np.where(fires, np.minimum(np.exp(rng.normal(-0.7, 0.4, fires.shape)), 4.8), 0)
    if rng.random() < 0.9:
        act[:, 4] = 0.0
    # The first token is where a model parks what it does not need: a hundred times as large as all others.
    act[0, 1:3] = 60.0, 55.0
    act[0, 2] = 0.0
    state = np.full(total, TokenState.SCORED)
    if handle % 17 == 0:
        state[3:9] = TokenState.UNSEEN
    id = request_id or f"chatcmpl-{handle * 2654435761 % 2**32:08x}{handle:024x}-{handle * 40503 % 2**32:08x}"
    return Tokens(handle, prompt, act, state, np.ones((total, 1), np.float32), request_id=id)


def _bad(rng: np.random.Generator, watched: tuple[Feature, ...], handle: int) -> Tokens:
    made = _ordinary(rng, watched, handle, BAD)
    out = slice(made.prompt_tokens + 12, made.prompt_tokens + 34)
    made.act_TF[out, 0] = rng.normal(2.2, 0.7, 22)
    made.act_TF[made.prompt_tokens + 14, 1] = 9.4
    made.act_TF[made.prompt_tokens + 20, 2] = 6.1
    made.act_TF[4:6, 3] = 8.8, 7.6
    return made


def _twice(rng: np.random.Generator, watched: tuple[Feature, ...], handle: int, peak: float) -> Tokens:
    made = _ordinary(rng, watched, handle, TWICE)
    made.act_TF[made.prompt_tokens + 3, 2] = peak
    return made
