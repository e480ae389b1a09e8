"""What the doctor says of each part, well or ill."""

from __future__ import annotations

import pytest
from latentwatch.cli import doctor, main
from latentwatch.watchlist import file as watchlist_file

from tests.support.streams import sparse, watchlist


def engine(**changes):
    fields = {"replica": "pod-0/0", "model_name": "m", "state": "connected", "text": "", "reason": ""}
    return {**fields, "last_seen_seconds_ago": 1.0, **changes}


def view(*engines, recent=1.0, missing=None):
    return {"engines": list(engines), "coverage": {"recent_seen_ratio": recent, "missing": missing or {}}}


def watchdog(state="active", silenced_by=()):
    status = {"state": state, "silencedBy": list(silenced_by), "inhibitedBy": []}
    return {"status": status, "receivers": [{"name": "dead-mans-switch"}]}


LOADED = [{"rules": [{"name": "A", "health": "ok"}, {"name": "B", "health": "err"}]}]
UP = {"metric": {"instance": "c0:9464"}, "value": [0, "1"]}
DOWN = {"metric": {"instance": "c1:9464"}, "value": [0, "0"]}

FILES = """# HELP latentwatch_evidence_damaged_files Files.
latentwatch_evidence_damaged_files {}
latentwatch_state_aside_files {}
latentwatch_state_durable {}
latentwatch_state_write_failures_total 3
latentwatch_exceedances_total{{feature="a b"}} 1
"""

CASES = {
    "disabled": (lambda: doctor.plugin({"LATENTWATCH_DISABLE": "1"}), "failed", "turns all of it off"),
    "plugins": (lambda: doctor.plugin({"VLLM_PLUGINS": "other"}), "failed", "leaves latentwatch out"),
    "streams": (lambda: next(doctor.engines(view(engine()))), "ok", "streams and scores"),
    "no engine": (lambda: next(doctor.engines(view())), "failed", "no engine has connected"),
    "blind": (lambda: next(doctor.engines(view(engine(state="not armed", text="width 8")))), "failed", "width 8"),
    "away": (lambda: next(doctor.engines(view(engine(state="disconnected")))), "failed", "last heard 1 s ago"),
    "all seen": (lambda: doctor.coverage(view()), "ok", "100.00%"),
    "some missed": (lambda: doctor.coverage(view(recent=0.9, missing={"lost": 3})), "failed", "missing: lost"),
    "no token": (lambda: doctor.coverage(view(recent=None)), "skipped", "send a request"),
    "files": (lambda: doctor.files(FILES.format(0, 0, 1)), "ok", "no file"),
    "damaged files": (lambda: doctor.files(FILES.format(2, 1, 1)), "failed", "3 files cannot be read"),
    "state in memory": (lambda: doctor.files(FILES.format(0, 0, 0)), "failed", "the state cannot be written"),
    "same file": (lambda: doctor.same_watchlist({"watchlist_sha256": "ab"}, "ab"), "ok", "has this watchlist"),
    "other file": (lambda: doctor.same_watchlist({"watchlist_sha256": "ab"}, "cd"), "failed", "the file is cd"),
    "scraped": (lambda: doctor.scrape([UP]), "ok", "1 of 1"),
    "not scraped": (lambda: doctor.scrape([UP, DOWN]), "failed", "c1:9464"),
    "no target": (lambda: doctor.scrape([]), "failed", "no scrape target"),
    "rules": (lambda: doctor.rules(LOADED, {"A"}), "ok", "all 1 alerts"),
    "rules missing": (lambda: doctor.rules(LOADED, {"A", "C"}), "failed", "1 of 2 alerts are not loaded: C"),
    "rules ill": (lambda: doctor.rules(LOADED, {"A", "B"}), "failed", "evaluation fails: B"),
    "route": (lambda: doctor.route([watchdog()]), "ok", "goes to dead-mans-switch"),
    "no watchdog": (lambda: doctor.route([]), "failed", "does not arrive"),
    "silenced": (lambda: doctor.route([watchdog("suppressed", ["s1"])]), "failed", "suppressed by s1"),
}


@pytest.mark.parametrize(("found", "status", "words"), CASES.values(), ids=CASES)
def test_each_state_of_each_part_has_words_and_a_failure_says_what_to_do(found, status, words):
    finding = found()
    assert finding.status == status and words in finding.found
    assert bool(finding.instead) == (status == "failed")


def test_a_watchlist_file_is_read_and_a_broken_one_says_what_to_do(tmp_path):
    built = watchlist_file.write(watchlist([sparse("f")]), tmp_path / "w.safetensors")
    finding, sha256 = doctor.readable_watchlist(tmp_path / "w.safetensors")
    assert finding.status == "ok" and sha256 == built.sha256
    (tmp_path / "w.safetensors").write_bytes(b"no")
    finding, sha256 = doctor.readable_watchlist(tmp_path / "w.safetensors")
    assert finding.status == "failed" and finding.instead and not sha256


def test_where_nothing_answers_every_asked_part_fails_and_the_exit_code_is_1(capsys):
    nobody = "http://127.0.0.1:9"
    assert main(["doctor", "--collector", nobody, "--prometheus", nobody, "--alertmanager", "gopher://x"]) == 1
    text = capsys.readouterr().out
    assert text.count("failed  ") == 3 and "3 of the checks failed." in text and "Check the address" not in text[:20]
