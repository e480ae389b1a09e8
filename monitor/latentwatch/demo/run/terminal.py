"""Progress on a terminal: finished steps stay, the running one is redrawn; in a log, plain lines.

No dependency and no thread: whoever waits calls `tick()`.
"""

from __future__ import annotations

import os
import shutil
import time
from typing import Final, TextIO

LOG_EVERY_SECONDS: Final = 10.0
"""How often a running step says that it still runs where the output is not a terminal (CI logs, pipes)."""
SPINNER: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
STYLES: Final = {"dim": "2", "bold": "1", "green": "32", "red": "31", "yellow": "33", "cyan": "36"}


class Terminal:
    """Writes lines with the time since the start, in colour only where a person looks at a terminal."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self._live and not os.environ.get("NO_COLOR")
        self._began = time.monotonic()
        self._said = 0.0
        self._frame = 0

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._began

    def style(self, text: str, style: str) -> str:
        """The text in a style of `STYLES`, or as it is where colour is off."""
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if self._colour else text

    def line(self, text: str = "") -> None:
        """A line that stays, without a time."""
        self._write(text)

    def done(self, step: str, text: str, *, mark: str = "✓", style: str = "green") -> None:
        """A step that ended; it stays."""
        self._write(f"{self._stamp()} {self.style(mark, style)} {step:<14} {text}")
        self._said = time.monotonic()

    def tick(self, step: str, text: str) -> None:
        """The step that runs now. Redrawn on a terminal; elsewhere one line every LOG_EVERY_SECONDS."""
        if self._live:
            self._frame += 1
            mark = self.style(SPINNER[self._frame % len(SPINNER)], "cyan")
            # The stamp, the mark and the step's name take 28 columns; a wrapped line could not be redrawn.
            room = shutil.get_terminal_size().columns - 29
            self._out.write(f"\r\x1b[K{self._stamp()} {mark} {step:<14} {text[:room]}")
            self._out.flush()
        elif time.monotonic() - self._said >= LOG_EVERY_SECONDS:
            self.done(step, text, mark="…", style="dim")

    def _stamp(self) -> str:
        return self.style(f"[{self.elapsed_seconds:6.1f} s]", "dim")

    def _write(self, text: str) -> None:
        self._out.write(("\r\x1b[K" if self._live else "") + text + "\n")
        self._out.flush()
