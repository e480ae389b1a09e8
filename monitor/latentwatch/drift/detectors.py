"""Sequential detectors as functions of arrays: Shiryaev-Roberts e-detectors and the bookkeeping of change points.

Shape legend: F features, K alternatives, D replicas, P features in pairs.

The Shiryaev-Roberts statistic R <- (R + 1) * e^llr, with an llr whose exponential has mean at most 1 while nothing has
changed, satisfies E[R_t] <= t; hence the mean number of windows to the first R >= A is at least A, whatever the
distribution, and an average of such statistics keeps that (Shin, Ramdas & Rinaldo, NEJSDS 2023, e-detectors). A family
of m detectors held to A = m * ARL0 together has a mean run of at least ARL0 windows, without any independence.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from latentwatch.arrays import Array
from latentwatch.drift.reference import RISES

CEILING: Final = 1e30
"""Where a statistic stops, so that a detector can come down again within some hours of a change's end."""
_LLR_BOUND: Final = 60.0
_BEYOND: Final = 1.1
_FAR_BEYOND: Final = 4.0


def shiryaev_roberts(statistic: Array, llr: Array) -> None:
    """One window, in place: R <- min((R + 1) e^llr, CEILING). The shapes broadcast to the statistic's."""
    statistic += 1.0
    statistic *= np.exp(np.clip(llr, -_LLR_BOUND, _LLR_BOUND))
    np.minimum(statistic, CEILING, out=statistic)


def cusum(walk: Array, llr: Array) -> Array:
    """One window of Page's statistic W <- max(W + llr, 0), in place; where it is at 0 now, as bool."""
    walk += llr
    np.clip(walk, 0.0, 1e6, out=walk)
    grounded: Array = walk == 0.0
    return grounded


def binomial_llr(active: Array, requests: Array, null: Array, alternative: Array) -> Array:
    """Log-likelihood ratio of `active` of `requests` at two rates; 0 where they are equal."""
    with np.errstate(divide="ignore", invalid="ignore"):
        llr = active * np.log(alternative / null) + (requests - active) * np.log((1 - alternative) / (1 - null))
    return np.where((null > 0) & (alternative > 0) & (null != alternative), llr, 0.0)


def rate_alternatives(expected_F: Array, high_F: Array, low_F: Array) -> tuple[Array, Array]:
    """Null and alternative rates [K, F] of the rate detector: rises from the largest rate that is no drift, falls from
    the smallest. An alternative inside the null's reach is moved a tenth beyond it, the largest rise farther: of a
    feature that never fired the null is all that is known, and single fires are many times what it allows."""
    beyond = [*[_BEYOND] * (len(RISES) - 1), _FAR_BEYOND]
    rises = [
        np.minimum(np.maximum(expected_F * r, high_F * b), (1 + high_F) / 2) for r, b in zip(RISES, beyond, strict=True)
    ]
    falls = [np.minimum(expected_F / r, low_F / _BEYOND) for r in RISES[:-1]]
    null_KF = np.array([high_F] * len(rises) + [low_F] * len(falls))
    return null_KF, np.array(rises + falls)


def replica_llr(active_DF: Array, expected_DF: Array, phi_F: Array, *, ratio: float, tolerance: float) -> Array:
    """One replica against the fleet, given the fleet's total: is its share `ratio` times the odds that it should be?

    Args: expected_DF: active requests that each replica should have from its own traffic; only the shares count.
    """
    total_F = active_DF.sum(axis=0)
    share_DF = expected_DF / np.maximum(expected_DF.sum(axis=0), 1e-300)
    null_DF, other_DF = _odds(share_DF, tolerance), _odds(share_DF, ratio)
    return binomial_llr(active_DF, total_F, null_DF, other_DF) / phi_F


def pair_llr(together_PP: Array, requests: float, lift_PP: Array, phi_PP: Array, *, ratio: float) -> Array:
    """Joint activity of pairs given their own: Poisson with mean lift * a_i * a_j / n; 0 where the lift is unknown.

    The diagonal of `together_PP` has each feature's own active requests, so a change of rates alone changes nothing.
    """
    active_P = np.diag(together_PP)
    chance_PP = active_P[:, None] * active_P[None, :] / max(requests, 1.0)
    known = np.isfinite(lift_PP)
    mean_PP = np.where(known, lift_PP, 0.0) * chance_PP
    llr: Array = np.where(known, (together_PP * np.log(ratio) - mean_PP * (ratio - 1)) / phi_PP, 0.0)
    return llr


def _odds(share: Array, ratio: float) -> Array:
    scaled: Array = share * ratio / (1 + share * (ratio - 1))
    return scaled
