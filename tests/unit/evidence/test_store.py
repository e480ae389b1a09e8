"""The store: what goes in comes out, deletion leaves no byte behind, retention holds while it is written."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from latentwatch.collector.core import Core
from latentwatch.collector.evidence_buffer import watched
from latentwatch.errors import ConfigRefused
from latentwatch.evidence import archive, segment
from latentwatch.evidence import store as stores
from latentwatch.evidence.archive import Archive, Wanted
from latentwatch.evidence.records import Ended
from latentwatch.evidence.store import SMALLEST_BYTES, Retention, Store
from latentwatch.evidence.writer import Writer
from latentwatch.names import TokenState

from tests.support.evidence import FEATURES, NOW, one_request, records, store
from tests.support.streams import Schedule, hello, received, sparse, tokens, watchlist

DAY = 86_400.0


def random_requests(count: int, *, total: int = 60):
    rng = np.random.default_rng(0)
    return [tokens(rng, FEATURES, handle=h, total=total, prompt_tokens=20) for h in range(1, count + 1)]


@pytest.mark.parametrize("longest", [1, 7, 100])
def test_every_activation_of_a_request_is_found_again_however_the_steps_were_cut(tmp_path, longest):
    requests = random_requests(5)
    schedule = Schedule.random(np.random.default_rng(1), requests, longest)
    with store(tmp_path) as written:
        written.write(records(requests, scope="all", schedule=schedule), NOW)
    archive = Archive(tmp_path)
    for request in requests:
        (found,) = archive.find(request.request_id)
        assert found.outcome == "finished" and found.activations_lost == 0
        assert found.tokens["scored"] == int((request.state_T == TokenState.SCORED).sum())
        seen = np.flatnonzero(request.seen_T)
        for activations in found.activations:
            number = [feature.id for feature in FEATURES].index(activations.feature)
            expected = request.act_TF[seen, number]
            shown = np.zeros(request.total) if not activations.dense else np.full(request.total, np.nan)
            shown[activations.positions] = activations.values
            np.testing.assert_array_equal(shown[seen], expected)
            assert activations.positions == sorted(activations.positions)


def test_exceedances_are_those_that_the_collector_shows(tmp_path):
    requests = random_requests(8)
    found = []
    core = Core(watchlist(FEATURES), evidence=[found.extend])
    core.ingest.hello(hello(), NOW)
    for sequence, batch in enumerate(Schedule.random(np.random.default_rng(2), requests, 9).batches(FEATURES), start=1):
        core.ingest.observe(hello(), received(sequence, batch), NOW + sequence)
    with store(tmp_path) as written:
        written.write(found, NOW)
    shown = {(e.request_id, e.feature, e.position, e.value, e.seconds, e.phase) for e in core.lookup.exceedances(1000)}
    kept = Archive(tmp_path).exceedances(Wanted(), 1000)
    assert {(e.request_id, e.feature, e.position, e.value, e.seconds, e.phase) for e in kept} == shown and shown
    summary = core.lookup.request(core.lookup.find(kept[0].request_id)[0])
    (stored,) = Archive(tmp_path).find(kept[0].request_id)
    assert [(f.feature, f.max, f.exceeded) for f in stored.features] == [
        (f.feature, f.max, f.exceeded) for f in summary.features
    ]


def test_a_request_that_exceeded_nothing_is_not_written_unless_all_are_kept():
    calm = random_requests(1)[0]
    calm.act_TF[:] = 0
    assert records([calm]) == []
    assert [type(record).__name__ for record in records([calm], scope="all")] == ["Activations", "Ended"]


def test_what_does_not_fit_before_the_first_exceedance_is_counted_and_nothing_after_it_is_lost(tmp_path):
    rng = np.random.default_rng(0)
    request = tokens(rng, FEATURES, handle=1, total=6000, prompt_tokens=10, fire_rate=0.5, unseen_share=0)
    request.act_TF[:4000, 0] = 0
    request.act_TF[:4000, 2] = -1
    request.act_TF[4000, 0] = 7.75
    schedule = Schedule.random(np.random.default_rng(1), [request], 50)
    with store(tmp_path) as written:
        written.write(records([request], schedule=schedule), NOW)
    (found,) = Archive(tmp_path).find(request.request_id)
    by_feature = {activations.feature: activations for activations in found.activations}
    kept, expected = by_feature["weather"], np.flatnonzero(request.act_TF[:, 1])
    assert [p for p in kept.positions if p >= 4000] == expected[expected >= 4000].tolist()
    assert found.activations_lost > 0
    everything = int((request.act_TF[:, :2] != 0).sum()) + request.total
    held = len(kept.positions) + len(by_feature["jailbreak"].positions) + len(by_feature["mood"].positions)
    assert held + found.activations_lost == everything


def test_queries_filter_by_feature_severity_model_and_time(tmp_path):
    with store(tmp_path) as written:
        for number in range(1, 21):
            written.write(one_request(number, seconds=NOW + number, exceedances=2), NOW + number)
    archive = Archive(tmp_path)
    assert len(archive.exceedances(Wanted(), 1000)) == 40
    assert {e.feature for e in archive.exceedances(Wanted(feature="jailbreak"), 100)} == {"jailbreak"}
    assert {e.feature for e in archive.exceedances(Wanted(severity="critical"), 100)} == {"deceive"}
    assert archive.exceedances(Wanted(model_name="other"), 100) == []
    assert archive.exceedances(Wanted(feature="unknown"), 100) == []
    late = archive.exceedances(Wanted(since_seconds=NOW + 15, until_seconds=NOW + 18), 100)
    assert late and all(NOW + 15 <= e.seconds < NOW + 18 for e in late)
    assert [e.seconds for e in late] == sorted((e.seconds for e in late), reverse=True)
    assert len(archive.exceedances(Wanted(), 7)) == 7


def test_a_request_is_found_by_engine_id_response_id_and_trace_id(tmp_path):
    request = one_request(1)[0].request
    traceparent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    ids = {"request_id": "chatcmpl-abc-0123abcd", "response_id": "chatcmpl-abc"}
    traced = request._replace(info=replace(request.info, **ids, traceparent=traceparent))
    with store(tmp_path) as written:
        written.write([record._replace(request=traced) for record in one_request(1)], NOW)
    archive = Archive(tmp_path)
    for name in ("chatcmpl-abc-0123abcd", "chatcmpl-abc", "ab" * 16, "abc"):
        assert [found.key for found in archive.find(name)] == [1]
    assert archive.find("") == archive.find("chatcmpl") == []


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


@pytest.mark.parametrize("by", ["engine id", "response id"])
def test_a_deleted_request_leaves_no_byte_behind(tmp_path, by):
    """Among thousands of others, whose insertion moved its rows from page to page."""
    rng = np.random.default_rng(3)
    order = rng.permutation(3000).tolist()
    secret = f"chatcmpl-{'5ec2e7' * 6}"
    with store(tmp_path) as written:
        for start in range(0, len(order), 100):
            batch = [r for number in order[start : start + 100] for r in one_request(number + 10, activations=20)]
            if start == 1000:
                batch += one_request(5, request_id=f"{secret}-0123abcd", activations=400)
            written.write(batch, NOW)
        (found,) = Archive(tmp_path).find(secret)
        blobs = stored_blobs(tmp_path, found.key)
        before = everything_in(tmp_path)
        assert secret.encode() in before and all(blob[:48] in before for blob in blobs)
        erased = stores.erase(tmp_path, secret if by == "response id" else f"{secret}-0123abcd")
        after = everything_in(tmp_path)
    assert (erased.requests, erased.clean) == (1, True)
    assert secret.encode() not in after and secret[:20].encode() not in after
    assert all(blob[at : at + 32] not in after for blob in blobs for at in range(0, len(blob) - 32, 32))
    assert Archive(tmp_path).find(secret) == []
    assert len(list(Archive(tmp_path).requests())) == 3000, "nothing else went"


def test_a_deletion_overwrites_and_need_not_rewrite_the_file(tmp_path):
    """Rewriting is for copies left behind by others; if it were needed each time, large segments would take minutes."""
    with store(tmp_path) as written:
        for number in range(1, 40):
            written.write(one_request(number, activations=20), NOW)
        erased = stores.erase(tmp_path, one_request(20)[0].request.info.request_id)
    assert (erased.requests, erased.rewritten_files, erased.clean) == (1, 0, True)


def stored_blobs(folder: Path, key: int) -> list[bytes]:
    (path,) = stores.segments(folder)
    connection = segment.connect(path, "ro")
    rows = connection.execute("SELECT fires, rows FROM activations WHERE request = ?", (key,)).fetchall()
    connection.close()
    return [blob for row in rows for blob in row]


def test_a_copy_that_was_left_behind_in_the_file_has_it_rewritten(tmp_path):
    """The guarantee does not rest on what SQLite overwrites: the file is read for what was deleted."""
    with store(tmp_path) as written:
        written.write(one_request(1, request_id="chatcmpl-leftover-0123abcd") + one_request(2), NOW)
    (path,) = stores.segments(tmp_path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA secure_delete = OFF")
        connection.execute("CREATE TABLE stale (x)")
        connection.executemany("INSERT INTO stale VALUES (?)", [("kept",), ("chatcmpl-leftover-0123abcd",)])
        connection.execute("DELETE FROM stale WHERE x != 'kept'")
    connection.close()
    erased = stores.erase(tmp_path, "chatcmpl-leftover")
    assert erased.clean and erased.rewritten_files == 1
    assert b"chatcmpl-leftover" not in everything_in(tmp_path)
    assert len(list(Archive(tmp_path).requests())) == 1


def test_deleting_beside_a_reader_with_an_old_state_is_reported_as_not_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "BUSY_SECONDS", 0.1)
    with store(tmp_path) as written:
        written.write(one_request(1) + one_request(2), NOW)
        (path,) = stores.segments(tmp_path)
        reader = segment.connect(path, "ro")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM request").fetchone()
        erased = stores.erase(tmp_path, one_request(1)[0].request.info.request_id)
        assert (erased.requests, erased.clean) == (1, False)
        reader.close()
        assert stores.erase(tmp_path, one_request(2)[0].request.info.request_id).clean


def test_a_request_stays_in_one_segment_when_the_day_changes_under_it(tmp_path):
    first, *rest = one_request(1)
    with store(tmp_path) as written:
        written.write([first], NOW)
        written.write(one_request(2, seconds=NOW + DAY), NOW + DAY)
        written.write(rest, NOW + DAY)
        assert [path.name[:10] for path in stores.segments(tmp_path)] == ["2025-11-22", "2025-11-23"]
        (found,) = Archive(tmp_path).find(first.request.info.request_id)
    assert found.outcome == "finished" and found.exceedances and found.activations


def test_a_segment_that_fails_costs_its_own_records_alone_and_they_alone_count_as_not_written(tmp_path, monkeypatch):
    """The requests of yesterday stay in yesterday's segment: one batch goes into two."""
    first, *rest = one_request(1, exceedances=2)
    written = Store(tmp_path, watched(watchlist(FEATURES)), Retention())
    written.write([first], NOW)
    tomorrow = one_request(2, seconds=NOW + DAY)
    write = segment.Segment.write

    def disk_error_yesterday(self, records):
        if records[0].request.key == first.request.key:
            raise sqlite3.OperationalError("disk I/O error")
        write(self, records)

    monkeypatch.setattr(segment.Segment, "write", disk_error_yesterday)
    writer = Writer(written, clock=lambda: NOW + DAY)
    writer.put(rest + tomorrow)
    writer.close()
    totals = writer.totals()
    assert sum(totals.dropped.values()) == len(rest) and sum(totals.written.values()) == len(tomorrow)
    assert {reason for _, reason in totals.dropped} == {"write_failed"}


def test_nothing_is_older_than_the_bound(tmp_path):
    with store(tmp_path, Retention(days=3)) as written:
        for day in range(10):
            written.write(one_request(day + 1, seconds=NOW + day * DAY), NOW + day * DAY)
            written.prune(NOW + day * DAY)
            ages = [NOW + day * DAY - r.opened_seconds for r in Archive(tmp_path).requests()]
            assert max(ages) < 3 * DAY and min(ages) == 0


def test_the_folder_stays_below_its_bound_while_it_is_written(tmp_path):
    bound = SMALLEST_BYTES
    written_bytes = 0
    with store(tmp_path, Retention(max_bytes=bound)) as written:
        for batch in range(24):
            records = [r for i in range(40) for r in one_request(batch * 100 + i + 1, activations=5000)]
            before = stores.folder_bytes(tmp_path)
            written.write(records, NOW)
            written_bytes += max(0, stores.folder_bytes(tmp_path) - before)
            written.prune(NOW)
            assert stores.folder_bytes(tmp_path) <= bound
    assert written_bytes > 1.05 * bound, "the test wrote more than fits"
    kept = [request.key for request in Archive(tmp_path).requests()]
    assert kept == sorted(kept) and max(kept) == 2340 and min(kept) > 1, "the oldest went, the newest stayed"


def test_reading_goes_on_while_segments_come_and_go(tmp_path):
    errors: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        archive = Archive(tmp_path)
        try:
            while not stop.is_set():
                archive.exceedances(Wanted(), 10)
                archive.find("chatcmpl-made-000000000001")
        except BaseException as error:
            errors.append(error)

    with store(tmp_path, Retention(days=2)) as written:
        written.write(one_request(1), NOW)
        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for day in range(30):
            written.write(one_request(day + 2, seconds=NOW + day * DAY), NOW + day * DAY)
            written.prune(NOW + day * DAY)
        stop.set()
        for reader in readers:
            reader.join()
    assert errors == []


@pytest.mark.parametrize("failures", [2, 99])
def test_a_segment_that_answers_with_an_io_error_is_asked_again_and_then_it_is_an_error(
    tmp_path, monkeypatch, failures
):
    """SQLite answers so while a segment's files come or go; to leave it out would hide what it holds."""
    with store(tmp_path) as written:
        written.write(one_request(1), NOW)
    asked: list[Path] = []

    def connect(path: Path, mode: str) -> sqlite3.Connection:
        asked.append(path)
        if len(asked) <= failures:
            raise sqlite3.OperationalError("disk I/O error")
        return segment.connect(path, mode)

    monkeypatch.setattr(archive, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(archive, "segment", SimpleNamespace(**{**vars(segment), "connect": connect}))
    if failures == 2:
        assert len(list(Archive(tmp_path).requests())) == 1
    else:
        with pytest.raises(sqlite3.OperationalError):
            list(Archive(tmp_path).requests())


def test_a_second_collector_on_the_same_folder_is_refused(tmp_path):
    with store(tmp_path), pytest.raises(ConfigRefused) as refused:
        Store(tmp_path, watched(watchlist(FEATURES)), Retention())
    assert refused.value.reason == "evidence_locked"
    with store(tmp_path):
        pass


def test_a_collector_that_starts_again_goes_on_in_the_segment_of_the_day(tmp_path):
    for number in range(1, 4):
        with store(tmp_path) as written:
            written.write(one_request(number), NOW)
    assert len(stores.segments(tmp_path)) == 1 and len(list(Archive(tmp_path).requests())) == 3


def test_another_watchlist_gets_segments_of_its_own(tmp_path):
    """Features are numbered in the files; the numbers of another watchlist mean something else."""
    with store(tmp_path) as written:
        written.write(one_request(1), NOW)
    features = [sparse("other"), sparse("b"), sparse("c"), sparse("d")]
    other = Store(tmp_path, watched(watchlist(features, sha256="cd" * 32)), Retention())
    other.write(one_request(2), NOW)
    other.close()
    assert {e.feature for e in Archive(tmp_path).exceedances(Wanted(), 10)} == {"jailbreak", "other"}


@pytest.mark.parametrize("values", [{"days": 0}, {"max_bytes": 1}])
def test_a_retention_that_keeps_nothing_is_refused(values):
    with pytest.raises(ConfigRefused) as refused:
        Retention(**values)
    assert refused.value.reason == "evidence_retention"


def test_a_file_of_another_format_is_refused(tmp_path):
    with store(tmp_path) as written:
        written.write(one_request(1), NOW)
    (path,) = stores.segments(tmp_path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(ConfigRefused, match="format 9"):
        Archive(tmp_path).find("x")


def test_files_are_the_owners_alone(tmp_path):
    with store(tmp_path / "new") as written:
        written.write(one_request(1), NOW)
        modes = {path.suffix: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
    assert set(modes.values()) == {0o600} and (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_an_end_without_its_beginning_is_kept_too(tmp_path):
    """The beginning was dropped because the queue was full."""
    ended = one_request(1)[-1]
    assert isinstance(ended, Ended)
    with store(tmp_path) as written:
        written.write([ended], NOW)
    (found,) = Archive(tmp_path).find(ended.request.info.request_id)
    assert found.outcome == "finished" and found.exceedances == () and found.duration_seconds == 9.0
