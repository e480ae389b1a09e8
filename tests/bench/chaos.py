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

from monitor import __version__
from tests.chaos import faults
from tests.chaos.world import Books
from tests.support.engines import ROOT

RESULT = ROOT / "tests/bench/results/chaos.json"
RUNS: dict[str, Callable[[int], Books]] = {
    "kills": lambda seed: faults.kills(100, seed),
    "cuts": lambda seed: faults.cuts(20, seed),
    "half_open": lambda seed: faults.half_open(2, seed, 16.0),
    "stops": lambda seed: faults.stops(1, seed, 30.0),
    "engine_deaths": lambda seed: faults.engine_deaths(5, seed),
    "handovers": lambda seed: faults.handovers(6, seed),
    "clock_jumps": lambda seed: faults.clock_jumps(6, seed),
    "full_disks": lambda seed: faults.full_disks(3, seed),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=RUNS, action="append", help="print these and write nothing")
    args = parser.parse_args()
    books = []
    for name in args.only or RUNS:
        books.append(RUNS[name](args.seed))
        print(books[-1].line(), flush=True)
    if not args.only:
        RESULT.write_text(
            json.dumps(
                {
                    "what": "tokens that engines handed over against what collectors counted, under each fault",
                    "date": datetime.date.today().isoformat(),
                    "hardware": f"{platform.machine()}, {os.cpu_count()} cores shared with other work",
                    "versions": {"latentwatch": __version__, "python": platform.python_version()},
                    "seed": args.seed,
                    "rows": [dataclasses.asdict(row) for row in books],
                },
                indent=1,
            )
            + "\n"
        )
        print(f"wrote {RESULT.relative_to(ROOT)}")
    return int(any(row.lost or row.doubled for row in books))


if __name__ == "__main__":
    sys.exit(main())
