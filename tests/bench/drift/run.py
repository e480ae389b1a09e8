"""False pages and delays by simulation: `make bench-drift` writes results/drift.json and drift.svg.

Nulls: what a 256-feature watchlist pages for when nothing drifts: several times four months, each time compared with
another baseline of four weeks of the same kind of traffic. Ours runs at the limits that its budget states. The others
get the limit at which they raise one alarm in the calibration month of independent traffic, so that all have the same
measured false-alarm rate there, and then see the other nulls.

Drifts: how long until a page. The features of a run are alike, each by itself one repetition of the experiment; limits
are those of the 256-feature watchlist. For the others all of them drift at once. For ours an eighth of them do, eight
times: what most features do together is another drift, with rows of its own.

`--quick` runs the same code on hours instead of months and writes nothing. `--only` measures the time of one window, or
ours on all nulls and drifts, and writes that into the results that are there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch import __version__
from latentwatch.aggregate.counts import COUNT_LEVELS, Layout, RequestCounts
from latentwatch.drift.detection import COMMON, KINDS, Budget, DetectorState, Window, evidence, update, update_canary
from latentwatch.drift.reference import DriftTolerance, Reference, fit
from latentwatch.drift.sums import CANARIES, TrafficSums

from tests.bench.drift.detectors_others import OTHERS, Adwin, Detector
from tests.bench.drift.detectors_ours import Ours
from tests.bench.drift.plot import drawn
from tests.support.drift_traffic import MONTH_SECONDS, Change, Scenario, Traffic

RESULT = Path(__file__).parents[1] / "results" / "drift.json"
PLOT = RESULT.with_suffix(".svg")
FEATURES, REPLICAS, PAIRED = 256, 8, 64
TOKENS_PER_REQUEST = 300
NULL_SECONDS = 300.0
"""Windows of the nulls and of every baseline. Limits are stated in time: a window's length does not move them."""

UPDATE = "update_ms_1024_features_64_replicas"


@dataclass(frozen=True)
class Size:
    """How long everything runs; seconds of simulated time."""

    baseline: float = 28 * 86400.0
    baselines: int = 3
    """Of each null, and as many times `null`."""
    null: float = 4 * MONTH_SECONDS
    others: float = 10 * 86400.0
    calibration: float = MONTH_SECONDS
    drift: float = 43200.0


FULL, QUICK = Size(), Size(86400.0, 1, 6 * 3600.0, 2 * 3600.0, 2 * 3600.0, 2 * 3600.0)


def swapping(elapsed: float) -> tuple[float, ...]:
    """Two adapters whose shares change places every twelve hours."""
    return (0.7, 0.3) if int(elapsed // 43200) % 2 == 0 else (0.3, 0.7)


def nulls() -> dict[str, Scenario]:
    """Traffic without drift. Rates run from 1 in 10,000 requests to 1 in 50, at 4,000 requests a minute."""
    rates = np.geomspace(1e-4, 2e-2, FEATURES)
    plain = Scenario(rates, 4000 * NULL_SECONDS / 60, NULL_SECONDS, replicas=REPLICAS, pairs=PAIRED)
    two = np.stack((np.linspace(0.5, 1.5, FEATURES), np.linspace(1.5, 0.5, FEATURES)))
    return {
        "independent": plain,
        "season": replace(plain, season=0.3),
        "season and mix": replace(plain, season=0.3, mix_sd=0.1),
        "prompt mix swaps between adapters": replace(plain, adapter_ratio_AF=two, adapter_share=swapping),
        "conversations of 5": replace(plain, conversation=5),
        "heavy users": replace(plain, users=400),
        "common growth": replace(plain, growth_a_month=0.08),
    }


def by_the_minute(scenario: Scenario) -> Scenario:
    """The same traffic in windows of 60 s: what the others run on, since their limits depend on the window."""
    return replace(
        scenario, window_seconds=60.0, requests_per_window=scenario.requests_per_window * 60 / scenario.window_seconds
    )


def calibrated(scenario: Scenario, seconds: float, seed: int) -> tuple[Reference, np.ndarray]:
    """A baseline of this kind of traffic, and the histograms that the others need."""
    return calibrated_on(Traffic(scenario, np.random.default_rng(seed)), seconds)


def calibrated_on(traffic: Traffic, seconds: float) -> tuple[Reference, np.ndarray]:
    """The same on traffic that goes on behind it."""
    scenario = traffic.scenario
    observed = TrafficSums.empty(traffic.layout)
    adapters = scenario.adapter_ratio_AF.shape[0]
    names = [f"adapter {a}" for a in range(adapters)] * scenario.replicas
    for _ in range(int(seconds / scenario.window_seconds)):
        window = traffic.window()
        strata_G = observed.strata_of(names, window.counts.requests_GF.max(axis=1))
        observed.add_window(window.counts, strata_G, window.end_seconds, scenario.window_seconds)
    return fit(observed, traffic.layout, DriftTolerance()), observed.cells_FC


def pages(detectors: Sequence[Any], traffic: Traffic, seconds: float) -> list[int]:
    """Alarms of each over so much traffic without drift; each resets the feature that raised it."""
    found = [0] * len(detectors)
    for _ in range(int(seconds / traffic.scenario.window_seconds)):
        window = traffic.window()
        for i, detector in enumerate(detectors):
            alarm_F = detector.statistic(window) >= detector.limit
            if alarm_F.any():
                found[i] += int(alarm_F.sum())
                detector.reset(alarm_F)
    return found


def calibrate_others(detectors: Sequence[Detector], traffic: Traffic, seconds: float) -> dict[str, float]:
    """The limits at which exactly one feature alarms over so much traffic."""
    highest = [np.zeros(len(detector.rate_F)) for detector in detectors]
    for _ in range(int(seconds / traffic.scenario.window_seconds)):
        window = traffic.window()
        for highest_F, detector in zip(highest, detectors, strict=True):
            np.maximum(highest_F, detector.statistic(window), out=highest_F)
    return {d.name: float(np.nextafter(np.sort(h)[-2], np.inf)) for d, h in zip(detectors, highest, strict=True)}


def poisson_interval(count: int) -> tuple[float, float]:
    """The exact 95 % interval of the mean of a Poisson count."""
    from scipy.stats import chi2

    low = chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    return float(low), float(chi2.ppf(0.975, 2 * count + 2) / 2)


def null_row(name: str, detector: str, count: int, seconds: float) -> dict[str, Any]:
    months = seconds / MONTH_SECONDS
    low, high = poisson_interval(count)
    return {
        "name": name,
        "detector": detector,
        "pages": count,
        "feature_months": round(FEATURES * months, 3),
        "false_pages_per_month": round(count / months, 4),
        "ci95": [round(low / months, 4), round(high / months, 4)],
        "per_feature_month_ci95": [round(low / months / FEATURES, 6), round(high / months / FEATURES, 6)],
    }


def others(reference: Reference, cells_FC: np.ndarray, limits: dict[str, float]) -> list[Detector]:
    """Every other detector at its limit."""
    made: list[Detector] = [kind(reference, cells_FC) for kind in OTHERS]
    for detector in made:
        detector.limit = limits[detector.name]
    return [*made, Adwin(reference, cells_FC, limits[Adwin.name])]


def limits_of_others(size: Size, log: Callable[[str], None]) -> dict[str, float]:
    """The limits at which each raises one alarm in the calibration time; ADWIN's is its delta, to a decade."""
    scenario = nulls()["independent"]
    reference, cells_FC = calibrated(scenario, size.baseline, seed=100)

    def again() -> Traffic:
        return Traffic(by_the_minute(scenario), np.random.default_rng(300))

    limits = calibrate_others([kind(reference, cells_FC) for kind in OTHERS], again(), size.calibration)
    deltas = [10.0**exponent for exponent in range(-3, -13, -1)]
    quiet = (d for d in deltas if pages([Adwin(reference, cells_FC, d)], again(), size.calibration)[0] <= 1)
    limits[Adwin.name] = next(quiet, deltas[-1])
    log(f"limits {limits}")
    return limits


def run_null(name: str, size: Size, log: Callable[[str], None]) -> dict[str, Any]:
    """Ours on one null."""
    scenario = nulls()[name]
    found, by_kind = 0, dict.fromkeys((*KINDS, COMMON), 0)
    for run in range(size.baselines):
        before = Traffic(scenario, np.random.default_rng(_seed(name, run)))
        reference, _ = calibrated_on(before, size.baseline)
        traffic = Traffic(scenario, np.random.default_rng(_seed(name, run) + 1))
        if scenario.growth_a_month:
            traffic.go_on_behind(before)
        ours = Ours(reference, traffic.layout, REPLICAS, scenario.window_seconds)
        found += pages([ours], traffic, size.null)[0] + ours.by_kind[COMMON]
        by_kind = {kind: by_kind[kind] + count for kind, count in ours.by_kind.items()}
        log(f"{name}: {found} pages in {(run + 1) * size.null / MONTH_SECONDS:g} months, {by_kind}")
    row = null_row(name, Ours.name, found, size.baselines * size.null)
    return row | {"by_kind": by_kind, "baselines": size.baselines}


def run_null_of_others(
    name: str, size: Size, limits: dict[str, float], log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The others on one null, with the first of ours' baselines."""
    scenario = nulls()[name]
    before = Traffic(scenario, np.random.default_rng(_seed(name, 0)))
    usual = others(*calibrated_on(before, size.baseline), limits)
    traffic = Traffic(by_the_minute(scenario), np.random.default_rng(_seed(name, 0) + 1))
    if scenario.growth_a_month:
        traffic.go_on_behind(before)
    counts = pages(usual, traffic, size.others)
    rows = [null_row(name, d.name, count, size.others) for d, count in zip(usual, counts, strict=True)]
    log(f"{name}: " + ", ".join(f"{row['detector']} {row['false_pages_per_month']:g}" for row in rows))
    return rows


def _seed(null: str, run: int) -> int:
    return 1000 + 100 * list(nulls()).index(null) + 2 * run


@dataclass(frozen=True)
class Drift:
    """One experiment: traffic, what changes, and how it is described."""

    name: str
    scenario: Scenario
    change: Change


def alike(rate: float, *, requests: float = 4000, seconds: float = 60, features: int = 128, **more: Any) -> Scenario:
    return Scenario(np.full(features, rate), requests, seconds, **more)


def drifts() -> list[Drift]:
    """A feature of 1 % of requests at 4,000 requests a minute, unless the name says otherwise."""
    base = alike(0.01)
    season = alike(0.01, season=0.3)
    # 1 % of a request's 300 tokens. Independent tokens: more than 4 of them fire in 18.5 % of requests; in runs of 8,
    # any fires in 31.3 %. At x1.5 and x3 the same counts give the rates below, relative to those.
    pod: dict[str, Any] = {"requests": 8, "seconds": 10}
    single, runs = _tail(3.0, 4), _tail(0.375, 0)
    return [
        Drift("rate x1.2", base, Change(rate_ratio=lambda _: 1.2)),
        Drift("rate x1.5", base, Change(rate_ratio=lambda _: 1.5)),
        Drift("rate x3", base, Change(rate_ratio=lambda _: 3.0)),
        Drift("rate ramp to x2 in 4 h", base, Change(rate_ratio=lambda t: 1 + min(t / 14400, 1.0))),
        Drift("rate x1.5, in season", season, Change(rate_ratio=lambda _: 1.5)),
        Drift("rate x1.5, in season and mix", replace(season, mix_sd=0.1), Change(rate_ratio=lambda _: 1.5)),
        Drift("values +0.3 sd", base, Change(value_shift=0.3)),
        Drift("5 % heavy tail", base, Change(tail_share=0.05)),
        Drift("co-activation x5, rates unchanged", alike(0.01, pairs=64, features=64), Change(pair_lift=5.0)),
        Drift("one of 8 replicas x1.5", alike(0.01, replicas=8), Change(lambda _: 1.5, replica=3)),
        Drift("one of 8 replicas x3", alike(0.01, replicas=8), Change(lambda _: 3.0, replica=3)),
        Drift("1 % of requests, x1.5, small pod", alike(0.01, **pod), Change(lambda _: 1.5)),
        Drift("1 % of requests, x3, small pod", alike(0.01, **pod), Change(lambda _: 3.0)),
        Drift("1 % of tokens, single, x1.5, small pod", alike(single, **pod), Change(lambda _: _tail(4.5, 4) / single)),
        Drift("1 % of tokens, single, x3, small pod", alike(single, **pod), Change(lambda _: _tail(9.0, 4) / single)),
        Drift(
            "1 % of tokens, runs of 8, x1.5, small pod", alike(runs, **pod), Change(lambda _: _tail(0.5625, 0) / runs)
        ),
        Drift("1 % of tokens, runs of 8, x3, small pod", alike(runs, **pod), Change(lambda _: _tail(1.125, 0) / runs)),
    ]


def _tail(mean: float, count: int) -> float:
    """P(Poisson(mean) > count)."""
    from scipy.stats import poisson

    return float(poisson.sf(count, mean))


PARTS = 8
"""In which features of a run drift, one after the other."""


def delays_by_part(ours: Callable[[], Ours], drift: Drift, seed: int, warm: int, windows: int) -> np.ndarray:
    """`delays` of ours, each part of the features drifting by itself."""
    features = np.arange(len(drift.scenario.rate_F))
    first_F = np.full(len(features), np.nan)
    for part in range(PARTS):
        drifts_F = features % PARTS == part

        def ratio(seconds: float, drifts_F: np.ndarray = drifts_F) -> np.ndarray:
            return np.where(drifts_F, drift.change.rate_ratio(seconds), 1.0)

        traffic = Traffic(drift.scenario, np.random.default_rng(seed + 1000 * part))
        found_F = delays(ours(), traffic, replace(drift.change, rate_ratio=ratio), warm, windows, drifts_F)
        first_F[drifts_F] = found_F[drifts_F]
    return first_F


def delays(
    detector: Any, traffic: Traffic, change: Change, warm: int, windows: int, drifts_F: np.ndarray | None = None
) -> np.ndarray:
    """Windows from the change to the first alarm of each feature, NaN where none came."""
    for _ in range(warm):
        alarm_F = detector.statistic(traffic.window()) >= detector.limit
        if alarm_F.any():
            detector.reset(alarm_F)
    first_F = np.full(len(traffic.scenario.rate_F), np.nan)
    for number in range(windows):
        window = traffic.window(change, number * traffic.scenario.window_seconds)
        alarm_F = (detector.statistic(window) >= detector.limit) & np.isnan(first_F)
        first_F[alarm_F] = number + 1
        if not np.isnan(first_F if drifts_F is None else first_F[drifts_F]).any():
            break
    return first_F


def drift_row(drift: Drift, detector: str, first_F: np.ndarray) -> dict[str, Any]:
    """Quantiles count what was never found as later than everything."""
    scenario = drift.scenario
    if drift.change.pair_lift > 1:
        first_F = np.fmin(first_F[0::2], first_F[1::2])
    found = ~np.isnan(first_F)
    late = np.where(found, first_F, np.inf)
    per_window = scenario.requests_per_window * TOKENS_PER_REQUEST

    def shown(q: float, unit: float) -> float | None:
        windows = np.quantile(late, q, method="higher")
        return float(f"{windows * unit:.4g}") if np.isfinite(windows) else None

    return {
        "name": drift.name,
        "detector": detector,
        "median_delay_minutes": shown(0.5, scenario.window_seconds / 60),
        "p90_delay_minutes": shown(0.9, scenario.window_seconds / 60),
        "median_delay_tokens": shown(0.5, per_window),
        "p90_delay_tokens": shown(0.9, per_window),
        "found_fraction": round(float(found.mean()), 3),
        "repetitions": len(found),
    }


def run_drift(number: int, size: Size, limits: dict[str, float], log: Callable[[str], None]) -> list[dict[str, Any]]:
    """One drift's rows; ours only without limits."""
    drift = drifts()[number]
    scenario = drift.scenario
    # A baseline does not depend on how finely its hours are cut.
    coarse = replace(
        scenario,
        window_seconds=NULL_SECONDS,
        requests_per_window=scenario.requests_per_window * NULL_SECONDS / scenario.window_seconds,
    )
    reference, cells_FC = calibrated(coarse, size.baseline, 500 + number)
    detectors: list[Any] = [_as_of_watchlist(reference, scenario)]
    moves_rates = drift.change.rate_ratio(size.drift) != 1.0
    if limits and scenario.window_seconds == 60.0:
        detectors += others(reference, cells_FC, limits)
    rows, windows = [], int(size.drift / scenario.window_seconds)
    for detector in detectors:
        if moves_rates and detector is detectors[0]:
            first_F = delays_by_part(
                lambda: _as_of_watchlist(reference, scenario), drift, 600 + number, windows // 4, windows
            )
        else:
            traffic = Traffic(scenario, np.random.default_rng(600 + number))
            first_F = delays(detector, traffic, drift.change, windows // 4, windows)
        rows.append(drift_row(drift, detector.name, first_F))
        log(_line(rows[-1]))
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']}: {row['detector']} {row['median_delay_minutes']} min, {row['median_delay_tokens']} tokens, "
        f"{row['found_fraction']:.0%}"
    )


def _as_of_watchlist(reference: Reference, scenario: Scenario) -> Ours:
    """Ours with the limits of 256 features in 64 pairs' members, whatever the number of repetitions."""
    ours = Ours(
        reference, Traffic(scenario, np.random.default_rng(0)).layout, scenario.replicas, scenario.window_seconds
    )
    ours.budget = Budget(
        window_seconds=scenario.window_seconds, seconds_per_page=MONTH_SECONDS * FEATURES / len(scenario.rate_F)
    )
    return ours


def run_canary(log: Callable[[str], None]) -> dict[str, Any]:
    """A swap of the model: 12 canary runs a minute, 30 % of a feature's values no longer what they were."""
    F, rng, per_minute = 128, np.random.default_rng(700), 12
    traffic = Traffic(alike(0.01, features=F), rng)
    observed = TrafficSums.empty(traffic.layout)
    for _ in range(20):
        window = traffic.window()
        observed.add_window(window.counts, np.zeros(1, int), window.end_seconds)
    value_NF = np.exp(rng.normal(size=(CANARIES, F)))
    for prompt in range(CANARIES):
        for _ in range(5):
            observed.add_canary(prompt, value_NF[prompt] * rng.normal(1, 0.003, F))
    reference = fit(observed, traffic.layout, DriftTolerance())
    state, first_F = DetectorState.empty(traffic.layout, 1), np.full(F, np.nan)
    budget = Budget(seconds_per_page=MONTH_SECONDS * FEATURES / F)
    for run in range(24 * 60 * per_minute):
        swapped = run >= 12 * 60 * per_minute
        other_F = swapped * (rng.random(F) < 0.3)
        value_F = value_NF[run % CANARIES] * np.where(other_F, 2.0, rng.normal(1, 0.003, F))
        update_canary(state, reference, run % CANARIES, value_F, 60.0 * run / per_minute)
        alarm_F = evidence(state, traffic.layout, reference, budget).alarms["canary"] if swapped else np.zeros(F, bool)
        first_F[alarm_F & np.isnan(first_F)] = (run - 12 * 60 * per_minute + 1) / per_minute
        if not np.isnan(first_F).any():
            break
    drift = Drift("model swap, 12 canary runs a minute", alike(0.01), Change())
    row = drift_row(drift, "latentwatch", first_F) | {"median_delay_tokens": None, "p90_delay_tokens": None}
    log(_line(row))
    return row


def run_common(ratio: float, size: Size, log: Callable[[str], None]) -> dict[str, Any]:
    """All features move together: how long until the one page that says so."""
    scenario = by_the_minute(nulls()["independent"])
    reference, _ = calibrated(nulls()["independent"], size.baseline, 800)
    first, other_pages, windows = np.full(16, np.nan), 0, int(size.drift / scenario.window_seconds)
    for run in range(len(first)):
        traffic = Traffic(scenario, np.random.default_rng(801 + run))
        ours = Ours(reference, traffic.layout, REPLICAS, scenario.window_seconds)
        for number in range(-30, windows):
            change = Change(lambda _: ratio) if number >= 0 else Change()
            other_pages += int((ours.statistic(traffic.window(change)) >= 0).sum())
            if ours.by_kind[COMMON]:
                first[run] = number + 1
                break
    drift = Drift(f"all features x{ratio:g} together", scenario, Change())
    row = drift_row(drift, Ours.name, first) | {"other_pages": other_pages}
    log(_line(row))
    return row


def update_milliseconds(features: int = 1024, replicas: int = 64) -> float:
    """Median time that one core spends on a window: detectors, evidence, and the sums of the next baseline."""
    rng, levels = np.random.default_rng(2), np.tile(COUNT_LEVELS, (features, 1))
    layout = Layout(np.ones(features, bool), levels, np.arange(PAIRED))
    observed, times = TrafficSums.empty(layout), []
    state, budget, reference = DetectorState.empty(layout, replicas), Budget(), None
    for number in range(31):
        fired_nF = (rng.random((200, features)) < 0.05) * rng.integers(1, 9, (200, features))
        value_nF = np.where(fired_nF > 0, np.exp(rng.normal(size=fired_nF.shape)), np.nan)
        counts = RequestCounts.empty(layout, replicas)
        counts.add(layout, rng.integers(0, replicas, 200), fired_nF, value_nF)
        window = Window(counts, np.arange(replicas), np.zeros(replicas, int), 1e9 + 60 * number)
        began = time.process_time()
        if reference is not None:
            update(state, reference, layout, window, budget)
            evidence(state, layout, reference, budget)
        observed.add_window(counts, window.stratum_G, window.end_seconds)
        times.append(time.process_time() - began)
        if number == 9:
            reference = fit(observed, layout, DriftTolerance())
    return float(np.median(times[10:]) * 1e3)


def report(size: Size, jobs: int) -> dict[str, Any]:
    """Everything; each null and each drift is a task of its own."""
    began = time.process_time()
    limits = limits_of_others(size, _say)
    with ProcessPoolExecutor(jobs) as pool:
        null_tasks = [pool.submit(run_null, name, size, _say) for name in nulls()]
        other_tasks = [pool.submit(run_null_of_others, name, size, limits, _say) for name in nulls()]
        drift_tasks = [pool.submit(run_drift, number, size, limits, _say) for number in range(len(drifts()))]
        null_rows = [
            row
            for ours, theirs in zip(null_tasks, other_tasks, strict=True)
            for row in (ours.result(), *theirs.result())
        ]
        drift_rows = [row for task in drift_tasks for row in task.result()]
    drift_rows += [run_common(1.2, size, _say), run_common(1.5, size, _say), run_canary(_say)]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() - began + children.ru_utime + children.ru_stime
    return {
        "what": "false pages and detection delays by simulation, whole 256-feature watchlist at 1 false page a month",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": _versions(),
        "core_minutes": round(seconds / 60, 1),
        "tokens_per_request": TOKENS_PER_REQUEST,
        "window_seconds_of_nulls": NULL_SECONDS,
        "limits_of_others": limits,
        UPDATE: round(update_milliseconds(), 2),
        "nulls": null_rows,
        "drifts": drift_rows,
        "simpler_wins": simpler_wins(drift_rows),
    }


def _say(line: str) -> None:
    print(line, flush=True)


def simpler_wins(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where another detector's median is below ours."""
    ours = {row["name"]: row["median_delay_minutes"] or np.inf for row in rows if row["detector"] == "latentwatch"}
    return [
        f"{row['name']}: {row['detector']} {row['median_delay_minutes']} min, ours {ours[row['name']]:g}"
        for row in rows
        if (row["median_delay_minutes"] or np.inf) < ours[row["name"]]
    ]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("numpy", "scipy", "river")
    return {"latentwatch": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


def _with(result: dict[str, Any], only: str, jobs: int) -> dict[str, Any]:
    """The results with one part of them measured anew."""
    result[UPDATE] = round(update_milliseconds(), 2)
    _say(f"{result[UPDATE]} ms a window")
    if only == "update":
        return result
    with ProcessPoolExecutor(jobs) as pool:
        null_tasks = [pool.submit(run_null, name, FULL, _say) for name in nulls()]
        drift_tasks = [pool.submit(run_drift, number, FULL, {}, _say) for number in range(len(drifts()))]
        null_rows = {task.result()["name"]: task.result() for task in null_tasks}
        common_tasks = [pool.submit(run_common, ratio, FULL, _say) for ratio in (1.2, 1.5)]
        drift_rows = {row["name"]: row for task in drift_tasks for row in task.result()}
        drift_rows |= {task.result()["name"]: task.result() for task in common_tasks}
    for part, rows in (("nulls", null_rows), ("drifts", drift_rows)):
        old = [rows.pop(row["name"], row) if row["detector"] == Ours.name else row for row in result[part]]
        result[part] = [*old, *rows.values()]
    return result | {"simpler_wins": simpler_wins(result["drifts"]), "date": datetime.date.today().isoformat()}


def _write(result: dict[str, Any]) -> None:
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PLOT.write_text(drawn(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="hours instead of months; prints, and writes nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--only", choices=["update", "ours"], help="only this, into the results that are there")
    args = parser.parse_args()
    if args.only:
        _write(_with(json.loads(RESULT.read_text()), args.only, args.jobs))
        return
    result = report(QUICK if args.quick else FULL, args.jobs)
    if args.quick:
        return
    _write(result)
    print(f"{result['core_minutes']} minutes of one core; a simpler detector is quicker in: {result['simpler_wins']}")


if __name__ == "__main__":
    main()
