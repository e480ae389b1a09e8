"""From the sums of trusted traffic to what the detectors compare with: rates by the hour, tolerances, shapes, pairs.

Shape legend: F features, L levels, H hours of the week, S strata, K alternatives, C cells, P paired features,
N canaries.

A detector's null is never one number. It is every rate that the baseline's own uncertainty and the traffic's own slow
movement allow, so that neither becomes a page:
- `phi` is the dispersion index: how much more windows scatter than independent requests would (conversations, batches
  of one client). Every log-likelihood ratio is divided by it.
- `slow` is the standard deviation of hourly rates beyond that, relative to the rate (traffic mix, and the season where
  the baseline is too short to know it). The null reaches `DriftTolerance.season_sds` of it to both sides.
- with A active requests the rate itself is known to 1 / sqrt(A / phi) only; the null covers its confidence limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from latentwatch.aggregate.counts import COUNT_LEVELS, Layout, above
from latentwatch.arrays import Array
from latentwatch.drift.common import CommonNull
from latentwatch.drift.sums import HOURS, TrafficSums

MIN_REQUESTS: Final = 500
"""Fewer make no baseline: a feature of 1 % would have fired in 5 of them."""
MIN_ACTIVE: Final = 30
"""Below so many active requests a feature is `THIN`: a fall of its rate cannot be told from chance."""
BIN_ACTIVE: Final = 400
"""Active requests that an hour needs for a rate of its own: it is then known to 5 %."""
MIN_DIFFERENCES: Final = 30
"""Neighbouring blocks that a dispersion index needs: it is then known to 20 %."""
_MIN_HOURS: Final = 48
"""Hours that the slow movement is measured from; with fewer, `DriftTolerance.static_tolerance` stands in."""


class Season(IntEnum):
    """How finely a feature's rate is known."""

    STATIC = 0
    HOUR_OF_DAY = 1
    HOUR_OF_WEEK = 2


_BINS: Final = {
    Season.STATIC: np.zeros(HOURS, np.int64),
    Season.HOUR_OF_DAY: np.arange(HOURS) % 24,
    Season.HOUR_OF_WEEK: np.arange(HOURS),
}
"""Which hours of the week share a rate."""


class Status(IntEnum):
    """What a baseline can say of a feature."""

    OK = 0
    THIN = 1
    NEVER_FIRED = 2


@dataclass(frozen=True)
class DriftTolerance:
    """What is tolerated; ratios are of rates. Stored with the baseline."""

    tolerance: float = 1.05
    """The least change of rate that may ever be worth a page: nulls reach so far even where the data are endless."""
    static_tolerance: float = 1.35
    """Where the baseline is too short to have measured slow movement: a season of +-30 % stays below it."""
    season_sds: float = 3.75
    """Standard deviations of slow movement that the null reaches to."""
    static_sds: float = 2.0
    """The same while the season is unknown and inside that movement: a sine's peak is at 1.4."""
    confidence_sds: float = 3.5
    """Of the baseline's own uncertainty."""
    shape_tolerance: float = 0.005
    """By how much a shape's likelihood ratio may rise on average without meaning anything."""
    pair_tolerance: float = 1.2


RISES: Final = (1.2, 1.5, 3.0, 10.0)
"""Rate ratios that the rate detector is tuned to; its falls are to their inverses, without the last."""
TILTS: Final = (0.4, -0.4)
"""Shifts of the value's distribution, in its own standard deviations."""
TAIL_QUANTILE: Final = 0.995
HEAVY_SHARE: Final = 0.02
"""Share of values that the tail detector is tuned to find beyond `TAIL_QUANTILE`, on top of those that belong there."""
PAIR_LIFT: Final = 3.0


@dataclass(frozen=True)
class Reference:
    """What the detectors need of a baseline; every array is read only by agreement."""

    level_F: Array
    """The level of the layout that makes a request `active` for a feature."""
    rate_F: Array
    """Active requests / requests, over everything."""
    active_F: Array
    """Active requests in the baseline."""
    phi_F: Array
    slow_F: Array
    season_F: Array
    status_F: Array
    rate_HF: Array
    high_HF: Array
    """The largest rate that is still no drift."""
    low_HF: Array
    """The smallest; 0 where a fall cannot be told."""
    stratum_SF: Array
    """Rate in each adapter's traffic / rate."""
    strata: tuple[str, ...]
    shape_KFC: Array
    """What one value in each cell adds to the log-likelihood ratio of each alternative shape."""
    pair_PP: Array
    """Largest lift that is still no drift: joint activity / what the two rates alone would give; inf where unknown."""
    pair_phi_PP: Array
    canary_N: Array
    canary_low_NF: Array
    """Values of a canary prompt outside low..high deviate."""
    canary_high_NF: Array
    common: CommonNull
    """Of what all features have in common."""

    def expected_GF(self, rate_HF: Array, hour: int, stratum_G: Array) -> Array:
        """A rate table's row for this hour, adjusted to each group's adapter."""
        scaled: Array = rate_HF[hour] * self.stratum_SF[stratum_G]
        return np.minimum(scaled, 1.0)


def fit(observed: TrafficSums, layout: Layout, options: DriftTolerance) -> Reference:
    """Everything that the detectors compare with. Raises ValueError with less than MIN_REQUESTS requests."""
    if observed.requests < MIN_REQUESTS:
        raise ValueError(f"{observed.requests} requests, at least {MIN_REQUESTS} are needed")
    observed.finish_hour()
    F = layout.features
    total_FB = observed.levels_FB
    requests_F = np.maximum(total_FB.sum(axis=1), 1)
    level_F = _levels(above(total_FB) / requests_F[:, None], layout.sparse_F)
    pick = (np.arange(F), level_F)
    active_F = above(total_FB)[pick]
    rate_F = active_F / requests_F
    phi_F = _dispersion(observed, rate_F, pick)
    season_F, slow_F, active_HF, requests_HF = _season(observed, rate_F, phi_F, pick)
    rate_HF, high_HF, low_HF = _rates(active_HF, requests_HF, season_F, slow_F, phi_F, observed, options)
    stratum_SF = _strata(observed, rate_F, phi_F, pick)
    # An hour's rate is that of the adapters that it usually has; what they contribute is put back window by window.
    usual_HF = _usual(observed.hour_strata_HS, stratum_SF, season_F)
    rate_HF, high_HF, low_HF = rate_HF / usual_HF, high_HF / usual_HF, low_HF / usual_HF
    status_F = np.where(active_F == 0, Status.NEVER_FIRED, np.where(active_F < MIN_ACTIVE, Status.THIN, Status.OK))
    low_HF = np.where(status_F == Status.OK, low_HF, 0.0)
    pair_PP, pair_phi_PP = _pairs(observed, layout, phi_F, options)
    canary_low_NF, canary_high_NF = _canaries(observed)
    return Reference(
        level_F=level_F,
        rate_F=rate_F,
        active_F=active_F,
        phi_F=phi_F,
        slow_F=slow_F,
        season_F=season_F,
        status_F=status_F,
        rate_HF=rate_HF,
        high_HF=high_HF,
        low_HF=low_HF,
        stratum_SF=stratum_SF,
        strata=observed.strata,
        shape_KFC=_shapes(observed.cells_FC, phi_F, options),
        pair_PP=pair_PP,
        pair_phi_PP=pair_phi_PP,
        canary_N=observed.canary_N.copy(),
        canary_low_NF=canary_low_NF,
        canary_high_NF=canary_high_NF,
        common=_common(observed, level_F, active_F, season_F, options),
    )


def poisson_limits(count: Array, sds: float) -> tuple[Array, Array]:
    """Lower and upper limit of the mean of a Poisson count, `sds` standard deviations of a normal apart from it.

    Wilson & Hilferty's cube root (PNAS 17 (1931) 684-688); for counts of 1 and more within 3 % of the exact limits, or
    0.1 of a low one.
    """
    n = np.asarray(count, np.float64)
    above_one = n + 1
    upper = above_one * (1 - 1 / (9 * above_one) + sds / (3 * np.sqrt(above_one))) ** 3
    safe = np.maximum(n, 1e-9)
    root = np.where(n > 0, 1 - 1 / (9 * safe) - sds / (3 * np.sqrt(safe)), 0.0)
    lower = n * np.maximum(root, 0.0) ** 3
    return lower, upper


def _levels(share_FL: Array, sparse_F: Array) -> Array:
    """The lowest level that not too many requests are above: half for sparse features, a fifth for dense ones."""
    most_F = np.where(sparse_F, 0.5, 0.2)
    below_FL = share_FL <= most_F[:, None]
    lowest_F = np.where(below_FL.any(axis=1), below_FL.argmax(axis=1), len(COUNT_LEVELS) - 1)
    lowest: Array = np.minimum(lowest_F, share_FL.shape[1] - 1)
    return lowest


def _dispersion(observed: TrafficSums, rate_F: Array, pick: tuple[Array, Array]) -> Array:
    """How much more windows scatter than independent requests would; the largest over the scales, at least 1."""
    variance_F = np.maximum(rate_F * (1 - rate_F), 1e-12)
    phi_F = np.ones(len(rate_F))
    for z, differences in enumerate(observed.differences_Z.tolist()):
        if differences >= MIN_DIFFERENCES:
            phi_F = np.maximum(phi_F, observed.difference_ZFL[z][pick] / (differences * variance_F))
    return phi_F


def _season(
    observed: TrafficSums, rate_F: Array, phi_F: Array, pick: tuple[Array, Array]
) -> tuple[Array, Array, Array, Array]:
    """Season and slow movement per feature, and the active requests and requests of each hour's bin, [H, F]."""
    levels_HFB = observed.hour_levels_HFB
    active_HF = above(levels_HFB)[(slice(None), *pick)].astype(np.float64)
    requests_HF = levels_HFB.sum(axis=2).astype(np.float64)
    square_HF = observed.hour_square_HFL[(slice(None), *pick)]
    season_F = np.full(len(rate_F), Season.STATIC)
    days = observed.span_seconds / 86400
    for season, least_days in ((Season.HOUR_OF_DAY, 2), (Season.HOUR_OF_WEEK, 14)):
        bins_H = _BINS[season]
        binned = np.zeros((bins_H.max() + 1, len(rate_F)))
        np.add.at(binned, bins_H, active_HF)
        season_F[(days >= least_days) & (binned.min(axis=0) >= BIN_ACTIVE)] = season
    bin_active_HF, bin_requests_HF = np.empty_like(active_HF), np.empty_like(requests_HF)
    slow_F = np.zeros(len(rate_F))
    for season, bins_H in _BINS.items():
        (chosen,) = np.nonzero(season_F == season)
        if not len(chosen):
            continue
        sums = [np.zeros((bins_H.max() + 1, len(chosen))) for _ in range(3)]
        for total, part in zip(sums, (active_HF, requests_HF, square_HF), strict=True):
            np.add.at(total, bins_H, part[:, chosen])
        active, requests, square = sums
        bin_active_HF[:, chosen], bin_requests_HF[:, chosen] = active[bins_H], requests[bins_H]
        hours = np.bincount(bins_H, weights=observed.hour_count_H)
        degrees = max(1.0, float(np.maximum(hours - 1, 0).sum()))
        scatter = (square - active**2 / np.maximum(requests, 1)).sum(axis=0) / degrees
        chance = phi_F[chosen] * rate_F[chosen] * (1 - rate_F[chosen])
        an_hour = requests.sum(axis=0) / max(1, int(observed.hour_count_H.sum()))
        excess = (scatter - chance) / np.maximum(an_hour * rate_F[chosen] ** 2, 1e-12)
        slow_F[chosen] = np.sqrt(np.maximum(excess, 0.0))
    return season_F, slow_F, bin_active_HF, bin_requests_HF


def _common(
    observed: TrafficSums, level_F: Array, active_F: Array, season_F: Array, options: DriftTolerance
) -> CommonNull:
    """How far all features together scattered and moved in the baseline: the most over the levels that they use."""
    if not (observed.differences_Z >= MIN_DIFFERENCES).any() or not active_F.any():
        return CommonNull(1.0, np.inf, 0.0)
    # Together they follow a season no more finely than those do that are a tenth of them.
    of_season = [active_F[season_F == season].sum() for season in Season]
    season = next((s for s in Season if of_season[s] >= 0.1 * active_F.sum()), Season.STATIC)
    found = [_together(observed, level, _BINS[season]) for level in np.unique(level_F).tolist()]
    phi, slow = max(one[0] for one in found), max(one[1] for one in found)
    sds = options.static_sds if season == Season.STATIC else options.season_sds
    least = options.tolerance if observed.hour_count_H.sum() >= _MIN_HOURS else options.static_tolerance
    uncertain = options.confidence_sds * float(np.sqrt(phi / active_F.sum()))
    reach = max(least, float(np.exp(sds * slow))) * (1 + uncertain)
    return CommonNull(phi, reach, 1 / reach)


def _together(observed: TrafficSums, level: int, bins_H: Array) -> tuple[float, float]:
    """Dispersion of the requests above a level, of all features together, and how far the hours moved beyond it."""
    columns = (
        above(observed.hour_levels_HFB)[:, :, level].sum(axis=1),
        observed.hour_levels_HFB.sum(axis=2).max(axis=1),
        observed.hour_together_HL[:, level],
        observed.hour_count_H,
    )
    binned = np.zeros((bins_H.max() + 1, len(columns)))
    np.add.at(binned, bins_H, np.stack(columns, axis=1))
    active_B, requests_B, square_B, hours_B = binned.T
    mean = max(float(active_B.sum() / requests_B.sum()), 1e-12)
    known_Z = observed.differences_Z >= MIN_DIFFERENCES
    phi = max(1.0, float((observed.together_ZL[known_Z, level] / observed.differences_Z[known_Z]).max()) / mean)
    scatter = float((square_B - active_B**2 / np.maximum(requests_B, 1)).sum())
    excess = scatter / max(1.0, float(np.maximum(hours_B - 1, 0).sum())) - phi * mean
    an_hour = float(requests_B.sum()) / max(1.0, float(hours_B.sum()))
    return phi, float(np.sqrt(max(excess, 0.0) / (an_hour * mean**2)))


def _rates(
    active_HF: Array,
    requests_HF: Array,
    season_F: Array,
    slow_F: Array,
    phi_F: Array,
    observed: TrafficSums,
    options: DriftTolerance,
) -> tuple[Array, Array, Array]:
    """The rate of each hour, and the largest and smallest that are still no drift; [H, F]."""
    sds_F = np.where(season_F == Season.STATIC, options.static_sds, options.season_sds)
    least = options.tolerance if observed.hour_count_H.sum() >= _MIN_HOURS else options.static_tolerance
    tolerance_F = np.maximum(least, np.exp(sds_F * slow_F))
    requests_HF = np.maximum(requests_HF, 1)
    lower_HF, upper_HF = poisson_limits(active_HF / phi_F, options.confidence_sds)
    high_HF = np.minimum(phi_F * upper_HF / requests_HF * tolerance_F, 0.999)
    return active_HF / requests_HF, high_HF, phi_F * lower_HF / requests_HF / tolerance_F


def _strata(observed: TrafficSums, rate_F: Array, phi_F: Array, pick: tuple[Array, Array]) -> Array:
    """Rate in each adapter's traffic / rate; 1 where the adapter has too little traffic to tell."""
    active_SF = above(observed.strata_SFB)[(slice(None), *pick)]
    requests_SF = observed.strata_SFB.sum(axis=2)
    known_SF = (active_SF >= BIN_ACTIVE * phi_F) & (rate_F > 0)
    ratio_SF = active_SF / np.maximum(requests_SF, 1) / np.maximum(rate_F, 1e-12)
    # A large adapter without the feature is known to be without it, too.
    none_SF = (active_SF < BIN_ACTIVE * phi_F) & (requests_SF * rate_F >= 4 * BIN_ACTIVE * phi_F)
    return np.where(known_SF | none_SF, np.maximum(ratio_SF, 1e-3), 1.0)


def _usual(hour_strata_HS: Array, stratum_SF: Array, season_F: Array) -> Array:
    """Mean over the requests of each hour's bin of their adapters' rates / rate, [H, F]; 1 without traffic."""
    usual_HF = np.ones((HOURS, len(season_F)))
    for season, bins_H in _BINS.items():
        binned = np.zeros((bins_H.max() + 1, hour_strata_HS.shape[1]))
        np.add.at(binned, bins_H, hour_strata_HS)
        requests = binned.sum(axis=1, keepdims=True)
        mean = np.where(requests > 0, binned @ stratum_SF / np.maximum(requests, 1), 1.0)
        usual_HF[:, season_F == season] = mean[bins_H][:, season_F == season]
    return np.maximum(usual_HF, 1e-3)


def _shapes(cells_FC: Array, phi_F: Array, options: DriftTolerance) -> Array:
    """Log-likelihood ratio per cell of each alternative shape against the baseline's, with its guard taken off.

    The guard is the logarithm of the largest mean that the ratio has over shapes that the baseline's own uncertainty
    allows: without it, rare cells of rare features page (an estimated shape is not the true one).
    """
    C = cells_FC.shape[1]
    values_F = cells_FC.sum(axis=1)
    share_FC = (cells_FC + 0.5 / C) / (values_F + 0.5)[:, None]
    middle_FC = np.clip(np.cumsum(share_FC, axis=1) - share_FC / 2, 1e-4, 1 - 1e-4)
    # The logistic's quantile, scaled to a unit variance, is close enough to the normal's.
    score_FC = np.log(middle_FC / (1 - middle_FC)) * (np.sqrt(3) / np.pi)
    alternatives = []
    for tilt in TILTS:
        tilted_FC = share_FC * np.exp(tilt * np.clip(score_FC, -3, 3))
        alternatives.append(tilted_FC / tilted_FC.sum(axis=1, keepdims=True))
    tail_FC = share_FC * (middle_FC > TAIL_QUANTILE)
    tail_FC = tail_FC / np.maximum(tail_FC.sum(axis=1, keepdims=True), 1e-12)
    alternatives.append((1 - HEAVY_SHARE) * share_FC + HEAVY_SHARE * tail_FC)
    weights = []
    for other_FC in alternatives:
        ratio_FC = other_FC / share_FC
        spread_F = np.sqrt((share_FC * (ratio_FC - 1) ** 2).sum(axis=1) * phi_F / np.maximum(values_F, 1))
        guard_F = np.log1p(options.confidence_sds * spread_F + options.shape_tolerance)
        weights.append((np.log(ratio_FC) - guard_F[:, None]) / phi_F[:, None])
    return np.where((values_F >= MIN_ACTIVE)[:, None], np.array(weights), -1.0)


def _pairs(observed: TrafficSums, layout: Layout, phi_F: Array, options: DriftTolerance) -> tuple[Array, Array]:
    """The largest lift of each pair that is still no drift, and its dispersion; inf off the upper triangle."""
    together_PP = observed.coactive_PP.astype(np.float64)
    active_P = np.diag(together_PP)
    phi_P = phi_F[layout.pairs_P]
    phi_PP = np.maximum(phi_P[:, None], phi_P[None, :])
    expected_PP = active_P[:, None] * active_P[None, :] / max(observed.requests, 1)
    _, upper_PP = poisson_limits(together_PP / phi_PP, options.confidence_sds)
    known_PP = np.triu(np.ones_like(phi_PP), 1).astype(bool) & (expected_PP > 0)
    lift_PP = np.divide(
        options.pair_tolerance * phi_PP * upper_PP, expected_PP, out=np.full_like(phi_PP, np.inf), where=known_PP
    )
    return lift_PP, phi_PP


def _canaries(observed: TrafficSums) -> tuple[Array, Array]:
    """The range of values that a canary prompt's runs may have: 6 standard deviations, and never less than 5 %."""
    runs_N1 = np.maximum(observed.canary_N, 1)[:, None]
    mean_NF = observed.canary_sum_NF / runs_N1
    spread_NF = np.sqrt(np.maximum(observed.canary_square_NF / runs_N1 - mean_NF**2, 0.0))
    # 5 %: batches of other sizes round otherwise, and an activation near its threshold may go out: one cell of values.
    room_NF = np.maximum(6 * spread_NF, np.maximum(0.05 * np.abs(mean_NF), 0.02))
    return mean_NF - room_NF, mean_NF + room_NF
