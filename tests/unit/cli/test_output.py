"""Standard output that does not arrive: the work is done, and the exit code says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.evidence import one_request, store

SHOW = [sys.executable, "-P", "-m", "latentwatch", "collector", "--config-schema"]


def test_a_reader_that_has_gone_is_no_trouble_and_141_says_it() -> None:
    ran = subprocess.run(
        ["bash", "-c", '"$@" | head -c 1 >/dev/null; echo "${PIPESTATUS[0]}"', "bash", *SHOW],
        capture_output=True,
        text=True,
    )
    # What it prints may fit into the pipe before the reader goes.
    assert ran.stdout.strip() in ("0", str(128 + signal.SIGPIPE)) and ran.stderr == ""


def test_a_full_disk_under_the_output_is_named_and_is_no_success() -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(SHOW, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 1
    assert ran.stderr == "latentwatch collector: standard output: No space left on device\n"


def test_a_terminal_of_ascii_shows_the_rest_escaped(tmp_path: Path) -> None:
    missing = tmp_path / "Täuschung.safetensors"
    ran = subprocess.run(
        [*SHOW[:4], "watchlist", "show", str(missing)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and "T\\xe4uschung" in ran.stderr


def test_a_stream_that_must_not_wait_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = (
        "from latentwatch.cli.output import lenient_streams\n"
        "with lenient_streams() as out: print('x' * 1_000_000)\n"
        "raise SystemExit(int(out.lost))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert len(file.read()) == 1_000_001
    assert process.wait() == 0


@pytest.mark.parametrize("action", ["show", "verify"])
def test_what_the_system_refuses_is_one_line(action: str, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").mkdir()
    ran = subprocess.run(
        [*SHOW[:4], "watchlist", action, str(tmp_path / "w.safetensors")], capture_output=True, text=True
    )
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["show", "ID"], ["delete", "ID"], ["query", "--feature", "ID"]])
def test_a_word_that_is_no_text_is_refused(words: list[str], tmp_path: Path) -> None:
    with store(tmp_path) as written:
        written.write(one_request(1), 0.0)
    asked = [word.encode() if word != "ID" else b"\xff\xfe" for word in words]
    ran = subprocess.run([*SHOW[:4], "evidence", *asked, "--dir", str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 2 and "is no text in UTF-8" in ran.stderr and "Traceback" not in ran.stderr
