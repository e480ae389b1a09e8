"""The model's residual stream over many dialogues, as the served model computes it.

Shape legend: N tokens of all dialogues together, R dialogues, D d_model, K directions, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from latentwatch.arrays import F32, I64, Bool
from latentwatch.demo.build.dialogues import Dialogue
from latentwatch.demo.build.model import encode, pad
from latentwatch.names import HookPoint

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BATCH_ROWS = 128


@dataclass(frozen=True)
class Traces:
    """Residual streams and where each dialogue lies in them.

    The output of a dialogue is its last turn without the closing <end>: a server never feeds the last sampled token
    back, so that token has no activations.
    """

    dialogues: tuple[Dialogue, ...]
    ids_N: I64
    start_R: I64
    """First row of each dialogue: its <bos>."""
    output_R: I64
    """First row of each dialogue's output."""
    stop_R: I64
    """One past the last output row."""
    acts: Mapping[HookPoint, torch.Tensor]
    """bfloat16 [N, D] per hook point."""

    def inner_rows(self) -> I64:
        """Indices of all rows but each dialogue's <bos>, whose stream is an outlier, and the closing <end>."""
        return np.concatenate([np.arange(a + 1, b) for a, b in zip(self.start_R, self.stop_R, strict=True)])

    def topic_mask(self, *topics: str) -> Bool:
        """bool [R]: dialogues of these topics."""
        return np.array([dialogue.topic in topics for dialogue in self.dialogues])

    def kind_mask(self, *kinds: str) -> Bool:
        """bool [R]: dialogues of these kinds."""
        return np.array([dialogue.kind in kinds for dialogue in self.dialogues])


@torch.inference_mode()
def collect(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dialogues: Sequence[Dialogue],
    hook_points: Sequence[HookPoint],
) -> Traces:
    """Run the model over whole dialogues and keep the stream at `hook_points`."""
    rows = encode(tokenizer, dialogues)
    lengths = np.array([len(row.ids) for row in rows])
    start_R = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    width = model.config.hidden_size
    acts = {point: torch.empty(int(lengths.sum()), width, dtype=torch.bfloat16) for point in hook_points}
    order = np.argsort(lengths, kind="stable")
    for cut in range(0, len(order), BATCH_ROWS):
        chosen = order[cut : cut + BATCH_ROWS]
        states = model.model(pad([rows[i] for i in chosen]), output_hidden_states=True, use_cache=False).hidden_states
        for b, i in enumerate(chosen):
            for point in hook_points:
                acts[point][start_R[i] : start_R[i] + lengths[i]] = states[point.layer + 1][b, : lengths[i]]
    return Traces(
        dialogues=tuple(dialogues),
        ids_N=np.concatenate([np.array(row.ids) for row in rows]),
        start_R=start_R,
        output_R=start_R + np.array([row.output_start for row in rows]),
        stop_R=start_R + lengths - 1,
        acts=acts,
    )


def request_rolling_mean(scores_NK: F32, traces: Traces, window: int) -> F32:
    """Largest mean over `window` consecutive output tokens, [R, K]; -inf where the output is shorter."""
    return np.stack(
        [_max(rolling_mean(scores_NK[a:b], window)) for a, b in zip(traces.output_R, traces.stop_R, strict=True)]
    )


def rolling_mean(scores_TK: F32, window: int) -> F32:
    """Means over each full window, [T - window + 1, K], empty when T < window."""
    if len(scores_TK) < window:
        return np.empty((0, scores_TK.shape[1]), np.float32)
    sums_TK = np.concatenate([np.zeros((1, scores_TK.shape[1])), np.cumsum(scores_TK, 0, dtype=np.float64)])
    means_TK: F32 = ((sums_TK[window:] - sums_TK[:-window]) / window).astype(np.float32)
    return means_TK


def _max(scores_TK: F32) -> F32:
    largest_K: F32 = np.max(scores_TK, axis=0, initial=-np.inf).astype(np.float32)
    return largest_K


def auroc(positive: F32, negative: F32) -> float:
    """Chance that a positive scores above a negative, ties counting half. Source: Mann & Whitney 1947, U / (m n)."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left")
    not_above = np.searchsorted(ordered, positive, "right")
    return float((below + not_above).sum() / 2 / len(positive) / len(negative))


def tpr_at_fpr(positive: F32, negative: F32, fpr: float = 0.01) -> float:
    """Share of positives above the smallest score that at most `fpr` of the negatives exceed."""
    cut = np.sort(negative)[len(negative) - 1 - int(fpr * len(negative))]
    return float((positive > cut).mean())
