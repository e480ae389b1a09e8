"""What verbs write is for this user alone, and goes nowhere that another user of the host chose."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from latentwatch import storage
from latentwatch.cli import main
from latentwatch.drift import baseline
from latentwatch.transport.recording import RecordingSink
from latentwatch.watchlist import file as watchlist_file

from tests.support.drift import random_baseline
from tests.support.evidence import one_request, store
from tests.support.streams import sparse, watchlist

ID = "chatcmpl-made-000000000002-0123abcd"


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    now = time.time()
    (tmp_path / "evidence").mkdir()
    with store(tmp_path / "evidence") as written:
        for number in range(1, 4):
            written.write(one_request(number, seconds=now - 3600 * number, exceedances=2), now)
    watchlist_file.write(watchlist([sparse("f")]), tmp_path / "w.safetensors")
    features = [sparse("f")]
    baseline.write(random_baseline(features, sha256="a" * 64), tmp_path / "b.baseline")
    (tmp_path / "shared").mkdir()
    return tmp_path


def evidence_page(folder: Path, out: Path) -> int:
    return main(["evidence", "show", ID, "--dir", str(folder / "evidence"), "--html", str(out)])


def watchlist_page(folder: Path, out: Path) -> int:
    return main(["watchlist", "show", str(folder / "w.safetensors"), "--html", str(out)])


def baseline_page(folder: Path, out: Path) -> int:
    return main(["baseline", "show", str(folder / "b.baseline"), "--html", str(out)])


PAGES = [evidence_page, watchlist_page, baseline_page]
Page = Callable[[Path, Path], int]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_for_this_user_alone_whatever_the_umask_and_what_was_there(folder, page: Page):
    out = folder / "shared" / "page.html"
    assert page(folder, out) == 0
    assert mode(out) == 0o600 and "<html" in out.read_text()
    out.write_text("old")
    out.chmod(0o666)
    assert page(folder, out) == 0
    assert mode(out) == 0o600 and "<html" in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_a_link_that_somebody_put_there_is_refused_and_what_it_points_to_is_left(folder, page: Page, there, capsys):
    target, out = folder / "precious", folder / "shared" / "page.html"
    if there:
        target.write_text("precious")
    out.symlink_to(target)
    assert page(folder, out) == 2
    assert "it is a link" in capsys.readouterr().err
    assert target.exists() == there and (not there or target.read_text() == "precious")


@pytest.mark.parametrize("page", PAGES)
def test_a_link_at_the_place_where_a_page_is_made_first_is_not_followed(folder, page: Page):
    target, out = folder / "precious", folder / "shared" / "page.html"
    target.write_text("precious")
    out.with_name("page.html.partial").symlink_to(target)
    assert page(folder, out) == 0
    assert target.read_text() == "precious" and not out.is_symlink()


@pytest.mark.parametrize("name", ["pipe", "folder", "missing/page.html"])
def test_what_is_no_file_is_refused_in_one_line(folder, name, capsys):
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    assert evidence_page(folder, folder / name) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_exported_files_are_for_this_user_alone(folder):
    assert main(["evidence", "export", "--dir", str(folder / "evidence"), "--out", str(folder / "out")]) == 0
    files = list((folder / "out").iterdir())
    assert len(files) == 3 and {mode(path) for path in files} == {0o600}
    assert mode(folder / "out") == 0o700


def test_a_recording_is_for_this_user_alone(folder):
    RecordingSink(folder / "shared" / "r.recording")
    assert mode(folder / "shared" / "r.recording") == 0o600
    (folder / "shared" / "link").symlink_to(folder / "elsewhere")
    with pytest.raises(FileExistsError):
        RecordingSink(folder / "shared" / "link")
    assert not (folder / "elsewhere").exists()


@pytest.mark.parametrize("private", [True, False])
def test_a_file_that_takes_a_place_follows_no_link_on_its_way(tmp_path, private):
    """Of checkpoints, watchlists and baselines too."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("file", "file.partial"):
        (tmp_path / name).symlink_to(precious)
    with storage.atomic_write(tmp_path / "file", private=private) as file:
        file.write(b"new")
    assert precious.read_text() == "precious"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()
    assert mode(tmp_path / "file") == (0o600 if private else 0o666)


def test_the_secret_itself_in_place_of_its_file_is_not_repeated(tmp_path, capsys):
    watchlist_file.write(watchlist([sparse("f")]), tmp_path / "w.safetensors")
    secret = "s3cr3t-s3cr3t-s3cr3t"
    for option in ("--token-file", "--http-token-file", "--request-id-key-file"):
        assert main(["collector", "--watchlist", str(tmp_path / "w.safetensors"), option, secret]) == 2
        said = capsys.readouterr().err
        assert secret not in said and "command line" in said


def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path, capsys):
    watchlist_file.write(watchlist([sparse("f")]), tmp_path / "w.safetensors")
    address = "http://anna:s3cr3t@127.0.0.1:1"
    assert main(["collector", "--watchlist", str(tmp_path / "w.safetensors"), "--otlp", address]) == 2
    assert "s3cr3t" not in (said := capsys.readouterr().err) and "list of processes" in said
    assert main(["doctor", "--collector", address]) != 0
    captured = capsys.readouterr()
    assert "list of processes" in captured.out + captured.err
