"""Find the features of an SAE that tell two sets of requests apart, with error rates that hold.

A request's score is the largest activation of its tokens. Requests are split in two halves, whole groups together.
On the first half every feature is ranked by its AUROC, standardised by the null deviation of its own ties; labels are
permuted, and a feature's p-value is the share of permutations whose best feature does at least as well (Westfall and
Young's max-T, which holds whatever the dependence between features). Features that pass are tested again on the
second half, among themselves. q is the larger of the two p-values; AUROC and TPR are those of the second half, which
had no part in the choice.

Legend: R requests, T tokens, F features, B permutations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from latentwatch.arrays import F32, F64, I64, Array, Bool
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.watchlist import canonical, topk
from latentwatch.watchlist.activations import Recording
from latentwatch.watchlist.figures import Figures, Token
from latentwatch.watchlist.sources import Source

MIN_PER_HALF: Final = 5
"""Requests with the behaviour, and without, in each half: with fewer, no permutation can reach q = 0.05."""
PASS: Final = 0.05
CONTEXT_TOKENS: Final = 6
DESCRIBED_AT_ONCE: Final = 64


@dataclass(frozen=True)
class Found:
    """One feature that tells the two sets apart."""

    index: int
    auroc: float
    """On the held-out half."""
    tpr_at_fpr_1pct: float
    q_value: float
    n: int
    n_positive: int
    base_rate: float
    """Share of the negative requests' tokens on which it fires."""
    top_tokens: tuple[Token, ...]
    output_share: float
    """Share of its activation, over all requests, that lies in output tokens."""

    @property
    def where(self) -> str:
        """In the words of a label, on which side it fires."""
        if self.output_share >= 0.9:
            return "in the output"
        return "in the prompt" if self.output_share <= 0.1 else "in prompt and output"

    @property
    def evidence(self) -> Figures:
        """As watchlist.yaml wants it."""
        return {
            "auroc": round(self.auroc, 4),
            "tpr_at_fpr_1pct": round(self.tpr_at_fpr_1pct, 4),
            "n": self.n,
            "n_positive": self.n_positive,
            "split": "half of the requests, held out by group",
            "aggregation": "max over tokens",
            "q_value": round(self.q_value, 4),
            "base_rate": round(self.base_rate, 6),
            "top_tokens": list(self.top_tokens),
        }


def discover(
    source: Source,
    recording: Recording,
    positive_R: Bool,
    groups: Sequence[str],
    *,
    output_T: Bool | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> list[Found]:
    """The features that pass, best first.

    Args:    recording: the requests' stream.   positive_R: which requests show the behaviour.
             groups: of each request; a group stays in one half.   output_T: which tokens are output (none).
    Raises:  WatchlistRefused: too few requests of either kind in a half.
    """
    rng = np.random.default_rng(seed)
    held_R = split(positive_R, groups, rng)
    score_RF = request_scores(source, recording)
    first = _Test(score_RF[~held_R], positive_R[~held_R])
    p_F = first.adjusted(permutations, rng)
    chosen = np.flatnonzero(p_F < PASS)
    if len(chosen) == 0:
        return []
    second = _Test(score_RF[held_R][:, chosen], positive_R[held_R])
    q = np.maximum(p_F[chosen], second.adjusted(permutations, rng))
    passing = np.flatnonzero(q < PASS)
    found = [
        _found(recording, act_T, positive_R, int(chosen[i]), second, int(i), float(q[i]), output_T)
        for i, act_T in zip(passing, _activations(source, recording, chosen[passing]), strict=True)
    ]
    return sorted(found, key=lambda one: -one.auroc)


def _activations(source: Source, recording: Recording, features: I64) -> Iterator[F64]:
    """Of each feature on every token, some features at a time."""
    x_TD = recording.x_TD.astype(np.float64)
    for start in range(0, len(features), DESCRIBED_AT_ONCE):
        yield from canonical.authors(source.rows(features[start : start + DESCRIBED_AT_ONCE].tolist()), x_TD).T


def split(positive_R: Bool, groups: Sequence[str], rng: np.random.Generator) -> Bool:
    """Which requests are held out: about half of each kind, whole groups together."""
    held_R = np.zeros(len(positive_R), bool)
    names = np.array(groups)
    for kind in (True, False):
        of_kind = rng.permutation(np.unique(names[positive_R == kind]))
        held_R |= np.isin(names, of_kind[: len(of_kind) // 2]) & (positive_R == kind)
    for half in (held_R, ~held_R):
        if min(int(positive_R[half].sum()), int((~positive_R[half]).sum())) < MIN_PER_HALF:
            raise WatchlistRefused(
                "requests",
                found=f"a half has {int(positive_R[half].sum())} requests with the behaviour and "
                f"{int((~positive_R[half]).sum())} without",
                instead=f"Give at least {2 * MIN_PER_HALF} of each, in at least two groups.",
                reason=RefusalReason.TOO_FEW_REQUESTS,
            )
    return held_R


def request_scores(source: Source, recording: Recording) -> F32:
    """The largest activation of each feature over each request, float32 [R, F]."""
    x_TD = recording.x_TD.astype(np.float64)
    kth_T = topk.kth_largest(source, x_TD, source.about.k) if source.about.k is not None else None
    parts = []
    for index in topk.chunks(source.about.width):
        rows = source.rows(index)
        act_TC = canonical.authors(rows, x_TD)
        if kth_T is not None:
            rank_TC = act_TC if rows.rank_K is None else act_TC * rows.rank_K
            act_TC = np.where(rank_TC >= kth_T[:, None], act_TC, 0.0)
        parts.append(np.maximum.reduceat(act_TC, recording.starts_R, axis=0).astype(np.float32))
    return np.concatenate(parts, axis=1)


class _Test:
    """Rank sums of many features on one half."""

    def __init__(self, score_RF: F32, positive_R: Bool) -> None:
        self.score_RF = score_RF
        self.positive_R = positive_R
        n, self._n1 = len(positive_R), int(positive_R.sum())
        self._n0 = n - self._n1
        self._rank_RF, ties_F = midranks(score_RF)
        self._mean = self._n1 * (n + 1) / 2
        variance_F = self._n1 * self._n0 / 12 * ((n + 1) - ties_F / (n * (n - 1)))
        self._deviation_F = np.sqrt(np.maximum(variance_F, 0))

    def z(self, positive_BR: Bool) -> F64:
        """Standardised rank sums [B, F] of one or more labellings; 0 for a feature that is constant here."""
        above_BF = positive_BR.astype(np.float32) @ self._rank_RF - self._mean
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(self._deviation_F > 0, above_BF / self._deviation_F, 0.0), np.float64)

    def adjusted(self, permutations: int, rng: np.random.Generator) -> F64:
        """max-T p-values [F]: how often the best feature of a permuted labelling does as well."""
        best_B = np.concatenate(
            [
                self.z(np.stack([rng.permutation(self.positive_R) for _ in range(min(100, permutations - at))])).max(1)
                for at in range(0, permutations, 100)
            ]
        )
        observed_F = self.z(self.positive_R[None])[0]
        at_least_F = permutations - np.searchsorted(np.sort(best_B), observed_F, side="left")
        return np.asarray((1 + at_least_F) / (permutations + 1), np.float64)

    def auroc(self, feature: int) -> float:
        """Area under the ROC curve, ties counted half."""
        rank_sum = float(self._rank_RF[self.positive_R, feature].sum())
        return (rank_sum - self._n1 * (self._n1 + 1) / 2) / (self._n1 * self._n0)

    def tpr(self, feature: int, fpr: float) -> float:
        """True positive rate above the lowest threshold with at most this false positive rate."""
        return tpr_at(self.score_RF[:, feature], self.positive_R, fpr)


def tpr_at(score_R: Array, positive_R: Bool, fpr: float) -> float:
    """True positive rate above the lowest threshold that at most a share `fpr` of the negatives passes."""
    negatives = np.sort(score_R[~positive_R])[::-1]
    threshold = negatives[int(fpr * len(negatives))]
    return float((score_R[positive_R] > threshold).mean())


def midranks(score_RF: F32) -> tuple[F32, F64]:
    """Ranks from 1, ties sharing their mean, float32 [R, F]; and per feature the sum of t^3 - t over its ties."""
    order_RF = np.argsort(score_RF, axis=0, kind="stable")
    sorted_RF = np.take_along_axis(score_RF, order_RF, axis=0)
    n, features = score_RF.shape
    rank_RF = np.empty((n, features), np.float32)
    ties_F = np.zeros(features)
    new_RF = np.concatenate([np.ones((1, features), bool), sorted_RF[1:] != sorted_RF[:-1]])
    for feature in range(features):
        starts = np.flatnonzero(new_RF[:, feature])
        sizes = np.diff(np.append(starts, n))
        rank_RF[order_RF[:, feature], feature] = np.repeat(starts + (sizes + 1) / 2, sizes)
        ties_F[feature] = float((sizes.astype(np.float64) ** 3 - sizes).sum())
    return rank_RF, ties_F


def _found(
    recording: Recording,
    act_T: F64,
    positive_R: Bool,
    feature: int,
    test: _Test,
    column: int,
    q_value: float,
    output_T: Bool | None,
) -> Found:
    negative_T = ~positive_R[recording.request_T]
    return Found(
        index=feature,
        auroc=test.auroc(column),
        tpr_at_fpr_1pct=test.tpr(column, 0.01),
        q_value=q_value,
        n=len(test.positive_R),
        n_positive=int(test.positive_R.sum()),
        base_rate=float((act_T[negative_T] > 0).mean()),
        top_tokens=tuple(_context(recording, act_T, int(t)) for t in np.argsort(-act_T)[:3]),
        output_share=0.0 if output_T is None else float(act_T[output_T].sum() / max(act_T.sum(), 1e-30)),
    )


def _context(recording: Recording, act_T: F64, t: int) -> Token:
    request = int(recording.request_T[t])
    at, tokens = t - int(recording.starts_R[request]), recording.tokens[request]
    return {
        "token": tokens[at],
        "before": "".join(tokens[max(0, at - CONTEXT_TOKENS) : at]),
        "after": "".join(tokens[at + 1 : at + 1 + CONTEXT_TOKENS]),
        "activation": round(float(act_T[t]), 4),
    }
