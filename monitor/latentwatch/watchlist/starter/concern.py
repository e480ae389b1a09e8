"""One concern's detector: settings chosen on its selection families, fitted on those and the training ones, measured on
families that had no part in either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from latentwatch.arrays import F64, Bool
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.prompts.prompt import Kind, Part, Prompt
from latentwatch.prompts.written import ORDINARY
from latentwatch.watchlist.starter import measure, text, training
from latentwatch.watchlist.starter.measure import Interval
from latentwatch.watchlist.starter.training import LinearProbe, Settings, Windows

FEWEST: Final = 5
"""Texts of a kind in a part."""


@dataclass(frozen=True)
class Split:
    """Which of all requests a concern uses for what: indices into them."""

    positive: Mapping[Part, Sequence[int]]
    hard: Mapping[Part, Sequence[int]]
    ordinary: Mapping[Part, Sequence[int]]
    """Of other concerns' hard texts too, but in Part.TEST: what is harmless there is harmless here."""


@dataclass(frozen=True)
class FamilyRow:
    """What the detector, the better text classifier and the length reach on one family that none of them saw."""

    family: str
    negatives: Kind
    n: int
    n_negative: int
    tpr: Interval
    text: Interval
    better_by: Interval
    tpr_length: float
    auroc: float
    auroc_text: float
    text_by: str


@dataclass(frozen=True)
class Detector:
    """A concern's probe and its figures."""

    concern: str
    settings: Settings
    probe: LinearProbe
    selection: Mapping[Settings, float]
    """What each setting reached on the selection families: AUROC and TPR at 1 % false positives, averaged."""
    rows: Sequence[FamilyRow]
    limit: float
    n_ordinary: int
    scores_R: F64
    """Of every request, as an alert sees it."""

    def mean_tpr(self, negatives: Kind) -> tuple[float, float]:
        """Of the detector and of the text, averaged over the test families."""
        rows = [row for row in self.rows if row.negatives is negatives]
        return float(np.mean([r.tpr.value for r in rows])), float(np.mean([r.text.value for r in rows]))

    def better_by(self, negatives: Kind) -> Interval:
        """Than the text in TPR, averaged over the test families, which are taken for independent."""
        rows = [row.better_by for row in self.rows if row.negatives is negatives]
        value = float(np.mean([row.value for row in rows]))
        reach = math.sqrt(sum(((row.high - row.low) / 2) ** 2 for row in rows)) / len(rows)
        return Interval(value, value - reach, value + reach)

    @property
    def beats_text(self) -> bool:
        """By 10 points or more on average over the test families, against hard texts, and surely by more than none."""
        better_by = self.better_by(Kind.HARD)
        return better_by.value >= 0.10 and better_by.low > 0.0


def split(prompts: Sequence[Prompt], concern: str) -> Split:
    """The requests of one concern by part and kind.

    Raises: WatchlistRefused: a part has too few of a kind to be fitted on, chosen by or measured with.
    """
    found: dict[Kind, dict[Part, list[int]]] = {kind: {part: [] for part in Part} for kind in Kind}
    for at, prompt in enumerate(prompts):
        if prompt.concern == concern or (prompt.concern == ORDINARY and prompt.kind is Kind.ORDINARY):
            found[prompt.kind][prompt.part].append(at)
        elif prompt.kind is Kind.HARD and prompt.part is not Part.TEST:
            found[Kind.ORDINARY][prompt.part].append(at)
    for kind, parts in found.items():
        for part, of_part in parts.items():
            if len(of_part) < FEWEST:
                raise WatchlistRefused(
                    f"texts on {concern}",
                    found=f"{len(of_part)} {kind} texts of {part} families fit, fewer than {FEWEST}",
                    instead="See whether the template leaves them room; leave the concern out otherwise.",
                    reason=RefusalReason.TOO_FEW_REQUESTS,
                )
    return Split(found[Kind.POSITIVE], found[Kind.HARD], found[Kind.ORDINARY])


def train(split: Split, windows: Windows, strength: float, parts: Sequence[Part]) -> LinearProbe:
    """Fitted on the requests of these parts."""
    positive = [at for part in parts for at in split.positive[part]]
    negative = [at for part in parts for at in (*split.hard[part], *split.ordinary[part])]
    return training.fit(windows, positive, negative, strength)


def selection_figure(split: Split, score_R: F64) -> float:
    """AUROC and TPR at 1 % false positives, each against hard and against ordinary texts, averaged."""
    positive_P = score_R[list(split.positive[Part.SELECTION])]
    figures = []
    for negative in (split.hard[Part.SELECTION], split.ordinary[Part.SELECTION]):
        negative_N = score_R[list(negative)]
        figures += [measure.auroc(positive_P, negative_N), measure.tpr(positive_P, negative_N)]
    return float(np.mean(figures))


def rows(prompts: Sequence[Prompt], split: Split, score_R: F64, rng: np.random.Generator) -> list[FamilyRow]:
    """Every test family against hard and against ordinary texts."""
    parts = (Part.TRAIN, Part.SELECTION)
    fitted = [at for part in parts for at in (*split.positive[part], *split.hard[part], *split.ordinary[part])]
    positive = {at for part in parts for at in split.positive[part]}
    label: Bool = np.array([at in positive for at in fitted])
    tested = [at for kind in (split.positive, split.hard, split.ordinary) for at in kind[Part.TEST]]
    by_text = text.scores([prompts[at].whole for at in fitted], label, [prompts[at].whole for at in tested])
    place = {at: number for number, at in enumerate(tested)}
    found = []
    for family in dict.fromkeys(prompts[at].family for at in split.positive[Part.TEST]):
        wanted = [at for at in split.positive[Part.TEST] if prompts[at].family == family]
        for kind, of_kind in ((Kind.HARD, split.hard), (Kind.ORDINARY, split.ordinary)):
            harmless = list(of_kind[Part.TEST])
            texts = {
                name: (score_A[[place[at] for at in wanted]], score_A[[place[at] for at in harmless]])
                for name, score_A in by_text.items()
            }
            # The better of the two, chosen by the figures that are shown: the comparison favours the text.
            best = max(
                ("characters", "words"), key=lambda name: (measure.tpr(*texts[name]), measure.auroc(*texts[name]))
            )
            own = score_R[wanted], score_R[harmless]
            forms = [prompts[at].form for at in wanted], [prompts[at].form for at in harmless]
            own_tpr, text_tpr, better_by = measure.tpr_interval([own, texts[best]], *forms, rng)
            found.append(
                FamilyRow(
                    family,
                    kind,
                    len(wanted),
                    len(harmless),
                    own_tpr,
                    text_tpr,
                    better_by,
                    tpr_length=measure.tpr(*texts["length"]),
                    auroc=measure.auroc(*own),
                    auroc_text=max(measure.auroc(*texts[name]) for name in ("characters", "words")),
                    text_by=best,
                )
            )
    return found
