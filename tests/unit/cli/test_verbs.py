"""What all verbs have in common: what lacks is named, what is wrong is refused, what reads writes nothing."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from latentwatch.cli import VERBS, main, terminal
from latentwatch.collector.evidence_buffer import watched
from latentwatch.evidence.store import Retention, Store
from latentwatch.watchlist import file as watchlist_file

from tests.support.drift import random_baseline
from tests.support.evidence import FEATURES, NOW, one_request
from tests.support.streams import watchlist

WITHOUT_EXTRAS = [
    "torch",
    "vllm",
    "triton",
    "grpc",
    "grpc_health",
    "google",
    "fastapi",
    "starlette",
    "uvicorn",
    "pydantic",
    "pydantic_settings",
    "prometheus_client",
    "httpx",
    "cryptography",
    "msgspec",
    "pyarrow",
    "opentelemetry",
    "transformers",
    "tokenizers",
    "sae_lens",
    "sklearn",
    "huggingface_hub",
    "skops",
    "gguf",
    "argcomplete",
]
"""What an installation without any extra does not have."""
LINES = {
    "demo": "demo --no-prometheus",
    "demo build": "demo build --out {folder}/assets",
    "collector": "collector --watchlist {folder}/w",
    "doctor": "doctor --collector http://127.0.0.1:9",
    "evidence query": "evidence query --dir {folder}/e",
    "evidence show": "evidence show chatcmpl-made-000000000001 --dir {folder}/e",
    "evidence delete": "evidence delete chatcmpl-made-000000000001 --dir {folder}/e --dry-run",
    "evidence export": "evidence export --dir {folder}/e --out {folder}/parquet",
    "evidence audit": "evidence audit --dir {folder}/e",
    "evidence repair": "evidence repair --dir {folder}/e",
    "evidence key": "evidence key {folder}/key",
    "watchlist show": "watchlist show {folder}/w",
    "watchlist verify": "watchlist verify {folder}/w",
    "watchlist build": "watchlist build {folder}/absent.yaml --out {folder}/new",
    "watchlist discover": "watchlist discover {folder}/absent.yaml --positive {folder}/p --negative {folder}/n",
    "calibrate": "calibrate --from http://127.0.0.1:9 --model-name m --out {folder}/b",
    "calibrate of a recording": "calibrate --from {folder}/r --watchlist {folder}/w --model-name m --out {folder}/b",
    "baseline show": "baseline show {folder}/baseline",
    "canary": "canary --server http://127.0.0.1:9 --model m --prompts {folder}/p --key {folder}/k --runs 1",
    "record": "record --listen unix://{folder}/s --out {folder}/recording",
    "rules": "rules --out {folder}/rules",
    "replay": "replay {folder}/r --watchlist {folder}/w",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A watchlist, a baseline, and evidence of one request."""
    made = tmp_path_factory.mktemp("verbs")
    built = watchlist_file.write(watchlist(FEATURES), made / "w")
    random_baseline_file(made / "baseline")
    store = Store(made / "e", watched(built), Retention())
    store.write(one_request(1), NOW)
    store.close()
    (made / "p").write_text("Hello\n")
    return made


def random_baseline_file(path: Path) -> None:
    from latentwatch.drift import baseline

    baseline.write(random_baseline(FEATURES), path)


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_without_any_extra_each_verb_works_or_says_in_one_line_which_package_lacks(folder, line):
    code = f"""
import sys
for name in {WITHOUT_EXTRAS!r}:
    sys.modules[name] = None
from latentwatch.cli import main
sys.exit(main(sys.argv[1:]))
"""
    words = shlex.split(line.format(folder=folder))
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=240)
    assert "Traceback" not in ran.stderr, ran.stderr
    if "cannot be imported" in ran.stderr or "not installed" in ran.stderr:
        assert ran.returncode == 2 and len(ran.stderr.strip().splitlines()) == 1, ran.stderr
        assert "pip install" in ran.stderr or "where vLLM is installed" in ran.stderr, ran.stderr


def test_the_table_has_every_verb():
    assert {line.split()[0] for line in LINES.values()} == set(VERBS)


READING = ("query", "show chatcmpl-1", "delete chatcmpl-1", "delete chatcmpl-1 --dry-run", "audit", "repair")


@pytest.mark.parametrize("action", [*READING, "export --out {elsewhere}/out"])
def test_a_folder_that_is_none_of_evidence_is_refused_and_nothing_is_written_anywhere(tmp_path, capsys, action):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "passwd").write_text("root")
    words = shlex.split(action.format(elsewhere=tmp_path))
    assert main(["evidence", *words, "--dir", str(theirs)]) == 2
    assert "no evidence" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["passwd", "theirs"]


READS = ["watchlist show {w}", "watchlist verify {w}", "baseline show {b}", "replay {r} --watchlist {w}"]


@pytest.mark.parametrize("line", READS)
def test_a_verb_that_reads_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch, line, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    main(shlex.split(line.format(w=folder / "w", b=folder / "baseline", r=folder / "w")))
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


COUNTS = [
    "evidence query --dir {folder}/e --limit",
    "evidence audit --dir {folder}/e --limit",
    "watchlist search {folder}/labels word --limit",
    "canary --server http://127.0.0.1:9 --model m --prompts {folder}/p --key {folder}/k --runs",
]


@pytest.mark.parametrize("value", ["-3", "0", "x", "1.5"])
@pytest.mark.parametrize("line", COUNTS)
def test_how_many_is_a_whole_number_above_zero(folder, capsys, line, value):
    with pytest.raises(SystemExit) as refused:
        main([*shlex.split(line.format(folder=folder)), value])
    assert refused.value.code == 2 and f"{value!r} is no whole number above 0" in capsys.readouterr().err


def test_a_feature_or_model_that_nothing_was_seen_with_is_refused_with_what_was_probably_meant(folder, capsys):
    query = ["evidence", "query", "--dir", str(folder / "e")]
    assert main([*query, "--feature", FEATURES[0].id]) == 0
    capsys.readouterr()
    assert main([*query, "--feature", FEATURES[0].id[:-1]]) == 2
    assert f"Did you mean {FEATURES[0].id}?" in capsys.readouterr().err
    assert main([*query, "--model", "nobody"]) == 2
    assert "has none of this name" in capsys.readouterr().err


JSON = {
    "query": "evidence query --dir {folder}/e --json",
    "show": "evidence show chatcmpl-made-000000000001 --dir {folder}/e --json",
    "audit": "evidence audit --dir {folder}/e --json",
    "watchlist": "watchlist show {folder}/w --json",
    "baseline": "baseline show {folder}/baseline --json",
    "doctor": "doctor --collector http://127.0.0.1:9 --json",
}


@pytest.mark.parametrize("line", JSON.values(), ids=JSON)
def test_a_verb_that_prints_facts_prints_them_as_json_and_nothing_else(folder, capsys, line):
    code = main(shlex.split(line.format(folder=folder)))
    said = json.loads(capsys.readouterr().out)
    assert said and (code == 4) == line.startswith("doctor")


def test_the_doctors_json_has_the_exit_code_and_what_to_do(capsys):
    assert main(["doctor", "--collector", "http://127.0.0.1:9", "--json"]) == 4
    said = json.loads(capsys.readouterr().out)
    assert said["exit_code"] == 4
    (failed,) = [one for one in said["findings"] if one["status"] == "failed"]
    assert (failed["check"], failed["part"]) == ("collector", "collector") and failed["instead"]


@pytest.mark.parametrize(
    ("env", "tty", "wanted"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colour_is_where_somebody_sees_it_and_never_where_they_said_no(env, tty, wanted):
    class Stream:
        def isatty(self) -> bool:
            return tty

    assert terminal.wants_colour(Stream(), env) == wanted


def test_a_shell_that_asks_is_answered_by_argcomplete_with_the_whole_line(monkeypatch, capsys):
    asked = []

    class Module:
        @staticmethod
        def autocomplete(parser) -> None:
            asked.append(parser.prog)

    monkeypatch.setitem(sys.modules, "argcomplete", Module)
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    assert main(["doctor", "--collector", "http://127.0.0.1:9"]) == 4
    assert asked == ["latentwatch"]
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert main(["doctor", "--collector", "http://127.0.0.1:9"]) == 4, "without it a verb does its work"


def test_a_pipe_that_is_closed_is_quiet(folder):
    command = f"{sys.executable} -m latentwatch watchlist show {folder / 'w'} --json | true"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ, timeout=120)
    assert ran.stderr == ""


def test_a_collector_makes_its_sockets_folder_or_says_what_lacks(folder, tmp_path, capsys):
    there = tmp_path / "run" / "latentwatch"
    listen = f"unix://{there}/collector.sock"
    line = ["collector", "--watchlist", str(folder / "w"), "--http", "127.0.0.1:0", "--listen", listen]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert f"there is no folder {there}" in said and "--listen unix://$XDG_RUNTIME_DIR" in said
    (tmp_path / "run").mkdir()
    code = f"""
import os, signal, sys, threading
from latentwatch.cli import main
def stop():
    import time
    while not os.path.exists({str(there / "collector.sock")!r}):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
sys.exit(main({line!r} + ["--log-format", "json"]))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and there.stat().st_mode & 0o777 == 0o700, ran.stderr
    for one in ran.stderr.splitlines():
        assert set(json.loads(one)) >= {"time", "level", "logger", "message"}
