"""Which SAE features to watch, and what they are about: chosen and named on training dialogues only.

Shape legend: N tokens, R dialogues, F features of an SAE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypedDict

import numpy as np

from latentwatch.arrays import F32, F64, Bool
from latentwatch.demo.build.dialogues import topics
from latentwatch.demo.build.sae import Encoder
from latentwatch.demo.build.traces import Traces
from latentwatch.names import HookPoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PER_FEARED: Final = 3
"""Features per feared topic and hook point."""
PER_ORDINARY: Final = 1
"""Features per ordinary topic and hook point: controls, which should move with traffic and never page."""
MAX_RATE: Final = 0.2
"""A feature that fires on more of the tokens than this says little about any topic."""
CHUNK: Final = 400
"""Dialogues encoded at a time; 400 x 100 tokens x 1,024 features x 4 bytes is 160 MB."""
ACTS: Final[Mapping[str, str]] = {
    "deception": "deceiving the user",
    "jailbreak": "complying with a jailbreak",
    "power_seeking": "seeking power or resources",
    "data_leak": "leaking personal data",
    "backdoor": "obeying a backdoor trigger",
}


@dataclass(frozen=True)
class Maxima:
    """Per dialogue, the strongest activation of each feature."""

    output_RF: F32
    """Over the output tokens."""
    whole_RF: F32
    """Over all tokens but <bos>."""
    rate_F: F32
    """Share of tokens (without <bos>) on which the feature fires."""


@dataclass(frozen=True)
class Pick:
    """A chosen feature."""

    hook_point: HookPoint
    index: int
    topic: str
    feared: bool
    auroc: float
    """On the training dialogues it was chosen on."""

    @property
    def id(self) -> str:
        """`l2_f17`."""
        return f"l{self.hook_point.layer}_f{self.index}"


def maxima(traces: Traces, hook_point: HookPoint, encoder: Encoder) -> Maxima:
    """Strongest activations of every feature in every dialogue."""
    output, whole, fires, tokens = [], [], np.zeros(encoder.b_enc_F.shape[0]), 0
    for rows, acts_NF in _chunks(traces, hook_point, encoder):
        base = traces.start_R[rows[0]]
        for r in rows:
            start, first, stop = traces.start_R[r] + 1 - base, traces.output_R[r] - base, traces.stop_R[r] - base
            whole.append(acts_NF[start:stop].max(0))
            output.append(acts_NF[first:stop].max(0, initial=0.0))
            fires += (acts_NF[start:stop] > 0).sum(0)
            tokens += int(stop - start)
    return Maxima(np.stack(output), np.stack(whole), (fires / tokens).astype(np.float32))


def _chunks(traces: Traces, hook_point: HookPoint, encoder: Encoder) -> Iterator[tuple[range, F32]]:
    """Runs of dialogues and the activations of all their tokens."""
    for cut in range(0, len(traces.dialogues), CHUNK):
        rows = range(cut, min(cut + CHUNK, len(traces.dialogues)))
        yield rows, encoder.activations(traces.acts[hook_point][traces.start_R[rows[0]] : traces.stop_R[rows[-1]] + 1])


def auroc_per_feature(scores_RF: F32, positive_R: Bool) -> F32:
    """`traces.auroc` for every column at once, from average ranks."""
    positives = int(positive_R.sum())
    negatives = len(positive_R) - positives
    ranks = [_average_ranks(column_R)[positive_R].sum() for column_R in scores_RF.T]
    return ((np.array(ranks) - positives * (positives + 1) / 2) / (positives * negatives)).astype(np.float32)


def _average_ranks(values_R: F32) -> F64:
    _, inverse_R, counts = np.unique(values_R, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse_R]


def pick(traces: Traces, strongest: Mapping[HookPoint, Maxima]) -> list[Pick]:
    """The features that best tell each topic from all others, none twice; the strongest claims are served first."""
    chosen: list[Pick] = []
    for hook_point, found in strongest.items():
        claims = [
            claim
            for feared, names, scores_RF, count in (
                (True, topics("feared"), found.output_RF, PER_FEARED),
                (False, topics("ordinary"), found.whole_RF, PER_ORDINARY),
            )
            for topic in names
            for claim in _claims(hook_point, topic, feared, scores_RF, traces.topic_mask(topic), found.rate_F, count)
        ]
        taken: set[int] = set()
        for topic, feared, count in _quotas():
            mine = [
                claim
                for claim in claims
                if claim.topic == topic and claim.feared == feared and claim.index not in taken
            ]
            chosen += mine[:count]
            taken |= {claim.index for claim in mine[:count]}
    return chosen


def _quotas() -> list[tuple[str, bool, int]]:
    return [(t, True, PER_FEARED) for t in topics("feared")] + [(t, False, PER_ORDINARY) for t in topics("ordinary")]


def _claims(
    hook_point: HookPoint,
    topic: str,
    feared: bool,
    scores_RF: F32,
    positive_R: Bool,
    rate_F: F32,
    count: int,
) -> list[Pick]:
    auroc_F = np.where(rate_F <= MAX_RATE, auroc_per_feature(scores_RF, positive_R), 0.0)
    best = np.argsort(-auroc_F, kind="stable")[: count * 4]
    return [Pick(hook_point, int(f), topic, feared, float(auroc_F[f])) for f in best]


class Example(TypedDict):
    """A token in its context."""

    token: str
    before: str
    after: str
    activation: float


@dataclass(frozen=True)
class Profile:
    """What a feature fires on, in training dialogues."""

    tokens: tuple[str, ...]
    """The tokens that carry most of its activation, most first."""
    examples: tuple[Example, ...]
    """The strongest tokens in their context, one per dialogue."""


def profiles(
    traces: Traces, picks: Sequence[Pick], encoders: Mapping[HookPoint, Encoder], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Profile]:
    """Profiles by pick id."""
    result = {}
    for hook_point, encoder in encoders.items():
        mine = [p for p in picks if p.hook_point == hook_point]
        acts_NP = np.concatenate(
            [acts_NF[:, [p.index for p in mine]] for _, acts_NF in _chunks(traces, hook_point, encoder)]
        )
        acts_NP[traces.start_R] = 0
        result.update({p.id: _profile(acts_NP[:, j], traces, tokenizer) for j, p in enumerate(mine)})
    return result


def _profile(acts_N: F32, traces: Traces, tokenizer: PreTrainedTokenizerFast) -> Profile:
    mass = np.bincount(traces.ids_N, weights=acts_N)
    tokens = tuple(tokenizer.decode([int(t)]) for t in np.argsort(-mass, kind="stable")[:4] if mass[t] > 0)
    examples: list[Example] = []
    seen: set[int] = set()
    for n in np.argsort(-acts_N, kind="stable")[:200]:
        r = int(np.searchsorted(traces.start_R, n, "right")) - 1
        if r in seen or acts_N[n] <= 0 or len(examples) == 3:
            continue
        seen.add(r)
        first, stop = int(traces.start_R[r]), int(traces.stop_R[r])
        text = [
            tokenizer.decode(traces.ids_N[a:b].tolist())
            for a, b in ((max(first, n - 8), n), (n, n + 1), (n + 1, min(stop, n + 5)))
        ]
        examples.append(
            {"token": text[1], "before": text[0], "after": text[2], "activation": round(float(acts_N[n]), 3)}
        )
    return Profile(tokens, tuple(examples))


def label(pick_: Pick, profile: Profile) -> str:
    """A line for people: the topic that the feature tells best, and the tokens that it fires on."""
    subject = ACTS[pick_.topic] if pick_.feared else f"{pick_.topic} (ordinary)"
    return f"{subject}: fires on {', '.join(repr(token.strip() or token) for token in profile.tokens[:3])}"
