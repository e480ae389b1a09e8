"""`latentwatch evidence`: each action on a folder, with its exit codes and its trace in the audit log."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from latentwatch.cli import main
from latentwatch.evidence.archive import Archive

from tests.support.evidence import one_request, store

ID = "chatcmpl-made-000000000002-0123abcd"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    now = time.time()
    with store(tmp_path) as written:
        for number in range(1, 4):
            written.write(one_request(number, seconds=now - 3600 * number, exceedances=2), now)
    return tmp_path


def test_query_lists_the_latest_first_and_filters_by_age(folder, capsys):
    assert main(["evidence", "query", "--dir", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "over 4 " in lines[-1]
    assert main(["evidence", "query", "--dir", str(folder), "--since", "90m", "--feature", "jailbreak"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "chatcmpl-made-000000000001-0123abcd" in line


def test_show_prints_the_request_or_writes_a_page_or_json(folder, capsys, tmp_path):
    assert main(["evidence", "show", "chatcmpl-made-000000000002", "--dir", str(folder)]) == 0
    assert ID in capsys.readouterr().out
    assert main(["evidence", "show", ID, "--dir", str(folder), "--html", str(tmp_path / "r.html")]) == 0
    assert ID in (tmp_path / "r.html").read_text()
    capsys.readouterr()
    assert main(["evidence", "show", ID, "--dir", str(folder), "--json"]) == 0
    (request,) = json.loads(capsys.readouterr().out)
    assert request["request_id"] == ID and request["activations"][0]["positions"]


def test_delete_removes_it_and_a_second_time_it_is_not_there(folder, capsys):
    assert main(["evidence", "delete", ID, "--dir", str(folder)]) == 0
    assert "1 requests deleted" in capsys.readouterr().out
    for action in ("delete", "show"):
        assert main(["evidence", action, ID, "--dir", str(folder)]) == 1
        assert "is not kept" in capsys.readouterr().err
    assert not any(ID.encode() in path.read_bytes() for path in folder.iterdir())


def test_every_reading_is_in_the_audit_log_which_names_requests_by_hash_only(folder, capsys):
    main(["evidence", "query", "--dir", str(folder), "--severity", "warning"])
    main(["evidence", "show", ID, "--dir", str(folder)])
    main(["evidence", "delete", ID, "--dir", str(folder)])
    capsys.readouterr()
    assert main(["evidence", "audit", "--dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[2] for line in out.splitlines()] == ["delete", "show", "query"]
    assert "severity=warning" in out and ID not in out and "cli:" in out
    assert main(["evidence", "audit", "--dir", str(folder), "--id", ID]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not any(ID.encode() in path.read_bytes() for path in folder.iterdir())


@pytest.mark.parametrize("argv", [["query"], ["show", "x"], ["delete", "x"], ["audit"]])
def test_a_folder_that_is_not_there_is_refused(tmp_path, argv, capsys):
    assert main(["evidence", *argv, "--dir", str(tmp_path / "none")]) == 2
    assert "--evidence" in capsys.readouterr().err


def test_an_age_without_a_unit_is_refused(folder, capsys):
    assert main(["evidence", "query", "--dir", str(folder), "--since", "90"]) == 2
    assert "30m" in capsys.readouterr().err


def test_export_writes_what_the_folder_holds_as_parquet(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["evidence", "export", "--dir", str(folder), "--out", str(out)]) == 0
    assert "3 requests, 6 exceedances" in capsys.readouterr().out
    tables = {path.stem: pq.read_table(path).to_pylist() for path in out.iterdir()}
    (shown,) = Archive(folder).find(ID)
    mine = [row for row in tables["activations"] if row["request_id"] == ID]
    expected = {(a.feature, p): v for a in shown.activations for p, v in zip(a.positions, a.values, strict=True)}
    assert {(row["feature"], row["position"]): row["value"] for row in mine} == pytest.approx(expected)
    (deceive,) = [r for r in tables["exceedances"] if r["request_id"] == ID and r["feature"] == "deceive"]
    assert (deceive["key"], deceive["severity"], deceive["limit"]) == (shown.key, "critical", 0.5)
    assert main(["evidence", "export", "--dir", str(folder), "--out", str(out)]) == 2
