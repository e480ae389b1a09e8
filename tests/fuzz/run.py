"""Ten million inputs over every format that others write: `make fuzz`, which writes results/fuzz.json.

Targets take turns of some seconds, those with the least time so far first, each in a process of its own. What coverage
found stays in .cache/fuzz: a run that is stopped loses one turn, and the next one goes on. Beside them, broken messages
go through a receiver and a core whose books are compared (`messages`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field

from latentwatch import __version__

from tests.fuzz import messages
from tests.fuzz.targets import TARGETS
from tests.support.engines import ROOT

FOLDER = ROOT / ".cache/fuzz"
RESULT = ROOT / "tests/bench/results/fuzz.json"
WITH_BOOKS = "streams, with their books"
"""The row of `messages`."""
_BATCH = 2000
"""Of them, messages between two comparisons."""
_START_SECONDS = 300
"""More than a turn, for a process to start and end in."""


@dataclass
class Row:
    """A target so far."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    unexpected: dict[str, int] = field(default_factory=dict)
    coverage_lines: int = 0

    def turn(self, seconds: int) -> None:
        """Go on for about so long."""
        if self.target == WITH_BOOKS:
            self._with_books(seconds)
        else:
            self._guided(seconds)

    def _with_books(self, seconds: int) -> None:
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            messages.run(_BATCH, seed=self.inputs)
            self.inputs += _BATCH
        self.seconds += time.monotonic() - began

    def _guided(self, seconds: int) -> None:
        folder = FOLDER / self.target.replace(" ", "-")
        command = [sys.executable, "-m", "tests.fuzz.guided", self.target, "--folder", str(folder)]
        command += ["--seconds", str(seconds), "--seed", str(self.inputs)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds + _START_SECONDS)
        stats = json.loads((folder / "stats.json").read_text())
        whole = re.search(r"Done (\d+) runs", done.stderr)
        self.inputs += int(whole[1]) if whole else stats["inputs"]
        # A process that died said less than it took, and is not to have the next turn too.
        self.seconds += seconds if done.returncode else stats["seconds"]
        for what, count in stats["unexpected"].items():
            self.unexpected[what] = self.unexpected.get(what, 0) + count
        if done.returncode:
            # Out of time or memory, or the interpreter itself: libFuzzer says which, and leaves the input in crashes.
            said = re.search(r"ERROR: (.*)|Uncaught Python exception.*\n(.*)", done.stderr)
            what = said[0][:120] if said else f"exit code {done.returncode}"
            self.unexpected[what] = self.unexpected.get(what, 0) + 1
        covered = [sys.executable, "-m", "tests.fuzz.covered", self.target, str(folder / "corpus")]
        counted = subprocess.run(covered, capture_output=True, text=True, cwd=ROOT, check=True)
        self.coverage_lines = int(counted.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000_000)
    parser.add_argument("--turn", type=int, default=60, help="seconds of a target's turn (default: %(default)s)")
    parser.add_argument("--most-of-target", type=int, default=1_000_000, help="inputs of one (default: %(default)s)")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    rows = _resumed()
    while (total := sum(row.inputs for row in rows)) < args.inputs:
        waiting = [row for row in rows if row.inputs < args.most_of_target]
        if not waiting:
            break
        row = min(waiting, key=lambda row: row.seconds)
        row.turn(args.turn)
        _write(rows)
        print(f"{total} of {args.inputs}; {row.target}: {row.inputs} inputs, unexpected {row.unexpected}", flush=True)
    return int(any(row.unexpected for row in rows))


def _resumed() -> list[Row]:
    state = FOLDER / "rows.json"
    known = {row["target"]: Row(**row) for row in json.loads(state.read_text())} if state.exists() else {}
    return [known.get(name, Row(name)) for name in (*TARGETS, WITH_BOOKS)]


def _write(rows: list[Row]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "rows.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    result = {
        "what": "inputs that coverage guides, against every format that others write; unexpected is what was neither "
        "refused by name nor the same when written and read again, or took too long or too much memory",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores shared with other work",
        "versions": {"latentwatch": __version__, "python": platform.python_version()},
        "rows": [
            {
                "target": row.target,
                "inputs": row.inputs,
                "executions_per_s": round(row.inputs / row.seconds),
                "unexpected": sum(row.unexpected.values()),
                "coverage_lines": row.coverage_lines,
            }
            for row in rows
            if row.seconds
        ],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
