"""`--help` is a contract: every verb says what it does and ends with a line to paste; every refusal is one line."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from latentwatch.cli import VERBS, build_parser, main


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_ends_with_a_line_to_paste_that_parses(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith("example:")]
    command = shlex.split(examples[-1].removeprefix("example:").split("#")[0])
    assert command[:2] == ["latentwatch", verb]
    build_parser().parse_args(command[1:])


def test_a_refusal_is_one_line_on_stderr_and_exit_code_2(tmp_path, capsys):
    assert main(["collector", "--watchlist", str(tmp_path / "absent.safetensors")]) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    assert "absent.safetensors" in message
    assert "watchlist build" in message


def test_help_is_quick_because_no_heavy_library_is_imported_for_it():
    code = """
import contextlib, sys
from latentwatch.cli import VERBS, main
for verb in VERBS:
    with contextlib.suppress(SystemExit):
        main([verb, "--help"])
print({"torch", "vllm", "transformers", "grpc", "fastapi"} & set(sys.modules), file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "set()" and ran.stdout.count("usage: latentwatch ") == len(VERBS)


def test_a_verb_does_not_need_what_another_verbs_options_need():
    """`latentwatch watchlist` runs where only the package itself is installed."""
    code = """
import sys
sys.modules["pydantic_settings"] = None
from latentwatch.cli import main
main(["watchlist", "--help"])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "usage: latentwatch watchlist" in ran.stdout, ran.stderr
