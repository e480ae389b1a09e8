"""Progress in a log, on a terminal, and without colour."""

from __future__ import annotations

import io

import pytest
from latentwatch.demo.run import terminal
from latentwatch.demo.run.terminal import Terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_log_there_are_plain_lines_and_no_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    shown = Terminal(out)
    shown.done("collector", "ready")
    shown.tick("vLLM", "loading")
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert "loading" not in out.getvalue()
    monkeypatch.setattr(terminal, "LOG_EVERY_SECONDS", 0.0)
    shown.tick("vLLM", "compiling")
    assert out.getvalue().splitlines()[-1].endswith("compiling")


def test_on_a_terminal_the_running_step_is_redrawn_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    out = Screen()
    shown = Terminal(out)
    shown.tick("vLLM", "x" * 200)
    shown.tick("vLLM", "again")
    assert "\n" not in out.getvalue()
    assert out.getvalue().count("x") == 31


def test_no_color_turns_colour_off_and_keeps_the_redraw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = Screen()
    shown = Terminal(out)
    assert shown.style("ok", "green") == "ok"
    shown.tick("a", "b")
    assert out.getvalue().startswith("\r")
