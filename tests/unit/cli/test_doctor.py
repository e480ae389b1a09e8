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

SICK = {"name": "disk_full", "part": "storage", "level": "problem", "headline": "A disk is full", "found": "1 MiB free"}


def health(*causes):
    """Of /healthz?verbose."""
    whole = [{"instead": "Free space.", "alert": "LatentwatchHealth", **cause} for cause in causes]
    return {"version": "1", "causes": whole, "checked": ["a", "b"]}


CASES = {
    "disabled": (lambda: doctor.plugin({"LATENTWATCH_DISABLE": "1"}), "failed", "turns all of it off"),
    "plugins": (lambda: doctor.plugin({"VLLM_PLUGINS": "other"}), "failed", "leaves latentwatch out"),
    "streams": (lambda: next(doctor.engines(view(engine()))), "ok", "streams and scores"),
    "all seen": (lambda: doctor.coverage(view(engine())), "ok", "100.00 %"),
    "almost all": (lambda: doctor.coverage(view(engine(), recent=0.99999)), "ok", "99.99 %"),
    "nobody": (lambda: doctor.coverage(view()), "skipped", "no engine streams"),
    "blind": (lambda: doctor.coverage(view(engine(state="not armed"))), "skipped", "no engine streams"),
    "problem": (lambda: next(doctor.causes(health(SICK))), "failed", "A disk is full: 1 MiB free"),
    "well": (lambda: next(doctor.causes(health())), "ok", "nothing of 2 that may be wrong is"),
    "other version": (lambda: next(doctor.causes({"version": "0"})), "failed", "names no health causes"),
    "no token": (lambda: doctor.coverage(view(engine(), recent=None)), "skipped", "send a request"),
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


def test_the_exit_code_is_of_what_failed_first_along_the_data_path_and_warnings_count_when_asked():
    def finding(part, status="failed"):
        return doctor.Finding("x", status, "y", part=part)

    assert list(doctor.EXIT_CODES.values()) == [3, 4, 5, 6, 7, 8]
    assert doctor.exit_code([finding("alerting"), finding("storage")]) == 6
    assert doctor.exit_code([finding("alerting", "warning"), finding("engines", "skipped")]) == 0
    assert doctor.exit_code([finding("alerting", "warning")], strict=True) == 1
    assert doctor.exit_code([finding("judgement", "unknown")], strict=True) == 0


def test_where_nothing_answers_every_asked_part_fails_and_the_exit_code_is_that_of_the_first(capsys):
    nobody = "http://127.0.0.1:9"
    assert main(["doctor", "--collector", nobody, "--prometheus", nobody, "--alertmanager", "gopher://x"]) == 4
    text = capsys.readouterr().out
    assert text.count("failed  ") == 3 and "3 of the checks failed." in text and "Check the address" not in text[:20]
