"""Whether the rows of a source say what its own library says, asked at build time on random tokens.

A reader that misreads somebody's file gives numbers that look like numbers. Where the library is installed it is the
judge: it reads the same files with its own loader, and a difference refuses the source. Where it is not, or cannot read
them, the card says so.

Legend: T tokens, D d_model, K watched features of a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from latentwatch.arrays import F64
from latentwatch.errors import RefusalReason
from latentwatch.watchlist import canonical, topk, upstream
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.selection import SourceChoice
from latentwatch.watchlist.sources import Source

TOKENS: Final = 48
SCALES: Final = (0.1, 1.0, 10.0, 100.0)
"""Of the random tokens, in turn: thresholds and biases are in units that nobody knows beforehand."""
MAX_RELATIVE_ERROR: Final = 1e-4
"""Of the sum of magnitudes: what float32 sums leave, tenfold."""


class _NoJudge(Exception):
    """The library failed for a reason that is not the source's."""


def checked(choice: SourceChoice, source: Source, index_K: Sequence[int]) -> str:
    """Against what the rows were checked, in words for the card.

    Raises: WatchlistRefused: the library encodes something else.
    """
    answer = upstream.load(choice, source)
    if answer.encode is None:
        return f"unverified: {answer.library}"
    x_TD = tokens(source.about.d_in)
    rows = source.rows(index_K)
    kth_T = None if source.about.k is None else topk.kth_largest(source, x_TD, source.about.k)
    ours_TK, margin_TK = _encoded(rows, x_TD, kth_T)
    try:
        theirs_TK = _asked(choice, source, answer, x_TD)[:, list(index_K)]
    except _NoJudge as none:
        return f"unverified: {answer.library} cannot be asked ({none})"
    wrong = _wrong(ours_TK, theirs_TK, margin_TK, _size(rows, x_TD))
    if wrong is not None:
        t, i = wrong
        raise choice.location.refuse(
            f"row {index_K[i]} scores {ours_TK[t, i]:.6g} on a random token of length "
            f"{np.linalg.norm(x_TD[t]):.4g}, and {answer.library} gives {theirs_TK[t, i]:.6g}",
            "Check 'format' and 'options'. If both are right, this reader misreads the file: please report it.",
            RefusalReason.SOURCE_NUMBERS,
        )
    return answer.library


def _asked(choice: SourceChoice, source: Source, answer: upstream.Upstream, x_TD: F64) -> F64:
    """What the library encodes, [T, F]; of another width than ours it has read another source."""
    assert answer.encode is not None, "only a library that can be asked is asked"
    try:
        theirs_TF = answer.encode(x_TD)
        found = f"{theirs_TF.shape[-1]} activations of a token"
    except (RuntimeError, ValueError, IndexError) as error:
        why = " ".join(str(error).split())[:120]
        if isinstance(error, NotImplementedError):  # a RuntimeError that says nothing of the source
            raise _NoJudge(f"{type(error).__name__}: {why}") from error
        theirs_TF, found = np.zeros((0, 0)), f"an error ({why})"
    except Exception as error:
        # A library that lacks a package, a kernel or an attribute of another version fails only when it computes, with
        # nearly anything; that says nothing of the source.
        raise _NoJudge(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    if theirs_TF.shape != (len(x_TD), source.about.width):
        raise choice.location.refuse(
            f"{answer.library} gives {found} of width {x_TD.shape[1]}, and {source.about.width} are read here",
            "Check 'format' and 'options'.",
            RefusalReason.SOURCE_NUMBERS,
        )
    return theirs_TF


def tokens(d_model: int) -> F64:
    """Random tokens in float32 values, the same each time, [T, D]."""
    rng = np.random.default_rng(0)
    x_TD = rng.normal(size=(TOKENS, d_model)) + rng.normal(size=d_model)
    return np.asarray(np.float32(x_TD * np.resize(SCALES, TOKENS)[:, None]), np.float64)


def _encoded(rows: EncoderRows, x_TD: F64, kth_T: F64 | None) -> tuple[F64, F64]:
    """By the authors' formula in float64, and how far each score is from not firing or firing, both [T, K]."""
    act_TK = canonical.authors(rows, x_TD)
    if rows.dense:
        return act_TK, np.full(act_TK.shape, np.inf)
    n_TD = canonical.normalised(rows.norm, x_TD)
    u_TK = (n_TD if rows.offset_D is None else n_TD - rows.offset_D) @ rows.w_KD.T
    margin_TK = np.abs(u_TK - rows.gate_K) * rows.gain_K
    if kth_T is None:
        return act_TK, margin_TK
    rank_K = 1.0 if rows.rank_K is None else rows.rank_K
    from_kth_TK = np.abs(act_TK - kth_T[:, None] / rank_K)
    return np.where(act_TK * rank_K >= kth_T[:, None], act_TK, 0.0), np.minimum(margin_TK, from_kth_TK)


def _size(rows: EncoderRows, x_TD: F64) -> F64:
    """The size of what is summed for each score, which its rounding is in proportion to, [T, K]."""
    n_TD = np.abs(canonical.normalised(rows.norm, x_TD))
    if rows.offset_D is not None:
        n_TD = n_TD + np.abs(rows.offset_D)
    return np.asarray(n_TD @ np.abs(rows.w_KD).T * rows.gain_K + np.abs(rows.bias_K))


def _wrong(ours_TK: F64, theirs_TK: F64, margin_TK: F64, size_TK: F64) -> tuple[int, int] | None:
    """The token and row of the largest difference that rounding cannot explain; None if there is none.

    A score nearer to its gate than rounding may fire on one side only.
    """
    allowed_TK = MAX_RELATIVE_ERROR * np.maximum(size_TK, 1e-6)
    error_TK = np.abs(ours_TK - theirs_TK) / allowed_TK
    one_side_TK = (ours_TK != 0) != (theirs_TK != 0)
    error_TK = np.where(one_side_TK & (margin_TK <= allowed_TK), 0.0, error_TK)
    if np.isfinite(error_TK).all() and error_TK.max(initial=0.0) <= 1:
        return None
    t, i = np.unravel_index(np.nan_to_num(error_TK, nan=np.inf).argmax(), error_TK.shape)
    return int(t), int(i)
