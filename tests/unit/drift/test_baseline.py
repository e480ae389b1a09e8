"""The baseline file: what it keeps, what it refuses, and what is made of traffic that says little."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from latentwatch.drift import baseline, windows
from latentwatch.drift.baseline import Baseline, Fingerprint
from latentwatch.drift.reference import DriftTolerance, Season, Status, fit
from latentwatch.drift.sums import TrafficSums
from latentwatch.errors import BaselineRefused

from tests.support.drift import layout_of, observe, random_baseline, rows
from tests.support.drift_traffic import Scenario, Traffic
from tests.support.streams import SHA256, probe, sparse

FEATURES = (sparse("a"), sparse("b"), probe("c"))


@pytest.fixture(scope="module")
def made() -> baseline.Baseline:
    return random_baseline(FEATURES)


def test_a_baseline_comes_back_as_it_went_in(made, tmp_path):
    written = baseline.write(made, tmp_path / "b.baseline")
    read = baseline.read(tmp_path / "b.baseline")
    assert read.sha256 == written.sha256 and read.fingerprint == made.fingerprint and read.features == made.features
    mine, theirs = made.observed.arrays(), read.observed.arrays()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    one, other = made.reference(), read.reference()
    assert all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "baseline_format"), (b"{}", "baseline_format"), (b"\x00" * 4096, "baseline_format")],
    ids=["empty", "text", "zeros"],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path, data, reason):
    (tmp_path / "b").write_bytes(data)
    with pytest.raises(BaselineRefused) as caught:
        baseline.read(tmp_path / "b")
    assert caught.value.reason == reason and caught.value.instead


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BaselineRefused, match="cannot be read") as caught:
        baseline.read(tmp_path / "absent")
    assert caught.value.reason == "baseline_missing"


def test_no_damaged_byte_goes_unnoticed(made):
    data = made.to_bytes()
    for at in np.linspace(0, len(data) - 1, 60).astype(int).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 0x41
        with pytest.raises(BaselineRefused):
            baseline.parse(bytes(damaged))
    for size in (10, len(data) // 2, len(data) - 1):
        with pytest.raises(BaselineRefused):
            baseline.parse(data[:size])


def test_counts_that_cannot_be_are_refused_though_their_hash_is_right(made):
    for name, value in (("cells_FC", -1), ("hour_square_HFL", np.nan)):
        observed = copy.deepcopy(made.observed)
        getattr(observed, name).reshape(-1)[0] = value
        with pytest.raises(BaselineRefused, match=name):
            baseline.parse(dataclasses.replace(made, observed=observed).to_bytes())


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Fingerprint) if f.name != "engine_version"])
def test_a_baseline_of_something_else_is_refused_by_name(made, field):
    mine = dataclasses.replace(made, fingerprint=dataclasses.replace(made.fingerprint, **{field: "one"}))
    with pytest.raises(BaselineRefused, match=field.replace("_", " ")) as caught:
        mine.check(dataclasses.replace(mine.fingerprint, **{field: "other"}))
    assert caught.value.reason == "baseline_mismatch"
    mine.check(dataclasses.replace(mine.fingerprint, **{field: ""}))


@pytest.mark.parametrize("requests", [0, 400])
def test_no_or_too_few_requests_make_no_baseline(requests):
    with pytest.raises(BaselineRefused, match=f"{requests} requests") as caught:
        random_baseline(FEATURES, requests=requests).reference()
    assert caught.value.reason == "baseline_volume"


def test_baselines_add_and_those_of_other_features_do_not(made):
    both = made.merge(random_baseline(FEATURES, seed=1))
    assert both.observed.requests == 8000
    with pytest.raises(BaselineRefused):
        made.merge(random_baseline(FEATURES[:2]))


def test_a_feature_that_never_fired_can_still_rise_and_never_fall():
    scenario = Scenario(np.array([0.0, 1e-5, 0.05]), 1000)
    traffic = Traffic(scenario, np.random.default_rng(0))
    observed = TrafficSums.empty(traffic.layout)
    for _ in range(200):
        window = traffic.window()
        observed.add_window(window.counts, window.stratum_G, window.end_seconds)
    reference = fit(observed, traffic.layout, DriftTolerance())
    assert [Status(s) for s in reference.status_F.tolist()] == [Status.NEVER_FIRED, Status.THIN, Status.OK]
    assert (reference.low_HF[:, :2] == 0).all() and (reference.low_HF[:, 2] > 0).all()
    assert (reference.high_HF[:, 0] > 0).all() and (reference.high_HF[:, 0] < 1e-3).all()
    assert (reference.shape_KFC[:, 0] < 0).all(), "an unknown shape is never evidence"


def test_rates_by_the_hour_once_days_are_seen_and_a_wide_tolerance_until_then():
    scenario = Scenario(np.array([0.05]), 1000, 240, season=0.3)
    traffic = Traffic(scenario, np.random.default_rng(0))
    observed, references = TrafficSums.empty(traffic.layout), {}
    for number in range(1, 15 * 360 + 1):
        window = traffic.window()
        observed.add_window(window.counts, window.stratum_G, window.end_seconds)
        if number in (180, 4 * 360, 15 * 360):
            references[number] = fit(observed, traffic.layout, DriftTolerance())
    short, days, weeks = references.values()
    assert [r.season_F[0] for r in (short, days, weeks)] == [Season.STATIC, Season.HOUR_OF_DAY, Season.HOUR_OF_WEEK]
    width = [float((r.high_HF / r.rate_HF).mean()) for r in (short, days, weeks)]
    assert width[0] > DriftTolerance().static_tolerance > width[1] and width[2] < 1.25
    swing = weeks.rate_HF.max() / weeks.rate_HF.min()
    assert swing == pytest.approx(1.3 / 0.7, rel=0.1)


def part(keys, *, requests=40, start=0):
    """A baseline of one collector: a window of so many requests for each key, one a minute."""
    rng, layout = np.random.default_rng(0), layout_of(FEATURES)
    observed = TrafficSums.empty(layout)
    for number, key in enumerate(keys):
        observe(observed, layout, *rows(rng, layout, requests, 0.05), 1e9 + 60 * (start + number), key=key)
    return Baseline(Fingerprint(SHA256, ""), tuple(f.id for f in FEATURES), layout, observed)


def test_what_a_collector_gives_again_counts_once_and_what_is_new_is_added():
    first, later = part([1, 2, 3]), part([1, 2, 3, 4, 5])
    for merged in (first.merge(later), later.merge(first), first.merge(later).merge(later)):
        assert merged.observed.requests == later.observed.requests and merged.parts == ()
        assert np.array_equal(merged.observed.levels_FB, later.observed.levels_FB)


def test_each_collector_of_a_fleet_is_replaced_by_what_it_says_later_across_a_file(tmp_path):
    one, other = part([1, 2, 3]), part([11, 12])
    written = baseline.write(one.merge(other), tmp_path / "b")
    earlier = baseline.read(tmp_path / "b")
    assert earlier.observed.requests == 200 and len(earlier.parts) == 2 and written.sha256 == earlier.sha256
    later = earlier.merge(part([1, 2, 3, 4])).merge(part([11, 12, 13]))
    assert later.observed.requests == 280
    # One that was restarted without --state knows only what is new, and is added; asked again, it counts once.
    after = later.merge(part([21])).merge(part([21, 22]))
    assert after.observed.requests == 360 and len(after.parts) == 3
    assert np.array_equal(after.observed.levels_FB, sum(one.levels_FB for one in after.parts))


def test_windows_that_cannot_be_told_from_others_any_more_are_refused_and_not_counted_twice():
    with pytest.raises(BaselineRefused, match="1 windows are in both, and 2 and 1 in one alone") as refused:
        part([1, 2, 3]).merge(part([3, 4], start=2))
    assert refused.value.reason == "baseline_overlap"


def test_a_window_is_known_by_its_requests_in_any_order_and_by_its_end():
    assert windows.key_of(["a", "b"]) == windows.key_of(["b"], windows.key_of(["a"])) != windows.key_of(["a", "c"])
    one = windows.with_window(windows.no_windows(), 60.0, 7)
    assert windows.common(one, windows.with_window(windows.no_windows(), 120.0, 7)) == 0
    assert len(windows.with_window(one, 180.0, 0)) == 1, "what has no key is not told apart"


def test_windows_are_remembered_for_thirty_days_and_what_is_older_does_not_part_two_sums():
    many = np.stack((np.arange(windows.MOST + 50), np.arange(1, windows.MOST + 51)), axis=1)
    kept = windows.union(many[:40], many)
    assert len(kept) == windows.MOST and windows.covers(kept, many[: windows.MOST])
