"""Score texts offline with a built watchlist: a Hugging Face model, the file's own rows, float64; no engine.

Legend: T tokens of one text, D d_model, K features at one hook point, F features of the watchlist.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from latentwatch.arrays import F32, F64, Bool
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.evidence import heatmap
from latentwatch.evidence.archive import StoredActivations, StoredRequest
from latentwatch.facts import ShownExceedance
from latentwatch.watchlist import activations, canonical
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.activations import Request
from latentwatch.watchlist.file import NORMS, SCALE_ROWS, Feature, HookRows, Limit, Watchlist

Text = str | Sequence[Mapping[str, str]]
"""A text as it is, all of it prompt; or chat messages for the model's template, of which a last answer is output."""
MAX_TOKENS: Final = 4096


@dataclass(frozen=True, eq=False)
class Scored:
    """One text and what each feature makes of it."""

    tokens: tuple[str, ...]
    prompt_tokens: int
    """Of them, how many are prompt; the rest is output."""
    act_TF: F32
    """Activations in the features' own units, in watchlist order; NaN where a feature skips a first position."""
    watchlist: Watchlist
    model_name: str

    def activation(self, feature: str) -> F32:
        """Of one feature by its id, one for each token. Raises KeyError."""
        return self.act_TF[:, [one.id for one in self.watchlist.features].index(self._known(feature))]

    def statistics(self) -> dict[str, float]:
        """By feature id, what its limit is compared with, else the largest activation; NaN where no token counts."""
        return {
            feature.id: _statistic(feature.limit, self.act_TF[:, f], self.prompt_tokens)[0]
            for f, feature in enumerate(self.watchlist.features)
        }

    def exceeded(self) -> list[str]:
        """Ids of the features that go above their limit, in watchlist order."""
        return [one.feature for one in self.as_request().exceedances]

    def as_request(self) -> StoredRequest:
        """In the form in which evidence is shown."""
        shown = tuple(self._shown(f, feature) for f, feature in enumerate(self.watchlist.features))
        exceedances = tuple(
            self._exceedance(feature, value, position)
            for f, feature in enumerate(self.watchlist.features)
            if feature.limit is not None
            for value, position in [_statistic(feature.limit, self.act_TF[:, f], self.prompt_tokens)]
            if value > feature.limit.value
        )
        # The strongest first, by their own scale.
        order = sorted(shown, key=lambda one: -max(one.values, default=0.0) / (one.limit or 1.0))
        output = len(self.tokens) - self.prompt_tokens
        return StoredRequest(
            request_id="offline", response_id="", trace_id="", replica="offline", model_name=self.model_name,
            engine="", adapter="", outcome="finished", opened_seconds=0.0, closed_seconds=None, duration_seconds=None,
            opening_seen=True, prompt_tokens=self.prompt_tokens, output_tokens=output, total_tokens=len(self.tokens),
            tokens={"scored": len(self.tokens)}, key=0, watchlist=self.watchlist.name,
            watchlist_sha256=self.watchlist.sha256, exceedances=exceedances, features=(), features_left_out=0,
            activations=tuple(order), activations_lost=0,
        )  # fmt: skip

    def html(self, feature: str | None = None) -> str:
        """Its tokens coloured by what they score, as a document that stands alone; of one feature, or of the strongest.

        Raises: KeyError: no such feature.
        """
        known = feature and self._known(feature)
        return heatmap.as_html(self.as_request(), self.tokens, feature=known, watchlist=self.watchlist)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.html()

    def _known(self, feature: str) -> str:
        ids = [one.id for one in self.watchlist.features]
        if feature not in ids:
            raise KeyError(f"{feature!r} is no feature of {self.watchlist.name!r}, which has {', '.join(ids[:20])}")
        return feature

    def _shown(self, f: int, feature: Feature) -> StoredActivations:
        act_T = self.act_TF[:, f]
        present_T = np.isfinite(act_T) if feature.dense else np.nan_to_num(act_T) != 0
        return StoredActivations(
            feature=feature.id,
            label=feature.label,
            severity=feature.severity.value,
            units=feature.units,
            limit=feature.limit.value if feature.limit else None,
            dense=feature.dense,
            positions=np.flatnonzero(present_T).tolist(),
            values=act_T[present_T].tolist(),
        )

    def _exceedance(self, feature: Feature, value: float, position: int) -> ShownExceedance:
        assert feature.limit is not None
        return ShownExceedance(
            seconds=0.0, request_id="offline", response_id="", trace_id="", model_name=self.model_name,
            feature=feature.id, label=feature.label, severity=feature.severity,
            phase="prompt" if position < self.prompt_tokens else "output",
            position=position, value=value, limit=feature.limit.value,
        )  # fmt: skip


def load(path: str | Path) -> Watchlist:
    """A built watchlist file. Raises WatchlistRefused."""
    return watchlist_file.read(Path(path))


def score(
    watchlist: Watchlist, model: str | Path, texts: Sequence[Text], progress: Callable[[int], None] = lambda _: None
) -> list[Scored]:
    """Score texts, one result for each.

    Args:    model: a Hugging Face model's folder or name.   progress: called with the number of forwards done; there is
             one for each text and hook point.
    Raises:  WatchlistRefused: the model cannot be loaded or is of another size, or a text has no or too many tokens.
    """
    requests = [Request(text if isinstance(text, str) else tuple(text), str(i)) for i, text in enumerate(texts)]
    if not requests:
        return []
    prompts = activations.prompt_tokens(str(model), requests)
    parts: list[F64] = []
    tokens: tuple[tuple[str, ...], ...] = ()
    for number, rows in enumerate(watchlist.hooks):
        done = number * len(requests)
        recording = activations.record(
            str(model),
            requests,
            rows.hook_point,
            skip_first=0,
            max_tokens=MAX_TOKENS,
            progress=functools.partial(_later, progress, done),
        )
        if recording.x_TD.shape[1] != rows.w_hi_KD.shape[1]:
            raise WatchlistRefused(
                f"model {model}",
                found=f"its stream is {recording.x_TD.shape[1]} wide, that of the watchlist {rows.w_hi_KD.shape[1]}",
                instead=f"Give the model that the watchlist was built for, {watchlist.model.name}.",
                reason=RefusalReason.WATCHLIST_WIDTH,
            )
        if (longest := max(map(len, recording.tokens))) >= MAX_TOKENS:
            raise WatchlistRefused(
                "a text to score",
                found=f"it has {longest} tokens or more",
                instead=f"Give texts of fewer than {MAX_TOKENS} tokens.",
                reason=RefusalReason.RECORDING,
            )
        parts.append(rows_score(rows, recording.x_TD.astype(np.float64)))
        tokens, request_T = recording.tokens, recording.request_T
    act_TF = np.concatenate(parts, axis=1).astype(np.float32)
    skip_F = np.array([feature.skip_first_positions for feature in watchlist.features])
    made = []
    for r, (prompt, own) in enumerate(zip(prompts, tokens, strict=True)):
        own_TF = act_TF[request_T == r]
        own_TF[np.arange(len(own))[:, None] < skip_F] = np.nan
        made.append(Scored(own, min(prompt, len(own)), own_TF, watchlist, Path(str(model)).name))
    return made


def _later(progress: Callable[[int], None], done: int, more: int) -> None:
    progress(done + more)


def rows_score(rows: HookRows, x_TD: F64) -> F64:
    """Activations [T, K] of the file's rows: what `kernels.reference` says of a finite stream, without torch."""
    scale = dict(zip(SCALE_ROWS, rows.scale_6K.astype(np.float64), strict=True))
    w_KD = rows.w_KD.astype(np.float64)
    s_TK = np.empty((len(x_TD), len(w_KD)))
    for code in np.unique(scale["norm"]):
        of_norm_K = scale["norm"] == code
        s_TK[:, of_norm_K] = canonical.normalised(NORMS[int(code)], x_TD) @ w_KD[of_norm_K].T
    return np.where(s_TK > scale["tau"], np.maximum(scale["gain"] * s_TK + scale["bias"], scale["lo"]), 0.0)


def compared(limit: Limit | None, act_T: F32, prompt_tokens: int) -> F32:
    """At each token what a limit looks at, NaN where that does not count; without a limit the activations.

    A window of a rolling mean lies in consecutive tokens that all count, and stands at its last.
    """
    position_T = np.arange(len(act_T))
    phases: dict[str, Bool] = {
        "any": np.ones(len(act_T), bool),
        "prompt": position_T < prompt_tokens,
        "output": position_T >= prompt_tokens,
    }
    window = limit.window_tokens if limit else 1
    value_T = np.where(phases[limit.phase if limit else "any"], act_T, np.float32(np.nan))
    mean_T = np.full(len(act_T), np.nan, np.float32)
    if len(value_T) >= window:
        mean_T[window - 1 :] = np.lib.stride_tricks.sliding_window_view(value_T, window).mean(axis=1)
    return mean_T


def _statistic(limit: Limit | None, act_T: F32, prompt_tokens: int) -> tuple[float, int]:
    """The statistic that a limit is on, and the position that it stands at; (NaN, 0) where no token counts."""
    mean_T = compared(limit, act_T, prompt_tokens)
    if np.isnan(mean_T).all():
        return float("nan"), 0
    at = int(np.nanargmax(mean_T))
    return float(mean_T[at]), at
