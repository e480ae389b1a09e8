"""Every fault in full, with the reconciliation printed: `make bench-chaos` writes results/chaos.json."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

from latentwatch import __version__

from tests.chaos import faults
from tests.chaos.world import Books
from tests.support.engines import ROOT

RESULT = ROOT / "tests/bench/results/chaos.json"
RUNS: dict[str, Callable[[int], Books]] = {
    "kills": lambda seed: faults.kills(100, seed),
    "exporter_kills": lambda seed: faults.exporter_kills(100, seed),
    "exporter_kills_without_spool": lambda seed: faults.exporter_kills(100, seed, spool=False),
    "exporter_and_collector_kills": lambda seed: faults.exporter_kills(100, seed, spool=False, collector_kills=True),
    "exporter_kills_full_ring": lambda seed: faults.exporter_kills(25, seed, **faults.FULL_RING),
    "exporter_stops": lambda seed: faults.exporter_stops(10, seed),
    "gateway_kills": lambda seed: faults.gateway_kills(200, seed),
    "cuts": lambda seed: faults.cuts(20, seed),
    "half_open": lambda seed: faults.half_open(2, seed, 16.0),
    "stops": lambda seed: faults.stops(1, seed, 30.0),
    "engine_deaths": lambda seed: faults.engine_deaths(30, seed),
    "handovers": lambda seed: faults.handovers(6, seed),
    "clock_jumps": lambda seed: faults.clock_jumps(6, seed),
    "full_disks": lambda seed: faults.full_disks(3, seed),
    "spooled_deaths": lambda seed: faults.spooled_deaths(20, seed),
    "full_spools": lambda seed: faults.full_spools(3, seed),
    "outages": lambda _: faults.outages(30.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=RUNS, action="append", help="run these, and leave the others' rows")
    args = parser.parse_args()
    wrong = False
    for name in args.only or RUNS:
        books = RUNS[name](args.seed)
        print(books.line(), flush=True)
        keep({"run": name, "seed": args.seed, **dataclasses.asdict(books)})
        wrong |= bool(books.lost or books.doubled or books.unbooked or books.open)
    print(f"wrote {RESULT.relative_to(ROOT)}")
    return int(wrong)


def keep(row: dict[str, Any]) -> None:
    """Put a row into the results, in the place of an earlier one of the same run."""
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    rows = [*(other for other in rows if other["run"] != row["run"]), row]
    rows.sort(key=lambda row: list(RUNS).index(row["run"]))
    result = {
        "what": "tokens that engines handed over against what collectors counted, under each fault",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores shared with other work",
        "versions": {"latentwatch": __version__, "python": platform.python_version()},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
