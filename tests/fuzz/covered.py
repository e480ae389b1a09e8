"""How many lines of a target's modules a corpus reaches: `python -m tests.fuzz.covered TARGET CORPUS`."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import latentwatch

from tests.fuzz.targets import TARGETS
from tests.fuzz.targets.target import Target

_PACKAGE = Path(latentwatch.__file__).parent
_MOST_INPUTS = 500


def lines(target: Target, inputs: Iterable[bytes]) -> int:
    """Lines that are executed while inputs are read, without those that only importing executes."""
    files = {str(_PACKAGE / module) for module in target.modules}
    seen: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            seen.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    for data in inputs:
        sys.settrace(trace)
        try:
            # What is no refusal was counted where it was found.
            with contextlib.suppress(Exception):
                target.accepts(data)
        finally:
            sys.settrace(None)
    return len(seen)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    corpus = sorted(Path(sys.argv[2]).iterdir(), key=lambda path: path.stat().st_size)[:_MOST_INPUTS]
    print(lines(TARGETS[sys.argv[1]], (path.read_bytes() for path in corpus)))
