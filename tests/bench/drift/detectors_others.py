"""The usual detectors on the same windows: PSI, KS, Page-Hinkley, ADWIN, CUSUM. Each gives one number per feature.

What they need to know of normal traffic they get from the same baseline as ours: one rate and one histogram a feature.
PSI and KS look at the last hour, since a minute of a rare feature is too little for either.

Shape legend: F features, C cells, B bins, W windows kept.
"""

from __future__ import annotations

import numpy as np
from latentwatch.drift.detection import Window
from latentwatch.drift.detectors import binomial_llr
from latentwatch.drift.reference import Reference
from latentwatch.drift.sums import hour_of_week
from river.drift import ADWIN

HOUR_WINDOWS = 60


class Detector:
    """`statistic` after each window; an alarm at or above `limit` resets the features that raised it."""

    name = ""

    def __init__(self, reference: Reference, cells_FC: np.ndarray) -> None:
        self.reference = reference
        self.rate_F = np.maximum(reference.rate_F, 1e-9)
        self.limit = np.inf

    def statistic(self, window: Window) -> np.ndarray:
        raise NotImplementedError

    def reset(self, alarm_F: np.ndarray) -> None:
        raise NotImplementedError

    def counts(self, window: Window) -> tuple[np.ndarray, float]:
        levels_FB = window.counts.levels_GFB.sum(axis=0)
        return levels_FB[:, 1], float(levels_FB[0].sum())


class Cusum(Detector):
    """Page's test for a rate of 1.5 times or 1 / 1.5 of a constant baseline, on requests."""

    name = "CUSUM"

    def __init__(self, reference: Reference, cells_FC: np.ndarray) -> None:
        super().__init__(reference, cells_FC)
        self.walk_2F = np.zeros((2, len(self.rate_F)))

    def rates(self, window: Window) -> np.ndarray:
        return self.rate_F

    def statistic(self, window: Window) -> np.ndarray:
        active_F, requests = self.counts(window)
        rate_F = np.maximum(self.rates(window), 1e-9)
        for way, ratio in enumerate((1.5, 1 / 1.5)):
            self.walk_2F[way] += binomial_llr(active_F, requests, rate_F, np.minimum(rate_F * ratio, 0.999))
        np.maximum(self.walk_2F, 0, out=self.walk_2F)
        return self.walk_2F.max(axis=0)

    def reset(self, alarm_F: np.ndarray) -> None:
        self.walk_2F[:, alarm_F] = 0


class SeasonalCusum(Cusum):
    """The same against our hourly rates, of the adapters that the window has."""

    name = "CUSUM, hourly rates"

    def rates(self, window: Window) -> np.ndarray:
        requests_GF = window.counts.requests_GF
        hour = hour_of_week(window.end_seconds)
        expected_GF = requests_GF * self.reference.expected_GF(self.reference.rate_HF, hour, window.stratum_G)
        return expected_GF.sum(axis=0) / np.maximum(requests_GF.sum(axis=0), 1)


class PageHinkley(Detector):
    """Page & Hinkley on the standardised rate, two-sided, with river's update of the mean."""

    name = "Page-Hinkley"
    DELTA, ALPHA = 0.1, 0.9999

    def __init__(self, reference: Reference, cells_FC: np.ndarray) -> None:
        super().__init__(reference, cells_FC)
        F = len(self.rate_F)
        self.n_F, self.mean_F, self.walk_2F = np.zeros(F), np.zeros(F), np.zeros((2, F))

    def statistic(self, window: Window) -> np.ndarray:
        return self.update(standardised(self, window))

    def update(self, x_F: np.ndarray) -> np.ndarray:
        self.n_F += 1
        self.mean_F += (x_F - self.mean_F) / self.n_F
        self.walk_2F[0] = np.maximum(0, self.ALPHA * self.walk_2F[0] + x_F - self.mean_F - self.DELTA)
        self.walk_2F[1] = np.maximum(0, self.ALPHA * self.walk_2F[1] - x_F + self.mean_F - self.DELTA)
        return self.walk_2F.max(axis=0)

    def reset(self, alarm_F: np.ndarray) -> None:
        self.n_F[alarm_F] = self.mean_F[alarm_F] = 0
        self.walk_2F[:, alarm_F] = 0


class LastHour(Detector):
    """Counts of the last hour in bins, the first of which is "not active"."""

    def __init__(self, reference: Reference, cells_FC: np.ndarray) -> None:
        super().__init__(reference, cells_FC)
        share_C = cells_FC.sum(axis=0) / cells_FC.sum()
        self.bin_C = self.bins(np.cumsum(share_C) - share_C / 2)
        self.one_hot_CB = np.eye(self.bin_C.max() + 1)[self.bin_C]
        active_FB = cells_FC @ self.one_hot_CB + 0.5
        share_FB = active_FB / active_FB.sum(axis=1, keepdims=True) * self.rate_F[:, None]
        self.expected_FB = np.concatenate((1 - self.rate_F[:, None], share_FB), axis=1)
        self.ring_WFB = np.zeros((HOUR_WINDOWS, *self.expected_FB.shape))
        self.sum_FB = np.zeros(self.expected_FB.shape)
        self.at = 0
        self.quiet_F = np.zeros(len(self.rate_F))

    def bins(self, middle_C: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def distance(self, live_FB: np.ndarray, requests: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def statistic(self, window: Window) -> np.ndarray:
        active_F, requests = self.counts(window)
        now_FB = np.concatenate(((requests - active_F)[:, None], window.counts.cells_FC @ self.one_hot_CB), axis=1)
        self.sum_FB += now_FB - self.ring_WFB[self.at % HOUR_WINDOWS]
        self.ring_WFB[self.at % HOUR_WINDOWS] = now_FB
        self.at += 1
        self.quiet_F -= 1
        if self.at < HOUR_WINDOWS:
            return np.zeros(len(self.rate_F))
        return np.where(self.quiet_F > 0, 0.0, self.distance(self.sum_FB, self.sum_FB.sum(axis=1)))

    def reset(self, alarm_F: np.ndarray) -> None:
        """The hour that raised the alarm raises no other."""
        self.quiet_F[alarm_F] = HOUR_WINDOWS


class Psi(LastHour):
    """Population stability index of ten equally likely bins and "not active", half a count in every bin."""

    name = "PSI"

    def bins(self, middle_C: np.ndarray) -> np.ndarray:
        return np.minimum((middle_C * 10).astype(int), 9)

    def distance(self, live_FB: np.ndarray, requests: np.ndarray) -> np.ndarray:
        share_FB = (live_FB + 0.5) / (requests[:, None] + 0.5 * live_FB.shape[1])
        return ((share_FB - self.expected_FB) * np.log(share_FB / self.expected_FB)).sum(axis=1)


class Ks(LastHour):
    """Kolmogorov and Smirnov's distance between distributions over requests, times the root of their number."""

    name = "KS"

    def bins(self, middle_C: np.ndarray) -> np.ndarray:
        return np.minimum((middle_C * 32).astype(int), 31)

    def distance(self, live_FB: np.ndarray, requests: np.ndarray) -> np.ndarray:
        gap_FB = np.cumsum(live_FB / requests[:, None] - self.expected_FB, axis=1)
        return np.abs(gap_FB).max(axis=1) * np.sqrt(requests)


class Adwin(Detector):
    """river's ADWIN on the standardised rate; its `delta` takes the place of a limit. 1 on a change, else 0."""

    name = "ADWIN"

    def __init__(self, reference: Reference, cells_FC: np.ndarray, delta: float = 0.002) -> None:
        super().__init__(reference, cells_FC)
        self.delta, self.limit = delta, 1.0
        self.each = [ADWIN(delta=delta) for _ in self.rate_F]

    def statistic(self, window: Window) -> np.ndarray:
        changed_F = np.zeros(len(self.each))
        for i, (adwin, x) in enumerate(zip(self.each, standardised(self, window).tolist(), strict=True)):
            adwin.update(x)
            changed_F[i] = adwin.drift_detected
        return changed_F

    def reset(self, alarm_F: np.ndarray) -> None:
        for i in np.flatnonzero(alarm_F):
            self.each[i] = ADWIN(delta=self.delta)


def standardised(detector: Detector, window: Window) -> np.ndarray:
    """Active requests, in standard deviations from what the constant rate gives."""
    active_F, requests = detector.counts(window)
    rate_F = detector.rate_F
    return (active_F - requests * rate_F) / np.sqrt(np.maximum(requests * rate_F * (1 - rate_F), 1e-9))


OTHERS = (Cusum, SeasonalCusum, PageHinkley, Psi, Ks)
