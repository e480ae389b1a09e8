"""What verbs show on a terminal: colour where it is wanted, headings, the progress of work that takes long, and JSON.

Colour is off where standard output is no terminal, where NO_COLOR is set to anything (https://no-color.org) or TERM is
dumb; FORCE_COLOR turns it on. Progress goes to standard error, so that what is printed can be piped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO

_STYLES: Final = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "dim": "2"}
_LINE_SECONDS: Final = 30.0
"""Between two lines of progress where they are read later; a terminal is told as often as it is asked."""


def wants_colour(stream: TextIO, env: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written there is to be coloured."""
    if env.get("NO_COLOR"):
        return False
    return bool(env.get("FORCE_COLOR")) or (stream.isatty() and env.get("TERM") != "dumb")


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """The text in this style, one of bold, red, green, yellow and dim, where colour is wanted."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if wants_colour(stream or sys.stdout) else text


def heading(text: str) -> None:
    """Print a line that what follows stands under."""
    print(styled(text, "bold"))


def print_json(value: Any) -> None:
    """Print plain values, dataclasses among them, as JSON; what is no finite number is null."""
    print(json.dumps(_plain(value), ensure_ascii=False, indent=1))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


class Progress:
    """How far something is: one line that is written over on a terminal, and lines now and then elsewhere."""

    def __init__(self, clock: Callable[[], float], stream: TextIO | None = None) -> None:
        """Args: clock: seconds that only rise."""
        self._clock, self._stream = clock, stream or sys.stderr
        self._told = -math.inf
        self._width = 0

    def show(self, text: str) -> None:
        """Say it, unless too little time went by."""
        if self._stream.isatty():
            print(f"\r{text.ljust(self._width)}", end="", file=self._stream, flush=True)
            self._width = len(text)
        elif self._clock() - self._told >= _LINE_SECONDS:
            self._told = self._clock()
            print(text, file=self._stream, flush=True)

    def end(self) -> None:
        """What is printed next stands on a line of its own."""
        if self._width:
            print(file=self._stream, flush=True)
            self._width = 0
