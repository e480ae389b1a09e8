"""The package in numbers, beside the goals for them: `make bench-house` writes results/house.json.

How each number is counted: tests/support/house.py. Ends with 1 where a goal is missed, and names what misses it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.support import house
from tests.support.engines import ROOT

RESULT = ROOT / "tests/bench/results/house.json"
PACKAGE = ROOT / "monitor" / "latentwatch"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=PACKAGE, help="folder of the package (default: %(default)s)")
    parser.add_argument("--print-only", action="store_true", help="write no result file, e.g. for another package")
    args = parser.parse_args()
    rows = measured(args.root.resolve())
    for row in rows:
        value = f"{row.value:.3g}" if isinstance(row.value, float) else str(row.value)
        goal = "" if row.goal is None else f"at most {row.goal}{'' if row.meets_goal else ', MISSED: ' + row.where}"
        print(f"{row.measure:46} {value:>6}  {goal}".rstrip())
    if not args.print_only:
        write(rows)
    return int(not all(row.meets_goal for row in rows))


def measured(root: Path) -> list[house.Row]:
    """The rows of the package in this folder."""
    tests = (path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))
    return house.measure(house.read(root), tests)


def write(rows: list[house.Row]) -> None:
    """The result file, as the tables of the documents read it."""
    result = {
        "what": "the package's Python in numbers, generated code excluded, beside the goals for them (at most)",
        "date": datetime.date.today().isoformat(),
        "commit": _git("describe", "--always", "--dirty=, and what changed since"),
        "versions": {"latentwatch": version("latentwatch"), "python": platform.python_version()},
        "rows": [
            {"measure": row.measure, "value": round(row.value, 3), "goal": row.goal, "where": row.where} for row in rows
        ],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT.relative_to(ROOT)}")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
