"""Gates for TopK encoders, matched on recorded activations and labelled as such.

A TopK encoder lets the k largest features of a token fire, so whether one fires depends on all others, and a watchlist
that scores a few rows cannot know. Where the feature fires, its score is exact. A threshold stands in for the
choice; here it is matched on recorded tokens, and how well it does there is measured and goes on the card.

The threshold that some libraries save beside a TopK encoder is a running mean of batch minima. It passes several
times k features and is not used.

Legend: T tokens, D d_model, K selected features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from latentwatch.arrays import F64, Bool
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Known
from latentwatch.watchlist.location import Location, sha256_of
from latentwatch.watchlist.sources import Source
from latentwatch.watchlist.tensors import SafetensorsFile

CHUNK: Final = 4096
"""Encoder rows held at once: 128 MiB of float64 at d_model 4096."""
_RECORDED: Final = Known(
    used=frozenset(("hook_point",)), unread=dict.fromkeys(("format", "model", "licence"), "a fact for people")
)
MIN_TOKENS: Final = 64
MAX_TOKENS: Final = 65536


@dataclass(frozen=True)
class Calibrated:
    """Rows with a gate each, and how each gate compares with the encoder's own choice."""

    rows: EncoderRows
    notes: tuple[dict[str, object], ...]


def recorded(location: Location, d_model: int, hook_point: HookPoint) -> F64:
    """The tokens of an activations file: tensor x [T, D], optionally with metadata `hook_point`.

    Raises: WatchlistRefused: no such tensor, another width or hook point, or too few or too many tokens.
    """
    tensors = SafetensorsFile(location.file())
    shape = tensors.shape("x")
    metadata = tensors.declare(location, {"x": shape}, beside=_RECORDED)
    stated = metadata.text("hook_point") or str(hook_point)
    if stated != str(hook_point):
        raise location.refuse(f"it was recorded at {stated}, not at {hook_point}", "Record it at this hook point.")
    if len(shape) != 2 or shape[1] != d_model or not MIN_TOKENS <= shape[0] <= MAX_TOKENS:
        raise location.refuse(
            f"tensor x has shape {list(shape)}",
            f"Give {MIN_TOKENS} to {MAX_TOKENS} tokens of width {d_model}, as [tokens, d_model].",
        )
    return tensors.whole("x")


def calibrate(
    source: Source, index_K: Sequence[int], x_TD: F64, activations: Location, match: str, skip: int = 0
) -> Calibrated:
    """Match a threshold per feature on recorded tokens.

    match "rate": the feature passes its threshold on as many tokens as it is among the k largest.
    match "l0":   one threshold for all features, passed by k of them on the average token.
    """
    k = source.about.k
    assert k is not None, "only TopK sources are calibrated"
    x_TD = x_TD[skip:]
    kth_T, l0_threshold = _full_pass(source, x_TD, k)
    rows = source.rows(index_K)
    act_TK = canonical.authors(rows, x_TD)
    rank_TK = act_TK * _rank(rows)
    true_TK = (rank_TK >= kth_T[:, None]) & (rank_TK > 0)
    threshold_K = np.full(len(index_K), l0_threshold) if match == "l0" else _rate_thresholds(rank_TK, true_TK, kth_T)
    gate_K = (threshold_K / _rank(rows) - rows.bias_K) / rows.gain_K
    passed_TK = rank_TK > threshold_K
    shared = {"match": match, "k": k, "tokens": len(x_TD)} | _named(activations)
    notes = tuple(
        shared | _quality(act_TK[:, i], true_TK[:, i], passed_TK[:, i], float(threshold_K[i]))
        for i in range(len(index_K))
    )
    return Calibrated(replace(rows, gate_K=gate_K), notes)


def kth_largest(source: Source, x_TD: F64, k: int) -> F64:
    """The smallest rank that a TopK encoder keeps on each token, [T]; 0 where fewer than k features are positive."""
    return _full_pass(source, x_TD, k)[0]


def _full_pass(source: Source, x_TD: F64, k: int) -> tuple[F64, float]:
    """Each token's k-th largest activation, and the threshold that k activations of the average token pass."""
    tokens = len(x_TD)
    best_Tk = np.zeros((tokens, min(k, source.about.width)))
    best = np.zeros(0)
    keep = k * tokens + 1
    for index in chunks(source.about.width):
        rows = source.rows(index)
        rank_TC = canonical.authors(rows, x_TD) * _rank(rows)
        both = np.concatenate([best_Tk, rank_TC], axis=1)
        best_Tk = np.partition(both, both.shape[1] - best_Tk.shape[1], axis=1)[:, -best_Tk.shape[1] :]
        flat = np.concatenate([best, rank_TC[rank_TC > 0]])
        best = np.partition(flat, len(flat) - keep)[-keep:] if len(flat) > keep else flat
    ordered = np.sort(best)
    threshold = float(ordered[:2].mean()) if len(ordered) == keep else 0.0
    return best_Tk.min(axis=1), threshold


def chunks(width: int) -> Iterator[range]:
    """All feature indices, some thousand at a time."""
    for start in range(0, width, CHUNK):
        yield range(start, min(start + CHUNK, width))


def _rank(rows: EncoderRows) -> F64:
    return np.ones(len(rows.gain_K)) if rows.rank_K is None else rows.rank_K


def _named(activations: Location) -> dict[str, object]:
    return {"activations": activations.text, "activations_sha256": sha256_of(activations.file())}


def _rate_thresholds(rank_TK: F64, true_TK: Bool, kth_T: F64) -> F64:
    fires_K = true_TK.sum(axis=0).tolist()
    return np.array([_rate_threshold(rank_T, fires, kth_T) for rank_T, fires in zip(rank_TK.T, fires_K, strict=True)])


def _rate_threshold(rank_T: F64, fires: int, kth_T: F64) -> float:
    """Passed by exactly `fires` tokens, halfway between the last that passes and the first that does not."""
    ordered = np.sort(rank_T)[::-1]
    if fires == 0:
        # Never among the k largest: it must at least beat all that was seen and a typical k-th largest.
        return float(max(ordered[0], np.median(kth_T)))
    below = ordered[fires] if fires < len(ordered) else 0.0
    return float((ordered[fires - 1] + below) / 2)


def _quality(act_T: F64, true_T: Bool, passed_T: Bool, threshold: float) -> dict[str, object]:
    both = true_T & passed_T
    true, passed, mass = int(true_T.sum()), int(passed_T.sum()), float(act_T[true_T].sum())
    return {
        "threshold": threshold,
        "fires_in_topk": true,
        "fires_here": passed,
        "precision": round(int(both.sum()) / passed, 4) if passed else None,
        "recall": round(int(both.sum()) / true, 4) if true else None,
        "mass": round(float(act_T[both].sum()) / mass, 4) if mass else None,
    }
