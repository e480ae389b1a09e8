"""One damaged file costs what is in it: it is set aside by name, and writing, look-up, deletion and retention go on."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from latentwatch.cli import main
from latentwatch.evidence import audit, sealed_files, segment
from latentwatch.evidence import store as stores
from latentwatch.evidence.archive import Archive, Wanted
from latentwatch.evidence.audit import Audit
from latentwatch.evidence.records import Ended, Record

from tests.support.evidence import NOW, one_request, store

DAY = 86_400.0
PER_SEGMENT = 40


def name(number: int) -> str:
    (ended,) = (record for record in one_request(number) if isinstance(record, Ended))
    return ended.request.info.request_id


def three_days(folder: Path) -> list[Path]:
    """Segments of three days with PER_SEGMENT requests each, numbered through."""
    for day in range(3):
        with store(folder) as written:
            for number in range(day * PER_SEGMENT, (day + 1) * PER_SEGMENT):
                written.write(one_request(number, seconds=NOW + day * DAY), NOW + day * DAY)
    made = stores.segments(folder)
    assert len(made) == 3
    return made


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def nothing_left(path: Path) -> None:
    os.truncate(path, 0)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in np.random.default_rng(0).integers(0, len(content), len(content) // 50).tolist():
        content[at] ^= 0x55
    path.write_bytes(content)


def one_page_flipped(path: Path) -> None:
    """The head is whole: it opens, and some requests can be read."""
    content = bytearray(path.read_bytes())
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'request'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    first = (root - 1) * size
    content[first : first + size] = bytes(range(256)) * (size // 256)
    path.write_bytes(content)


def encrypted(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def another_schema(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"CREATE TABLE other (x); PRAGMA user_version = {segment.FORMAT};")


def another_format(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 9")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def content_of_rows(path: Path) -> None:
    """SQLite has nothing against it; what is in the rows does not unfold."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE activations SET fires = x'00'")
        connection.execute("UPDATE request SET features = x'0102'")
        connection.commit()


KINDS: list[Callable[[Path], None]] = [
    truncated,
    nothing_left,
    flipped,
    one_page_flipped,
    encrypted,
    another_schema,
    another_format,
    a_folder,
]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("damage", KINDS)
def test_the_rest_is_written_found_and_deleted_and_the_damaged_file_is_named(tmp_path, caplog, damage, place):
    paths = three_days(tmp_path)
    damage(paths[place])
    whole = [number for number in range(3 * PER_SEGMENT) if number // PER_SEGMENT != place]
    today = NOW + 2 * DAY + 60
    with store(tmp_path) as written:
        written.write(one_request(1000, seconds=today), today)
        written.prune(today)
        archive = Archive(tmp_path, written.damaged)
        assert {found.request_id for found in archive.exceedances(Wanted(), 1000)} >= {name(n) for n in (*whole, 1000)}
        assert [found.request_id for found in archive.find(name(whole[0]))] == [name(whole[0])]
        assert archive.find(name(1000))
        erased = stores.erase(tmp_path, name(whole[-1]), written.damaged)
        assert erased.requests == 1 and not archive.find(name(whole[-1]))
        assert not erased.clean and any(paths[place].name in file for file in erased.damaged)
        written.write(one_request(1001, seconds=today), today)
        written.prune(today)
        assert archive.find(name(1001))
        archive.close()
    assert caplog.text.count("cannot be used") == 1 and str(paths[place]) in caplog.text
    if damage is not another_format:
        assert not paths[place].exists() and (tmp_path / f"{paths[place].name}.damaged").exists()


@pytest.mark.parametrize("damage", [one_page_flipped, flipped, encrypted])
def test_a_segment_that_is_damaged_while_it_is_written_gives_its_place_to_a_new_one(tmp_path, damage):
    with store(tmp_path) as written:
        for number in range(PER_SEGMENT):
            written.write(one_request(number), NOW)
        (path,) = stores.segments(tmp_path)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        damage(path)
        archive = Archive(tmp_path, written.damaged)
        archive.find("whatever")
        archive.exceedances(Wanted(), 1000)
        for number in range(1000, 1200):
            written.write(one_request(number), NOW)
            if number == 1100:
                written.prune(NOW)
        assert [found.request_id for found in archive.find(name(1199))] == [name(1199)]
        archive.close()
    assert written.damaged.names == (f"{path.name}.damaged",)


def test_rows_that_do_not_unfold_are_not_shown_as_something_else(tmp_path):
    paths = three_days(tmp_path)
    content_of_rows(paths[0])
    archive = Archive(tmp_path)
    assert archive.find(name(0)) == [] and archive.damaged.names == (paths[0].name,)
    assert archive.find(name(PER_SEGMENT))
    assert len(list(archive.requests())) == 2 * PER_SEGMENT


def test_a_full_disk_and_a_lock_are_no_damage(tmp_path):
    """What passes sets nothing aside."""
    paths = three_days(tmp_path)
    archive = Archive(tmp_path)
    for code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_CANTOPEN):
        error = sqlite3.OperationalError("no")
        error.sqlite_errorcode = code
        assert not archive.damaged.record(paths[0], error)
    assert not archive.damaged.record(paths[0], OSError(24, "Too many open files"))
    assert archive.damaged.names == ()


def test_what_was_set_aside_goes_with_its_day_and_counts_for_the_size(tmp_path):
    paths = three_days(tmp_path)
    flipped(paths[0])
    with store(tmp_path) as written:
        written.prune(NOW + 2 * DAY)
        written.write(one_request(1000, seconds=NOW + 2 * DAY), NOW + 2 * DAY)
        written.prune(NOW + 2 * DAY)
        Archive(tmp_path, written.damaged).find("x")
        written.prune(NOW + 2 * DAY)
        aside = tmp_path / f"{paths[0].name}.damaged"
        assert aside.exists() and stores.folder_bytes(tmp_path) > aside.stat().st_size
        written.prune(NOW + 31 * DAY)
        assert not aside.exists() and written.damaged.names == ()


def test_a_damaged_file_of_content_costs_its_hour(tmp_path):
    sealed_files.put(tmp_path, 1, b"a" * 100, NOW)
    sealed_files.put(tmp_path, 2, b"b" * 100, NOW + 3600)
    first, second = sealed_files.files(tmp_path)
    encrypted(first)
    assert sealed_files.get(tmp_path, 2) == b"b" * 100 and sealed_files.get(tmp_path, 1) is None
    assert sealed_files.erase(tmp_path, [2]).rows == 1
    sealed_files.put(tmp_path, 3, b"c" * 100, NOW)
    assert sealed_files.get(tmp_path, 3) == b"c" * 100
    assert (tmp_path / f"{first.name}.damaged").exists()
    sealed_files.prune(tmp_path, 24.0, NOW + 30 * 3600)
    assert not list(tmp_path.glob("*.content*")), second


@pytest.mark.parametrize("damage", [truncated, flipped, encrypted, another_schema, a_folder])
def test_a_damaged_audit_log_is_set_aside_and_a_new_one_begun(tmp_path, damage):
    log = Audit(tmp_path)
    for i in range(2_000):
        log.add(NOW + i, "me", "show", 1, request=f"chatcmpl-{i}")
    log.close()
    with contextlib.closing(sqlite3.connect(tmp_path / audit.FILE_NAME)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damage(tmp_path / audit.FILE_NAME)
    again = Audit(tmp_path)
    again.add(NOW, "me", "show", 1, request="chatcmpl-1")
    assert next(again.entries(request="chatcmpl-1")).action == "show"
    again.close()
    if damage is not truncated:
        assert (tmp_path / f"{audit.FILE_NAME}.damaged").exists()


def saved(folder: Path) -> set[str]:
    return {request.request_id for request in Archive(folder).requests()}


def test_repair_saves_what_can_be_read_and_says_what_is_lost(tmp_path, capsys):
    paths = three_days(tmp_path)
    whole: list[Record] = one_request(PER_SEGMENT + 3)
    before = Archive(tmp_path).find(name(PER_SEGMENT + 3))
    one_page_of_activations(paths[1])
    assert main(["evidence", "repair", "--dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"{paths[1].name}.salvaged: saved" in told and "lost at most" in told and "0 activations" not in told
    assert len(saved(tmp_path)) == 3 * PER_SEGMENT, "requests and exceedances were whole"
    (found,) = Archive(tmp_path).find(name(PER_SEGMENT + 3))
    assert found.exceedances == before[0].exceedances and whole
    assert stores.erase(tmp_path, name(0)).damaged == (f"{paths[1].name}.salvaged",)
    assert main(["evidence", "repair", "--dir", str(tmp_path), "--remove"]) == 0
    assert stores.erase(tmp_path, name(1)).clean
    assert len(saved(tmp_path)) == 3 * PER_SEGMENT - 2


def one_page_of_activations(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        blob = connection.execute("SELECT fires FROM activations WHERE rowid = 20").fetchone()[0]
    first = content.index(blob[:64]) // size * size
    content[first : first + size] = b"\xff" * size
    path.write_bytes(content)


def test_repair_goes_around_several_places_that_cannot_be_read(tmp_path):
    with store(tmp_path) as written:
        for number in range(600):
            written.write(one_request(number), NOW)
    (path,) = stores.segments(tmp_path)
    content = bytearray(path.read_bytes())
    for number in (50, 300, 550):
        at = content.index(name(number).encode())
        content[at // 4096 * 4096 : at // 4096 * 4096 + 8] = b"\xff" * 8
    path.write_bytes(content)
    assert main(["evidence", "repair", "--dir", str(tmp_path)]) == 0
    found = saved(tmp_path)
    assert 500 < len(found) < 600 and {name(0), name(150), name(450), name(599)} <= found


def test_repair_of_what_says_nothing_saves_nothing_and_says_so(tmp_path, capsys):
    paths = three_days(tmp_path)
    encrypted(paths[1])
    assert main(["evidence", "repair", "--dir", str(tmp_path)]) == 1
    assert "nothing could be read" in capsys.readouterr().err
    assert len(saved(tmp_path)) == 2 * PER_SEGMENT
    assert main(["evidence", "delete", "--dir", str(tmp_path), name(0)]) == 1
    assert f"{paths[1].name}.damaged" in capsys.readouterr().err
    assert main(["evidence", "repair", "--dir", str(tmp_path), "--remove"]) == 1
    assert not (tmp_path / f"{paths[1].name}.damaged").exists()
    assert main(["evidence", "delete", "--dir", str(tmp_path), name(1)]) == 0
