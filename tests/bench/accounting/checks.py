"""The three invariants, checked on one engine run: I1 the sums, I2 the scores, I3 the answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.watchlist.file import Watchlist

from tests.bench.accounting.workload import Request
from tests.support.oracle import expected_scores, residual_streams
from tests.support.recording import Scores

GATE_MARGIN = 1e-3
"""A pre-activation this near to its threshold may fire or not: float32 sums in another order differ by as much."""


@dataclass(frozen=True)
class Account:
    """One request as the engine ran it and as the collector was told of it."""

    request: Request
    outputs: list[int]
    computed: int | None
    """Tokens that the engine's scheduler says it computed or found in its cache; None where nobody could ask it."""
    aborted: bool
    scores: Scores

    @property
    def fed(self) -> list[int]:
        """The tokens that went through the model."""
        known = [*self.request.prompt, *self.outputs]
        # The last token that a client read of an answer that it left may or may not have been fed back.
        return known[:-1] if self.computed is None else known[: self.computed]


def unbalanced(account: Account) -> str:
    """I1 for one request: "" where its sum is exact, else what is wrong."""
    scores, closed = account.scores, account.scores.closed
    if closed is None:
        return "it was never closed"
    total = sum(scores.tokens.values())
    expected = closed.total_tokens if account.computed is None else account.computed
    if not account.aborted and account.outputs:
        expected = len(account.request.prompt) + len(account.outputs) - 1
    if not total == closed.total_tokens == expected:
        return f"{total} tokens accounted for, the closing says {closed.total_tokens}, the engine {expected}"
    prompt = sum(count for (_, _, phase), count in scores.tokens.items() if phase == Phase.PROMPT)
    if prompt != min(len(account.request.prompt), expected):
        return f"{prompt} of {len(account.request.prompt)} prompt tokens are booked as prompt"
    if expected < len(account.fed):
        return f"{expected} tokens accounted for, the client read the answer to {len(account.fed)}"
    # A server may have ended an answer before it saw that its client had left.
    may_end = account.aborted and account.computed is None
    if (closed.outcome == Outcome.ABORTED) != account.aborted and not may_end:
        return f"it ended as {closed.outcome.name}"
    if scores.opened.adapter != account.request.adapter:
        return f"adapter {scores.opened.adapter!r} instead of {account.request.adapter!r}"
    return ""


def states(accounts: list[Account]) -> Counter[str]:
    """Tokens by state, and by reason where there is one."""
    books: Counter[str] = Counter()
    for account in accounts:
        for (state, reason, _), count in account.scores.tokens.items():
            name = TokenState(state).name.lower()
            books[name if reason == Reason.NONE else f"{name}/{Reason(reason).name.lower()}"] += count
    return books


def score_errors(account: Account, watchlist: Watchlist, model: Path) -> Any:
    """I2 for one request: the error at each position that carries scores, float64 [positions].

    |ours - Hugging Face's|, relative where Hugging Face's is above 1, the largest over all features and norms. A gate
    that is open on one side only counts with its whole activation, unless it is within GATE_MARGIN of the threshold.
    """
    at = [position for position in sorted(account.scores.at) if position < len(account.fed)]
    if not at:
        return np.empty(0)
    streams = residual_streams(model, account.fed, [h.hook_point.layer for h in watchlist.hooks], "float32")
    act_TF, margin_TF = expected_scores(watchlist, streams)
    norm_TH = np.stack([np.linalg.norm(x_TD, axis=1) for x_TD in streams], axis=1)
    found = np.stack([account.scores.at[position] for position in at])
    norm = np.stack([account.scores.norm_at[position] for position in at])
    error = np.abs(found - act_TF[at]) / np.maximum(1.0, np.abs(act_TF[at]))
    error[np.abs(margin_TF[at]) < GATE_MARGIN] = 0.0
    norm_error = np.abs(norm - norm_TH[at]) / np.maximum(1.0, norm_TH[at])
    return np.concatenate([error, norm_error], axis=1).max(axis=1)
