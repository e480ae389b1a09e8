"""card.json of SmolLM2's detectors: how they were made, their limits, and how they do beside reading the text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

RATES: Final = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005)
"""False-positive rates at which thresholds are noted: a run is compared with what they promise."""


@dataclass(frozen=True)
class FamilyFigures:
    """One family of requests that was never trained on, against one kind of harmless ones."""

    family: str
    negatives: str
    """"ordinary", or "hard": harmless, in the same form or with the same words."""
    n: int
    n_negative: int
    auroc: float
    auroc_text: float
    auroc_length: float
    tpr_at_1pct: float
    tpr_low: float
    tpr_high: float
    """95 % interval of tpr_at_1pct for the number of requests, the threshold taken as given."""
    tpr_text: float
    tpr_length: float


@dataclass(frozen=True)
class FeatureCard:
    """A detector and its limit."""

    concern: str
    label: str
    hook_point: str
    window_tokens: int
    """The largest mean over so many consecutive tokens is what is watched."""
    selection_auroc: Mapping[str, float]
    """By hook point and window, on families of the training texts that were left out in turn."""
    limit: float
    limit_rate: float
    """Share of ordinary requests that the limit promises to stay below."""
    limit_requests: int
    thresholds: Mapping[str, float]
    """By the rate that each promises."""
    text_limit: float
    """The text baseline's limit, at the same rate of the same requests."""
    families: Sequence[FamilyFigures]

    @property
    def id(self) -> str:
        """The feature's in the watchlist."""
        return f"{self.concern.replace('_', '-')}.{self.hook_point.rpartition('.')[2]}"


@dataclass(frozen=True)
class Card:
    """Everything that was built."""

    seed: int
    packages: Mapping[str, str]
    shared_positions: int
    """Tokens that every request begins with: the chat template's own system prompt. No statistic counts them."""
    suffix_tokens: int
    """Tokens that the template puts behind every request."""
    texts: Mapping[str, int]
    copies_left_out: int
    left_out: Sequence[str]
    features: Mapping[str, FeatureCard]
    """By concern."""


def read_card(path: Path) -> Card:
    """Raises OSError, ValueError, KeyError, TypeError: no card, or of another version."""
    found = json.loads(path.read_text("utf-8"))
    features = {
        concern: FeatureCard(**{**feature, "families": [FamilyFigures(**row) for row in feature["families"]]})
        for concern, feature in found["features"].items()
    }
    return Card(**{**found, "features": features})


def card_text(card: Card) -> str:
    """card.md."""
    parts = [_HEAD.format(**vars(card), texts_train=card.texts["train"], packages_text=_packages(card))]
    for feature in card.features.values():
        areas = ", ".join(f"{name} {area:.3f}" for name, area in feature.selection_auroc.items())
        parts.append(
            f"## {feature.label}\n\n`{feature.id}`, over {feature.window_tokens} tokens at {feature.hook_point}. "
            f"Limit {feature.limit:.3f}: {feature.limit_rate:.1%} of {feature.limit_requests} ordinary requests.\n"
            f"AUROC on training families left out in turn: {areas}.\n\n{_table(feature)}"
        )
    return "\n".join(parts)


def _packages(card: Card) -> str:
    return ", ".join(f"{name} {version}" for name, version in card.packages.items())


def _table(feature: FeatureCard) -> str:
    head = (
        "| family | against | n | AUROC | text | length | TPR at 1 % | 95 % interval | text | length |\n|" + "---|" * 10
    )
    rows = [
        f"| {row.family} | {row.n_negative} {row.negatives} | {row.n} "
        f"| {row.auroc:.3f} | {row.auroc_text:.3f} | {row.auroc_length:.3f} "
        f"| {row.tpr_at_1pct:.0%} | {row.tpr_low:.0%} to {row.tpr_high:.0%} "
        f"| {row.tpr_text:.0%} | {row.tpr_length:.0%} |"
        for row in feature.families
    ]
    return "\n".join([head, *rows]) + "\n"


_HEAD: Final = """# SmolLM2's detectors

Written by `python -m latentwatch.demo.build.smollm2` (seed {seed}), from our own texts and those of
{packages_text}. None of those is in this project.

Each detector is a logistic regression on the mean of the residual stream over the {suffix_tokens} tokens that the chat
template puts behind a request, where the model has read all of it, or over twice as many. What is watched is the
largest such mean anywhere in the prompt, behind the {shared_positions} tokens that every request begins with.

{texts_train} texts are trained on. Every family below is another data set or form than those, and {copies_left_out}
texts were left out since one that is trained on is nearly the same. "text" is a classifier of character n-grams fitted
on the same texts, "length" the number of characters. "hard" are harmless texts in the same form or with the same words,
fewer than 200 of them: 1 % of those is one request.
"""
