"""Evidence under load: `make bench-evidence` writes results/evidence.json.

A million exceedances, four a request, go through the collector's own writer thread into a folder, while another thread
of the same process looks requests up by id, each reading noted in the audit log, as the API does: once at the pace that
is asked for, once as fast as they are taken, when the writer leaves no time over. Wall time is what this machine gave
beside its other work, whose load average is in the result; CPU time is what the work itself took.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sqlite3
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch import __version__
from latentwatch.collector.evidence_buffer import watched
from latentwatch.collector.service import SWITCH_SECONDS
from latentwatch.evidence import store as stores
from latentwatch.evidence.archive import Archive
from latentwatch.evidence.audit import Audit
from latentwatch.evidence.records import Ended, Exceeded, Record, RecordedRequest
from latentwatch.evidence.store import Retention, Store
from latentwatch.evidence.writer import QUEUE_BYTES, Writer
from latentwatch.facts import Exceedance, RequestInfo, RequestProgress
from latentwatch.names import Outcome, Phase

from tests.support.evidence import one_request
from tests.support.streams import sparse, watchlist

RESULT = Path(__file__).parent / "results" / "evidence.json"
EXCEEDANCES, A_REQUEST, FEATURES, DELETED = 1_000_000, 4, 64, 10
LOOK_UPS_A_SECOND = 100
ASKED_A_SECOND = 25_000
"""The pace: what is asked for and a quarter more, since pauses are only ever too long."""
REQUESTS_A_STEP = 100
TOKENS = np.array([0, 50, 0, 0, 0])
SUMMARY = next(record for record in one_request(1) if isinstance(record, Ended)).features


def request_records(number: int, now: float) -> list[Record]:
    """What a request hands over: its exceedances, then its end."""
    info = RequestInfo(request_id(number), "pod-0/0", "toy", "0", now, opening_seen=True, prompt_tokens=20)
    request = RecordedRequest(number, info)
    exceeded: list[Record] = [
        Exceeded(request, Exceedance((number * 7 + i * 13) % FEATURES, Phase.OUTPUT, 20 + i, 4.5 + i, now))
        for i in range(A_REQUEST)
    ]
    progress = RequestProgress(Outcome.FINISHED, now, TOKENS, 31, 50)
    return [*exceeded, Ended(request, progress, replace(SUMMARY, exceeded=A_REQUEST), activations_lost=0)]


def request_id(number: int) -> str:
    """Spread like random ids: the index is written all over."""
    return f"chatcmpl-{number * 2654435761 % (1 << 32):08x}{number:08x}-0123abcd"


class LookUps(threading.Thread):
    """Finds requests that were written, at a steady pace."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._archive, self._audit = Archive(folder), Audit(folder)
        self.written = 0
        self.stop = threading.Event()
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def run(self) -> None:
        rng = np.random.default_rng(0)
        while not self.stop.wait(1 / LOOK_UPS_A_SECOND):
            if self.written:
                name = request_id(int(rng.integers(1, self.written + 1)))
                began, cpu_began = time.perf_counter(), time.thread_time()
                found = self._archive.find(name)
                self._audit.add(time.time(), "bench", "show", len(found), request=name)
                self.seconds.append(time.perf_counter() - began)
                self.cpu_seconds.append(time.thread_time() - cpu_began)
                assert len(found) == 1 and len(found[0].exceedances) == A_REQUEST


def ingest(folder: Path, exceedances: int, pace: float) -> dict[str, Any]:
    """Rates of writing, and latencies of reading meanwhile. `pace`: exceedances a second, inf for all that is taken."""
    target = Store(folder, watched(watchlist([sparse(f"f{i}") for i in range(FEATURES)])), Retention())
    writer, look_ups = Writer(target), LookUps(folder)
    look_ups.start()
    began, cpu_began = time.perf_counter(), time.process_time()
    for number in range(1, exceedances // A_REQUEST + 1):
        writer.put(request_records(number, time.time()))
        if number % REQUESTS_A_STEP == 0:
            while writer.totals().queued_bytes > QUEUE_BYTES // 8:
                time.sleep(0.005)
            time.sleep(max(0.0, began + number * A_REQUEST / pace - time.perf_counter()))
            look_ups.written = writer.totals().written.get("request_end", 0)
    writer.run(lambda: None).result()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    look_ups.stop.set()
    look_ups.join()
    totals = writer.totals()
    writer.close()
    assert totals.written["exceedance"] == exceedances and not totals.dropped
    latency = np.array(look_ups.seconds) * 1000
    return {
        "exceedances": exceedances,
        "pace_per_second": None if pace == np.inf else pace,
        "exceedances_per_second": round(exceedances / wall),
        "exceedances_per_cpu_second": round(exceedances / cpu),
        "look_ups": len(latency),
        "look_up_ms_p50": round(float(np.quantile(latency, 0.5)), 3),
        "look_up_ms_p99": round(float(np.quantile(latency, 0.99)), 3),
        "look_up_cpu_ms_p99": round(float(np.quantile(look_ups.cpu_seconds, 0.99)) * 1000, 3),
        "bytes_per_exceedance": round(stores.folder_bytes(folder) / exceedances, 1),
    }


def look_up_at_rest(folder: Path, exceedances: int) -> dict[str, Any]:
    """Latency of reading with nothing written."""
    archive, rng, seconds = Archive(folder), np.random.default_rng(1), []
    for number in rng.integers(1, exceedances // A_REQUEST + 1, 1000).tolist():
        began = time.perf_counter()
        assert archive.find(request_id(number))
        seconds.append(time.perf_counter() - began)
    return {"look_up_at_rest_ms_p99": round(float(np.quantile(seconds, 0.99)) * 1000, 3)}


def delete(folder: Path) -> dict[str, Any]:
    """Seconds to delete a request for good, and what is left of it in the files."""
    seconds = []
    for number in range(1, DELETED + 1):
        began = time.perf_counter()
        erased = stores.erase(folder, request_id(number * 101))
        seconds.append(time.perf_counter() - began)
        assert erased.requests == 1 and erased.clean
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    left = sum(request_id(number * 101).encode() in content for number in range(1, DELETED + 1))
    return {"delete_seconds_p50": round(float(np.median(seconds)), 3), "deleted_ids_found_in_files": left}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exceedances", type=int, default=EXCEEDANCES, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    sys.setswitchinterval(SWITCH_SECONDS)
    rows = []
    for pace in (ASKED_A_SECOND, np.inf):
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            row = ingest(Path(folder), args.exceedances, pace)
            row |= look_up_at_rest(Path(folder), args.exceedances)
            row |= delete(Path(folder))
        row |= {"load_average_before": round(load, 1), "load_average_after": round(os.getloadavg()[0], 1)}
        rows.append(row)
    result = {
        "what": "exceedances written by the collector's writer thread while requests are looked up by id",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "latentwatch": __version__,
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
        },
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
