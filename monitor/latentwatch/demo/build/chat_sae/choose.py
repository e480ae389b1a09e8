"""Which features of an SAE to watch, and what they respond to: told by sentences of our own, whose topics are known.

Chosen on the first half of each topic's sentences, measured on the second. Limits come from real chats.
Shape legend: S sentences, T tokens of one, N tokens of chats, R chats, F features of the SAE, K chosen ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import yaml

from latentwatch.arrays import F32, I64, Bool
from latentwatch.demo.build.chat_sae.chats import shared_prefix, template_ids
from latentwatch.demo.build.features import MAX_RATE, auroc_per_feature
from latentwatch.demo.build.sae import Encoder
from latentwatch.demo.build.traces import auroc, tpr_at_fpr
from latentwatch.watchlist.figures import Dictionary, Figures, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PER_TOPIC: Final = 2
MIN_AUROC: Final = 0.8
"""On the half that it is chosen on: a topic for which the SAE has no better feature gets none."""
SHOWN: Final = 4
"""Tokens that stand on a card."""
EXCEEDANCE_RATE: Final = 0.01
"""Share of real chats that a feature's limit lets exceed."""


@dataclass(frozen=True)
class Sentences:
    """Texts with a topic each."""

    topics: tuple[str, ...]
    texts: tuple[str, ...]
    topic_S: I64
    first_half_S: Bool


@dataclass(frozen=True)
class Response:
    """One sentence as a chat's first message, without what the template puts around it."""

    tokens: tuple[str, ...]
    acts_TF: F32


@dataclass(frozen=True)
class Choice:
    """A feature to watch."""

    index: int
    topic: str
    label: str
    limit: float
    evidence: Figures


def sentences() -> Sentences:
    """Those of topics.yaml."""
    by_topic = yaml.safe_load(resources.files(__package__).joinpath("topics.yaml").read_text("utf-8"))
    topic_S = np.repeat(np.arange(len(by_topic)), [len(texts) for texts in by_topic.values()])
    first_half_S = np.concatenate([np.arange(len(texts)) < len(texts) // 2 for texts in by_topic.values()])
    return Sentences(
        tuple(by_topic), tuple(text for texts in by_topic.values() for text in texts), topic_S, first_half_S
    )


@torch.inference_mode()
def responses(
    inner: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, encoder: Encoder, texts: Sequence[str]
) -> list[Response]:
    """What each feature does on each token of each text, by a model that is cut behind the SAE's layer."""
    first, last = shared_prefix(tokenizer), _shared_end(tokenizer)
    found = []
    for text in texts:
        ids = template_ids(tokenizer, [{"role": "user", "content": text}])
        stream_TD = inner(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0].float()
        acts_TF = encoder.activations(stream_TD[first : len(ids) - last])
        found.append(Response(tuple(tokenizer.decode([i]) for i in ids[first : len(ids) - last]), acts_TF))
    return found


def _shared_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the template puts behind what a person says."""
    one, other = (template_ids(tokenizer, [{"role": "user", "content": word}])[::-1] for word in ("Why", "How are you"))
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def picks(largest_SF: F32, known: Sentences, rate_F: F32) -> list[tuple[int, str]]:
    """(feature, topic): for each topic the features that tell its first half best from the others', none twice.

    Args: largest_SF: largest activation in each sentence. rate_F: share of ordinary tokens on which a feature fires.
    """
    half = known.first_half_S
    chosen: list[tuple[int, str]] = []
    for number, topic in enumerate(known.topics):
        positive = known.topic_S[half] == number
        auroc_F = np.where(rate_F <= MAX_RATE, auroc_per_feature(largest_SF[half], positive), 0.0)
        margin_F = largest_SF[half][positive].mean(0) - largest_SF[half][~positive].mean(0)
        order = np.lexsort((-margin_F, -auroc_F))
        taken = {index for index, _ in chosen}
        chosen += [(int(f), topic) for f in order if auroc_F[f] >= MIN_AUROC and int(f) not in taken][:PER_TOPIC]
    return chosen


def choices(
    chosen: Sequence[tuple[int, str]],
    known: Sentences,
    responses_S: Sequence[Response],
    chat_acts_NK: F32,
    chat_N: I64,
    quality: Dictionary,
) -> list[Choice]:
    """The chosen features with label, limit and figures.

    Args: chat_acts_NK: activations of the chosen features on real chats. chat_N: the chat of each of these tokens.
    """
    made = []
    for k, (index, topic) in enumerate(chosen):
        largest_S = np.array([response.acts_TF[:, index].max() for response in responses_S])
        positive_S = known.topic_S == known.topics.index(topic)
        positive, negative = (largest_S[~known.first_half_S & which] for which in (positive_S, ~positive_S))
        shown = _top_tokens(responses_S, index)
        in_chats_R = _largest_per_chat(chat_acts_NK[:, k], chat_N)
        evidence = Figures(
            auroc=round(auroc(positive, negative), 4),
            tpr_at_fpr_1pct=round(tpr_at_fpr(positive, negative), 4),
            n=len(positive) + len(negative),
            n_positive=len(positive),
            split="sentences that it was not chosen on",
            aggregation="max over the sentence",
            base_rate=float(f"{(chat_acts_NK[:, k] > 0).mean():.4g}"),
            quantiles=_quantiles(chat_acts_NK[:, k]),
            top_tokens=shown,
            label_source="the topic whose sentences it tells best, and the tokens on which it is largest",
            measured_on="our own sentences; rate and quantiles on real chats",
            remarks=f"The limit is what {EXCEEDANCE_RATE:.0%} of {len(in_chats_R)} real chats exceed.",
            sae=quality.copy(),  # of its own, or YAML would write an alias
        )
        if others := _others(largest_S, positive_S, known):
            evidence["confounds"] = others
        words = ", ".join(repr(token["token"].strip() or token["token"]) for token in shown[:3])
        limit = _rounded_up(float(np.quantile(in_chats_R, 1 - EXCEEDANCE_RATE, method="higher")))
        made.append(Choice(index, topic, f"{topic}: responds to {words}", limit, evidence))
    return made


def _rounded_up(value: float) -> float:
    """To four digits, and never below, so that no more exceed it than was promised."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / unit) * unit:.6g}")


def _largest_per_chat(act_N: F32, chat_N: I64) -> F32:
    largest_R = np.zeros(int(chat_N.max()) + 1, np.float32)
    np.maximum.at(largest_R, chat_N, act_N)
    return largest_R


def _quantiles(act_N: F32) -> dict[str, float]:
    fired = act_N[act_N > 0]
    if not len(fired):
        return {}
    found = {name: float(np.quantile(fired, q)) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _top_tokens(responses_S: Sequence[Response], index: int) -> list[Token]:
    """The largest tokens, one of each sentence, in their context."""
    best = sorted(((float(r.acts_TF[:, index].max()), s) for s, r in enumerate(responses_S)), reverse=True)
    shown: list[Token] = []
    for value, s in best[:SHOWN]:
        if value <= 0:
            break
        tokens, at = responses_S[s].tokens, int(responses_S[s].acts_TF[:, index].argmax())
        before, after = "".join(tokens[max(0, at - 8) : at]), "".join(tokens[at + 1 : at + 6])
        shown.append(Token(token=tokens[at], before=before, after=after, activation=round(value, 3)))
    return shown


def _others(largest_S: F32, positive_S: Bool, known: Sentences) -> list[str]:
    """Topics in which it is, in the mean, at least half as large as in its own."""
    own = float(largest_S[positive_S].mean())
    means = {topic: float(largest_S[known.topic_S == i].mean()) for i, topic in enumerate(known.topics)}
    own_topic = known.topics[int(known.topic_S[positive_S][0])]
    return [f"fires in {topic} too" for topic, mean in means.items() if topic != own_topic and mean >= own / 2 > 0]
