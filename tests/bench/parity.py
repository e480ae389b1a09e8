"""Our scores against the upstream libraries' own: `make bench-parity` writes results/parity.json.

The rows are the golden cases: tiny encoders that the upstream classes made and encoded (golden/make.py names the
versions), every feature on every token. `max_abs_error` is over the scores on whose gate both agree, activations being
a few units; `gate_flips` counts the others further than 1e-4 from their threshold.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import platform
from pathlib import Path

import numpy as np
from latentwatch import __version__

from tests.support import parity

RESULT = Path(__file__).parent / "results" / "parity.json"


def main() -> None:
    rows = []
    for case in parity.cases():
        if case.startswith("sklearn") and importlib.util.find_spec("skops") is None:
            print(f"{case:48} left out: skops is not installed")
            continue
        row = parity.measure(case)
        rows.append(row)
        print(f"{case:48} max error {row['max_abs_error']:.1e}, {row['gate_flips']} flips of {row['n']}")
    report = {
        "what": "canonical scores against what the upstream libraries' own classes encode",
        "date": datetime.date.today().isoformat(),
        "hardware": platform.machine(),
        "versions": {"latentwatch": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "tolerance": {"max_abs_error": parity.MAX_ABS_ERROR, "near_threshold": parity.NEAR_THRESHOLD},
        "rows": rows,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    worst = max(rows, key=lambda row: row["max_abs_error"])
    print(f"{RESULT.name}: {len(rows)} cases, worst {worst['max_abs_error']:.1e} ({worst['case']})")


if __name__ == "__main__":
    main()
