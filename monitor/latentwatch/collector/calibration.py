"""From the evidence of trusted traffic to the sums that its collector made of it: for `latentwatch calibrate`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from latentwatch.collector.drift import Drift, DriftSettings
from latentwatch.drift.baseline import Baseline
from latentwatch.errors import BaselineRefused, RefusalReason
from latentwatch.evidence.records import Ended
from latentwatch.facts import is_whole
from latentwatch.watchlist.file import Watchlist

_LAST_WINDOW_SECONDS = 3600.0
"""After the last request, so that its window is over whatever its length."""


def of_evidence(
    watchlist: Watchlist,
    model_name: str,
    ended: Iterable[Ended],
    settings: DriftSettings | None = None,
    what: str = "evidence",
) -> Baseline:
    """A baseline of every request in the store, in the order of their ends; `what` names the store in errors.

    Raises BaselineRefused "baseline_source" where the store does not hold all requests with all their features.
    """
    drift, features = Drift(watchlist, settings or DriftSettings()), len(watchlist.features)
    drift.model_seen(model_name)
    requests = ordinary = 0
    now = 0.0
    for end in ended:
        now, info, rows = end.progress.closed_seconds, end.request.info, end.features.rows
        if not is_whole(info, end.progress):
            continue
        if end.features.left_out:
            raise _refuse(
                what,
                f"a request showed {end.features.left_out} features more than its summary keeps",
                "Calibrate from the collector's address or a recording, which have them all.",
            )
        fired_F, value_F = np.zeros(features, np.int64), np.full(features, np.nan, np.float32)
        fired_F[rows["index"]] = rows["fired"]
        value_F[rows["index"]] = rows["statistic"]
        drift.add(model_name, info.replica, [info.adapter], [info.request_id], fired_F[None], value_F[None], now)
        requests += 1
        ordinary += not end.features.exceeded
    if not requests:
        instead = "Give the folder of the collector that it streams to, and the name that it is served under."
        raise _refuse(what, f"it holds no whole request of model {model_name!r}", instead)
    if not ordinary:
        raise _refuse(
            what,
            f"each of its {requests} requests exceeded a limit: it holds those only",
            "Run the collector with --evidence-keep all, or calibrate from its address.",
        )
    drift.tick(now + _LAST_WINDOW_SECONDS)
    observed = drift.observed(model_name, now)
    assert observed is not None
    return observed


def _refuse(what: str, found: str, instead: str) -> BaselineRefused:
    return BaselineRefused(what, found=found, instead=instead, reason=RefusalReason.BASELINE_SOURCE)
