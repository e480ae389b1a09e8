"""Twenty minutes at a steady rate: `make nightly` writes results/soak.json, with how fast resident memory grows.

One engine's stream goes into a sidecar, which forwards to a gateway; both are real processes with `--state`. Their
bounded parts (ended requests, exceedances, windows) fill up first, so the slope is that of the second half.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch import __version__
from latentwatch.transport.sender import Sender

from tests.bench.collector import REQUESTS, Collector, Load
from tests.support.engines import ROOT
from tests.support.streams import hello

RESULT = ROOT / "tests/bench/results/soak.json"
FEATURES = 256
LIFE_STEPS = 64
"""Short requests, so that every bound is reached within minutes."""
SAMPLE_SECONDS = 5.0
CATCH_UP_SECONDS = 60.0


def soak(minutes: float, tokens_per_second: float) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="lw") as name:
        gateway = Collector(Path(name), FEATURES, "gateway")
        sidecar = Collector(
            Path(name), FEATURES, "sidecar", ("--forward-to", gateway.target, "--forward-name", "pod-0")
        )
        parts = {"sidecar": sidecar, "gateway": gateway}
        sender = Sender(sidecar.target, hello(watchlist_sha256=sidecar.sha256))
        sender.start()
        load, steps = Load(FEATURES, life_steps=LIFE_STEPS), 0
        samples: dict[str, list[tuple[float, float]]] = {part: [] for part in parts}
        began = sampled = time.monotonic()
        while (now := time.monotonic()) - began < 60 * minutes:
            if steps * REQUESTS < tokens_per_second * (now - began):
                sender.offer(load.next())
                steps += 1
            else:
                time.sleep(0.002)
            if now - sampled >= SAMPLE_SECONDS:
                sampled = now
                for part, collector in parts.items():
                    samples[part].append((now - began, collector.read()["process_resident_memory_bytes"] / (1 << 20)))
        deadline = time.monotonic() + CATCH_UP_SECONDS
        while time.monotonic() < deadline and gateway.read()["latentwatch_tokens_total"] < steps * REQUESTS:
            time.sleep(0.5)
        stats = sender.close()
        rows = [
            row(part, collector.read(), samples[part], steps * REQUESTS, 60 * minutes)
            | {"shed_batches": stats.shed_batches, "tokens_dropped_by_sender": stats.dropped_tokens}
            for part, collector in parts.items()
        ]
        sidecar.stop()
        gateway.stop()
    return rows


def row(
    part: str, shown: dict[str, float], samples: list[tuple[float, float]], sent: int, seconds: float
) -> dict[str, Any]:
    when, mib = np.array(samples).T
    second_half = when > when[-1] / 2
    slope = np.polyfit(when[second_half] / 3600, mib[second_half], 1)[0]
    return {
        "process": part,
        "features": FEATURES,
        "minutes": round(seconds / 60, 1),
        "tokens_per_second": round(sent / seconds),
        "tokens_sent": sent,
        "tokens_merged": round(shown["latentwatch_tokens_total"]),
        "requests": round(shown["latentwatch_requests_total"]),
        "lost_sequences": round(shown["latentwatch_collector_lost_sequences_total"]),
        "resident_mib_first": round(float(mib[0]), 1),
        "resident_mib_half": round(float(mib[second_half][0]), 1),
        "resident_mib_last": round(float(mib[-1]), 1),
        "resident_mib_per_hour": round(float(slope), 2),
        "cpu_seconds": round(shown["process_cpu_seconds_total"], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--tokens-per-second", type=float, default=20_000.0)
    args = parser.parse_args()
    rows = soak(args.minutes, args.tokens_per_second)
    print(*rows, sep="\n")
    result = {
        "what": "an engine's stream into a sidecar that forwards to a gateway; memory's slope is of the second half",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores shared with other work",
        "versions": {"latentwatch": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "load_average": os.getloadavg(),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT.relative_to(ROOT)}")
    return int(any(one["tokens_merged"] + one["tokens_dropped_by_sender"] != one["tokens_sent"] for one in rows))


if __name__ == "__main__":
    sys.exit(main())
