"""From streams of engines to alarms: windows, baselines, canaries and recordings, as a collector handles them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import time
from pathlib import Path

import numpy as np
import pytest
from latentwatch import secrets
from latentwatch.cli import main
from latentwatch.collector.calibration import of_evidence
from latentwatch.collector.core import Core
from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.evidence_buffer import watched
from latentwatch.drift import baseline, canary
from latentwatch.drift.baseline import Baseline, Fingerprint
from latentwatch.errors import BaselineRefused, ConfigRefused, StreamRefused
from latentwatch.evidence.records import Ended, RecordedRequest
from latentwatch.evidence.store import Retention, Store
from latentwatch.facts import FEATURE_STAT, FeatureSummary, RequestInfo, RequestProgress
from latentwatch.names import Outcome, TokenState
from latentwatch.transport import recording
from latentwatch.transport.recording import RecordingSink
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.file import Limit, Watchlist
from starlette.testclient import TestClient

from tests.support.collectors import app_of
from tests.support.drift import random_baseline
from tests.support.streams import Piece, Tokens, hello, probe, received, sparse, step_batch, watchlist

FEATURES = (sparse("a"), sparse("b", limit=Limit("max", 9.0)), probe("p"))
MONDAY = 1_700_438_400.0
KEY = b"0123456789abcdef"


class Engine:
    """An engine that serves short requests, a minute's worth in one step."""

    def __init__(
        self, sink, watched: Watchlist, *, replica: str = "pod-0/0", model: str = "toy", seed: int = 0
    ) -> None:
        self.sink, self.rng = sink, np.random.default_rng(seed)
        self.hello = hello(replica=replica, model_name=model, watchlist_sha256=watched.sha256)
        self.handle, self.sequence = itertools.count(1), itertools.count(1)
        sink.hello(self.hello, MONDAY)

    def serve(
        self, now: float, requests: int = 40, share: float = 0.2, ids: list[str] | None = None, loudness: float = 1.0
    ) -> None:
        made = [self._request(share, ids[i] if ids else "", loudness) for i in range(len(ids) if ids else requests)]
        batch = step_batch(
            [Piece(request, 0, request.total) for request in made],
            FEATURES,
            time_unix_nano=int(now * 1e9),
            opened=[request.opened() for request in made],
            closed=[request.closed() for request in made],
        )
        self.sink.observe(self.hello, received(next(self.sequence), batch), now)

    def _request(self, share: float, request_id: str, loudness: float) -> Tokens:
        act = np.zeros((4, 3), np.float32)
        act[2, :2] = loudness * np.exp(self.rng.normal(0, 0.5, 2)) * (self.rng.random(2) < share)
        act[:, 2] = self.rng.normal(0, 1, 4).astype(np.float16)
        return Tokens(
            next(self.handle), 2, act, np.full(4, TokenState.SCORED), np.ones((4, 1), np.float32), request_id=request_id
        )


def minutes(engine: Engine, first: int, count: int, **traffic) -> None:
    for minute in range(first, first + count):
        engine.serve(MONDAY + 60 * minute + 30, **traffic)


WATCHED = watchlist(FEATURES)


@pytest.fixture(scope="module")
def trusted() -> Baseline:
    """Fifty minutes of a collector without a baseline."""
    core = Core(WATCHED)
    minutes(Engine(core.ingest, WATCHED), 0, 51)
    (view,) = core.drift.views()
    assert not view.armed and view.reason == "no_baseline"
    observed = core.drift.observed("toy", MONDAY + 3600)
    assert observed is not None and observed.observed.requests == 2000, "the last window is not over"
    return observed


def against(made: Baseline, **settings) -> Core:
    return Core(WATCHED, drift=DriftSettings(made, **settings))


def test_more_of_the_same_alarms_nothing_and_a_change_is_explained(trusted):
    core = against(trusted)
    engine = Engine(core.ingest, WATCHED, seed=1)
    minutes(engine, 60, 60)
    assert core.drift.views()[0].alarms == []
    minutes(engine, 120, 30, share=0.7)
    (view,) = core.drift.views()
    alarms = {(alarm.feature, alarm.kind): alarm for alarm in view.alarms}
    found = alarms["a", "rate"]
    assert found.direction == "up" and found.rate_ratio_low <= 3.5 <= found.rate_ratio_high
    assert abs(found.since_seconds - (MONDAY + 60 * 120)) <= 180
    assert len(found.requests) == 3 and found.requests[0].value >= found.requests[1].value
    assert found.canary_moved is None and "No canary" in found.text
    assert view.excluded_windows > 0 and view.windows >= 88


def test_what_may_be_an_attack_is_never_among_what_is_calibrated_from(trusted):
    core = against(trusted)
    engine = Engine(core.ingest, WATCHED, seed=1)
    minutes(engine, 60, 20)
    minutes(engine, 80, 60, share=0.9)
    observed = core.drift.observed("toy", MONDAY)
    assert observed is not None and 40 * 19 <= observed.observed.requests <= 40 * 26
    # Limits are calibrated from the largest values: those of an attack that is loud, too, are let in no further.
    learnt = (observed.observed.tail_FK[0] > 50).sum()
    minutes(engine, 140, 20, share=0.9, loudness=1000)
    observed = core.drift.observed("toy", MONDAY)
    assert learnt == 0 and not (observed.observed.tail_FK[0] > 50).any()


def test_a_canary_tells_the_model_from_its_input():
    trusted, watched = random_baseline(FEATURES, share=0.2), WATCHED
    for prompt in range(8):
        for _ in range(4):
            trusted.observed.add_canary(prompt, np.array([1.0, 0.0, 0.5]))
    ids = [f"chatcmpl-{canary.canary_id(KEY, i % 8, f'{i:016x}')}-0123abcd" for i in range(40)]
    core = Core(watched, drift=DriftSettings(trusted, canary_key=KEY))
    engine = Engine(core.ingest, watched)
    engine.serve(MONDAY + 30, ids=ids)
    engine.serve(MONDAY + 60, requests=5)
    engine.serve(MONDAY + 200, requests=1)
    (view,) = core.drift.views()
    assert view.requests == 5, "a canary run is no traffic"
    assert {alarm.kind for alarm in view.alarms} == {"canary"}
    assert all(alarm.canary_moved for alarm in view.alarms) and "The canary moved too" in view.alarms[0].text


def test_a_canary_that_stays_where_it_was_says_that_the_input_moved(trusted):
    rng, made = np.random.default_rng(0), copy.deepcopy(trusted)
    for _ in range(30):
        made.observed.add_canary(0, np.array([*np.exp(rng.normal(0, 0.5, 2)), rng.normal()]))
    core = Core(WATCHED, drift=DriftSettings(made, canary_key=KEY))
    engine = Engine(core.ingest, WATCHED, seed=1)
    for minute in range(60, 90):
        engine.serve(MONDAY + 60 * minute + 20, share=0.8)
        ids = [f"chatcmpl-{canary.canary_id(KEY, 0, f'{minute:016x}')}-0123abcd"]
        engine.serve(MONDAY + 60 * minute + 30, share=1.0, ids=ids)
    alarms = core.drift.views()[0].alarms
    assert {alarm.kind for alarm in alarms} >= {"rate"} and "canary" not in {alarm.kind for alarm in alarms}
    assert all(alarm.canary_moved is False for alarm in alarms) and "the input changed" in alarms[0].text


@pytest.mark.parametrize(
    "request_id",
    [
        "chatcmpl-lwcanary-3-0000000000000001-0000000000000000-0123abcd",
        f"chatcmpl-{canary.canary_id(b'another key, 16+', 3, '0' * 16)}-0123abcd",
        f"chatcmpl-{canary.canary_id(KEY, 3, '0' * 16).replace('-3-', '-4-')}-0123abcd",
        f"chatcmpl-{canary.canary_id(KEY, 64, '0' * 16)}-0123abcd",
    ],
)
def test_nobody_without_the_key_can_hide_among_the_canaries(request_id):
    assert canary.canary_prompt(KEY, request_id) is None
    assert canary.canary_prompt(b"", request_id) is None


def test_a_baseline_of_another_model_is_not_compared_with(trusted):
    core = against(trusted)
    Engine(core.ingest, WATCHED, model="other")
    (view,) = core.drift.views()
    assert (view.armed, view.reason) == (False, "baseline_mismatch")


def test_a_baseline_of_another_watchlist_is_refused_at_the_start(trusted):
    with pytest.raises(BaselineRefused, match="watchlist sha256"):
        Core(watchlist(FEATURES, sha256="cd" * 32), drift=DriftSettings(trusted))


def test_minutes_without_traffic_are_no_evidence(trusted):
    core = against(trusted)
    engine = Engine(core.ingest, WATCHED, seed=2)
    minutes(engine, 60, 5)
    before = core.drift.views()[0]
    for second in range(0, 6 * 3600, 30):
        core.ingest.tick(MONDAY + 70 * 60 + second)
    after = core.drift.views()[0]
    assert after.windows == before.windows + 1 == 5
    engine.serve(MONDAY + 20 * 3600)
    assert core.drift.views()[0].alarms == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", ["dense_RP", "fires_N"])
def test_a_batch_with_nan_or_infinite_scores_is_refused_and_drift_does_not_see_it(trusted, bad, column):
    core = against(trusted)
    engine = Engine(core.ingest, WATCHED, seed=2)
    minutes(engine, 60, 3)
    before = core.drift.views()[0].log10_evalue
    act = np.ones((4, 3), np.float32)
    act[1, 2 if column == "dense_RP" else 0] = bad
    request = Tokens(10_000, 2, act, np.full(4, TokenState.SCORED), np.ones((4, 1), np.float32))
    batch = step_batch([Piece(request, 0, 4)], FEATURES, opened=[request.opened()], closed=[request.closed()])
    assert not np.isfinite(batch.dense_RP if column == "dense_RP" else batch.fires_N["act"]).all()
    with pytest.raises(StreamRefused, match="NaN or infinity"):
        core.ingest.observe(engine.hello, received(next(engine.sequence), batch), MONDAY + 63 * 60)
    after = core.drift.views()[0].log10_evalue
    assert all(np.array_equal(before[kind], after[kind]) for kind in before)


def test_a_clock_that_steps_back_reopens_no_window(trusted):
    core = against(trusted)
    engine = Engine(core.ingest, WATCHED, seed=3)
    minutes(engine, 60, 5)
    minutes(engine, 10, 5)
    minutes(engine, 66, 2)
    (view,) = core.drift.views()
    assert view.windows == 6 and view.requests == 11 * 40, "what came early counts into the window that was open"


def test_a_request_that_began_before_the_collector_is_not_counted(trusted):
    core = against(trusted)
    who = hello(watchlist_sha256=WATCHED.sha256)
    core.ingest.hello(who, MONDAY)
    request = Tokens(1, 2, np.ones((4, 3), np.float32), np.full(4, TokenState.SCORED), np.ones((4, 1), np.float32))
    batch = step_batch([Piece(request, 2, 4)], FEATURES, closed=[request.closed()])
    core.ingest.observe(who, received(1, batch), MONDAY + 5)
    core.ingest.tick(MONDAY + 120)
    assert core.drift.views()[0].requests == 0


def test_a_collector_that_restarts_goes_on_where_it_was(trusted):
    one = against(trusted)
    engine = Engine(one.ingest, WATCHED, seed=4)
    minutes(engine, 60, 10, share=0.5)
    engine.serve(MONDAY + 70 * 60 + 30, requests=7)
    other = against(trusted)
    other.restore(one.state())
    for core in (one, other):
        engine.sink = core.ingest
        engine.rng = np.random.default_rng(9)
        engine.handle, engine.sequence = itertools.count(10_000), itertools.count(100)
        minutes(engine, 71, 10, share=0.5)
    mine, theirs = one.drift.views()[0], other.drift.views()[0]
    assert mine.alarms == theirs.alarms and mine.alarms
    assert all(np.array_equal(mine.log10_evalue[kind], theirs.log10_evalue[kind]) for kind in mine.log10_evalue)
    assert (mine.requests, mine.windows, mine.excluded_windows) == (
        theirs.requests,
        theirs.windows,
        theirs.excluded_windows,
    )


def test_detectors_begin_anew_with_another_baseline_and_what_was_observed_stays(trusted):
    one = against(dataclasses.replace(trusted, sha256="one"))
    engine = Engine(one.ingest, WATCHED, seed=4)
    minutes(engine, 60, 5)
    minutes(engine, 65, 20, share=0.9)
    other = against(dataclasses.replace(trusted, sha256="other"))
    other.restore(one.state())
    assert one.drift.views()[0].alarms and not other.drift.views()[0].alarms
    assert other.drift.observed("toy", 0.0).observed.requests == one.drift.observed("toy", 0.0).observed.requests > 0


def test_replicas_and_adapters_beyond_the_bounds_are_still_counted(trusted):
    core = against(trusted)
    for replica in range(40):
        Engine(core.ingest, WATCHED, replica=f"pod-{replica}/0", seed=replica).serve(MONDAY + 30, requests=3)
    core.ingest.tick(MONDAY + 120)
    assert core.drift.views()[0].requests == 120


def test_routes_in_request_ids_have_rates_of_their_own():
    """A route that takes over is no drift where ids tell it, and is one where they do not."""
    told = DriftSettings(route=re.compile(r"route-(\w+)-"))

    def traffic(core: Core, first: int, chat: int) -> Core:
        engine = Engine(core.ingest, WATCHED, seed=first)
        for minute in range(first, first + 60):
            for name, share, requests in (("chat", 0.05, chat), ("code", 0.6, 50 - chat)):
                ids = [f"chatcmpl-route-{name}-{minute:04d}{i:04d}-0123abcd" for i in range(requests)]
                engine.serve(MONDAY + 60 * minute + 30, share=share, ids=ids)
        core.ingest.tick(MONDAY + 60 * (first + 61))
        return core

    for settings, alarms in ((told, False), (DriftSettings(), True)):
        calm = traffic(Core(WATCHED, drift=settings), 0, chat=30).drift.observed("toy", MONDAY)
        assert calm is not None
        assert calm.observed.strata == (("chat", "code") if settings is told else ("",))
        later = traffic(Core(WATCHED, drift=dataclasses.replace(settings, baseline=calm)), 100, chat=10)
        assert bool(later.drift.views()[0].alarms) == alarms


def test_over_http_drift_is_explained_and_a_baseline_can_be_fetched(trusted):
    core = against(trusted)
    engine = Engine(core.ingest, WATCHED, seed=1)
    minutes(engine, 60, 40)
    minutes(engine, 100, 20, share=0.8)
    app = app_of(core, MONDAY + 7200)
    client = TestClient(app)
    (model,) = client.get("/v1/drift").json()["models"]
    assert model["armed"] and model["alarms"][0]["feature"] in ("a", "b")
    assert [row["feature"] for row in model["features"]][2] == "p", "the most suspicious come first"
    fetched = baseline.parse(client.get("/v1/drift/observed", params={"model_name": "toy"}).content)
    assert fetched.observed.requests == 40 * (120 - 60 - 1 - model["excluded_windows"])
    assert client.get("/v1/drift/observed", params={"model_name": "absent"}).status_code == 404


# -- limits


def test_limits_come_from_the_baseline_where_none_is_set_by_hand(trusted):
    made = dataclasses.replace(trusted, limit_fpr=0.01)
    core = against(made)
    limits = [feature.limit for feature in core.lookup.features]
    assert limits[1] == FEATURES[1].limit and limits[0].value == made.observed.tail_FK[0, 19]
    assert (made.observed.tail_FK[2] > limits[2].value).sum() == 19
    engine = Engine(core.ingest, WATCHED, seed=6)
    minutes(engine, 60, 50)
    exceeded = int(core.lookup.snapshot(MONDAY).models[0].exceedances_F[0])
    assert 8 <= exceeded <= 40, "about 1 % of 2,000 requests"
    latest = core.lookup.exceedances(1)[0]
    assert latest.tail_probability is not None and latest.tail_probability <= 0.01


def test_a_rate_that_the_baseline_cannot_tell_is_refused(trusted):
    with pytest.raises(BaselineRefused, match=r"0\.2 of 2000") as caught:
        against(dataclasses.replace(trusted, limit_fpr=1e-4))
    assert caught.value.reason == "limit_fpr"


# -- recordings and the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A watchlist file, an hour of recorded traffic, and one in which feature "a" fires four times as often."""
    folder = tmp_path_factory.mktemp("recordings")
    built = watchlist_file.write(WATCHED, folder / "w.safetensors")
    for name, share in (("calm", 0.2), ("drifted", 0.8)):
        sink = RecordingSink(folder / name)
        engine = Engine(sink, built, seed=len(name))
        engine.handle = itertools.count(100_000 * len(name))  # no server gives an id twice
        minutes(engine, 0, 20)
        minutes(engine, 20, 30, share=share)
        sink.close()
    return folder


def test_a_recording_comes_back_batch_by_batch_and_only_once(tmp_path):
    sink = RecordingSink(tmp_path / "r")
    engine = Engine(sink, WATCHED)
    minutes(engine, 0, 3)
    engine.sequence = itertools.count(2)
    minutes(engine, 3, 1)
    sink.close()
    read = list(recording.read(tmp_path / "r"))
    assert [item.received.sequence for item in read] == [1, 2, 3] and {item.hello for item in read} == {engine.hello}
    assert all(len(item.received.batch.closed) == 40 for item in read)


def test_a_recording_that_was_cut_off_is_read_to_its_last_whole_record_and_a_damaged_one_refused(folder, tmp_path):
    data = (folder / "calm").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-9])
    assert len(list(recording.read(tmp_path / "cut"))) == 49
    (tmp_path / "bad").write_bytes(data[:5000] + b"\x00\xff" + data[5002:])
    for name in ("bad", "absent"):
        with pytest.raises(StreamRefused):
            list(recording.read(tmp_path / name))


def test_record_calibrate_show_replay(folder, tmp_path, capsys):
    calm, drifted, watched, out = (str(folder / n) for n in ("calm", "drifted", "w.safetensors", "prod.baseline"))
    calibrate = ["calibrate", "--from", calm, "--watchlist", watched, "--model-name", "toy", "--out"]
    assert main([*calibrate, out, "--limit-fpr", "0.01", "--revision", "abc"]) == 0
    assert "2000 requests" in capsys.readouterr().out
    assert main([*calibrate, out]) == 2 and "exists" in capsys.readouterr().err
    assert main(["baseline", "show", out, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<tr>") == 4 and page.count("<svg") >= 5 and "http://" not in page and "https://" not in page
    assert main(["replay", calm, "--watchlist", watched, "--baseline", out]) == 0
    capsys.readouterr()
    assert main(["replay", drifted, "--watchlist", watched, "--baseline", out]) == 1
    shown = capsys.readouterr().out
    assert "[rate] a fires in more requests" in shown and "2000 ended requests" in shown


def test_the_same_traffic_counts_once_in_two_updates_and_in_two_sources(folder, tmp_path, capsys):
    """The runbook's own procedure, done twice."""
    calm, watched = str(folder / "calm"), str(folder / "w.safetensors")
    calibrate = ["calibrate", "--watchlist", watched, "--model-name", "toy", "--from", calm]
    first, second, third = (str(tmp_path / name) for name in ("1", "2", "3"))
    assert main([*calibrate, "--out", first]) == 0
    assert main([*calibrate, "--update", first, "--out", second]) == 0
    assert (
        "0 of 2000 requests are new; the others are in the earlier baseline and count once" in capsys.readouterr().out
    )
    assert main([*calibrate, "--from", calm, "--out", third]) == 0
    for name in (first, second, third):
        read = baseline.read(Path(name))
        assert read.observed.requests == 2000
        assert np.array_equal(read.reference().high_HF, baseline.read(Path(first)).reference().high_HF)


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "nan", "7"])
def test_a_share_that_is_none_is_refused_before_anything_is_waited_for(tmp_path, capsys, share):
    asked = ["calibrate", "--from", "http://192.0.2.1:9", "--model-name", "m", "--out", str(tmp_path / "b")]
    began = time.monotonic()
    assert main([*asked, f"--limit-fpr={share}"]) == 2
    assert "no share between 0 and 1" in capsys.readouterr().err and time.monotonic() - began < 4
    assert main([*asked[:-1], str(tmp_path / "no" / "b")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def kept(folder, keep: str, built: Watchlist) -> Core:
    """A core after 30 minutes of traffic, some of it canary runs, with its evidence in the folder."""
    evidence = Store(folder, watched(built), Retention())
    core = Core(
        built,
        drift=DriftSettings(canary_key=KEY),
        evidence=[lambda records: evidence.write(records, MONDAY)],
        evidence_scope=keep,
    )
    engines = [Engine(core.ingest, built, replica=f"pod-{i}/0", seed=i) for i in range(2)]
    for minute in range(30):
        for engine in engines:
            engine.serve(MONDAY + 60 * minute + 30, requests=25)
        engines[0].serve(MONDAY + 60 * minute + 40, ids=[f"chatcmpl-{canary.canary_id(KEY, 3, f'{minute:016x}')}-0a"])
    core.ingest.tick(MONDAY + 7200)
    evidence.close()
    return core


def test_evidence_of_every_request_calibrates_as_its_collector_does(folder, tmp_path, capsys):
    built, key = watchlist_file.read(folder / "w.safetensors"), tmp_path / "key"
    live = kept(tmp_path / "all", "all", built).drift.observed("toy", MONDAY).observed
    secrets.write(key, KEY)
    calibrate = ["calibrate", "--watchlist", str(folder / "w.safetensors"), "--model-name", "toy"]
    found = [*calibrate, "--from", str(tmp_path / "all"), "--canary-key", str(key), "--out", str(tmp_path / "b")]
    assert main(found) == 0
    made = baseline.read(tmp_path / "b").observed
    assert made.requests == live.requests == 1500 and made.canary_N[3] == 30
    mine, theirs = made.arrays(), live.arrays()
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    capsys.readouterr()
    assert main(["evidence", "audit", "--dir", str(tmp_path / "all")]) == 0
    assert "calibrate" in capsys.readouterr().out


def test_canary_runs_in_a_recording_are_told_by_the_key_and_a_route_that_is_no_pattern_is_refused(
    folder, tmp_path, capsys
):
    built, key, path = watchlist_file.read(folder / "w.safetensors"), tmp_path / "key", str(tmp_path / "r")
    secrets.write(key, KEY)
    sink = RecordingSink(tmp_path / "r")
    engine = Engine(sink, built)
    minutes(engine, 0, 20)
    engine.serve(MONDAY + 600, ids=[f"chatcmpl-{canary.canary_id(KEY, 5, '0' * 16)}-0123abcd"])
    sink.close()
    calibrate = ["calibrate", "--from", path, "--watchlist", str(folder / "w.safetensors"), "--model-name", "toy"]
    for name, more, requests in (("told", ["--canary-key", str(key)], 800), ("not", [], 801)):
        assert main([*calibrate, *more, "--out", str(tmp_path / name)]) == 0
        observed = baseline.read(tmp_path / name).observed
        assert observed.requests == requests and observed.canary_N[5] == 801 - requests
    with pytest.raises(SystemExit):
        main([*calibrate, "--out", str(tmp_path / "never"), "--route", "chat("])
    assert "no regular expression" in capsys.readouterr().err


def test_evidence_that_is_not_of_every_request_makes_no_baseline(folder, tmp_path, capsys):
    built = watchlist_file.read(folder / "w.safetensors")
    limited = dataclasses.replace(built, hooks=tuple(_always_exceeded(rows) for rows in built.hooks))
    kept(tmp_path / "some", "exceeded", limited)
    calibrate = ["calibrate", "--from", str(tmp_path / "some"), "--model-name", "toy", "--out", str(tmp_path / "b")]
    assert main(calibrate) == 2 and "--watchlist" in capsys.readouterr().err
    watched_by = [*calibrate, "--watchlist", str(folder / "w.safetensors")]
    assert main(watched_by) == 2 and "--evidence-keep all" in capsys.readouterr().err
    assert main([*watched_by, "--model-name", "other"]) == 2 and "no whole request" in capsys.readouterr().err
    other = watchlist_file.write(watchlist(FEATURES[1:]), tmp_path / "o.safetensors")
    assert other.sha256 != built.sha256
    assert main([*calibrate, "--watchlist", str(tmp_path / "o.safetensors")]) == 2
    assert built.sha256 in capsys.readouterr().err
    with pytest.raises(BaselineRefused, match="features more"):
        info = RequestInfo("r", "pod", "toy", "0", MONDAY, opening_seen=True)
        progress = RequestProgress(Outcome.FINISHED, MONDAY, np.array([0, 9, 0, 0, 0]))
        summary = FeatureSummary(np.empty(0, FEATURE_STAT), exceeded=0, left_out=7)
        of_evidence(built, "toy", [Ended(RecordedRequest(1, info), progress, summary, activations_lost=0)])


def _always_exceeded(rows):
    return dataclasses.replace(
        rows, features=tuple(dataclasses.replace(f, limit=Limit("max", -1e9)) if f.dense else f for f in rows.features)
    )


def test_a_baseline_is_updated_only_with_what_was_approved(folder, tmp_path, capsys):
    calm, drifted, watched = (str(folder / name) for name in ("calm", "drifted", "w.safetensors"))
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    common = ["--watchlist", watched, "--model-name", "toy"]
    assert main(["calibrate", "--from", calm, *common, "--out", old]) == 0
    update = ["calibrate", "--from", drifted, *common, "--update", old, "--out", new]
    assert main(update) == 1 and "a, b" in capsys.readouterr().out
    assert main([*update, "--approve", "a"]) == 1
    assert main([*update, "--approve", "a", "--approve", "b"]) == 0
    assert baseline.read(tmp_path / "new").observed.requests == 4000


def test_a_key_is_made_once_and_never_overwritten(tmp_path, capsys):
    key = canary.make_key(tmp_path / "key")
    assert canary.read_key(tmp_path / "key") == key and (tmp_path / "key").stat().st_mode & 0o77 == 0
    with pytest.raises(FileExistsError):
        canary.make_key(tmp_path / "key")
    secrets.write(tmp_path / "short", b"abc")
    for name in ("short", "absent"):
        with pytest.raises(ConfigRefused):
            canary.read_key(tmp_path / name)


def test_the_fingerprint_names_what_differs():
    assert Fingerprint("a", "m", revision="1").differences(Fingerprint("a", "m", revision="2")) == ["revision"]
    assert Fingerprint("a", "m", revision="1").differences(Fingerprint("a", "", engine_version="9")) == []
