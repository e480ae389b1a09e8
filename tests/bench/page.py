"""The live page with 1,024 features in headless Chromium: `make bench-page` writes results/page.json.

A live collector with as many features as a watchlist may have; two browsers stay on its page for ten minutes, one on
the page as it opens, one that turns through all features and opens a feature's and a request's view on the way.
Loading is timed by the page's own clock, from the start of the navigation to the first features drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from latentwatch import __version__
from latentwatch.watchlist.file import MAX_FEATURES

from tests.support.browser import Tab, browser

RESULT = Path(__file__).parent / "results" / "page.json"
LOADS, ACTION_SECONDS = 10, 2.0
ROWS = "document.querySelectorAll('#features tr').length"
DRAWN_AT = f"""
(function wait() {{
  if (!document.querySelector('#features') || {ROWS} === 0) setTimeout(wait, 5);
  else requestAnimationFrame(() => (window.drawnAt = performance.now()));
}})();
"""
Action = Callable[[Tab], None]


@contextlib.contextmanager
def live_collector(seconds: float) -> Iterator[str]:
    """URL of a collector under load, in a process of its own."""
    argv = [sys.executable, "-m", "tests.support.live_page", "--http", "127.0.0.1:0", "--features", str(MAX_FEATURES)]
    argv += ["--running", "6", "--history", "600", "--seconds", str(seconds)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGKILL)


def renderers_mb(browser_pid: int) -> dict[str, float]:
    """Resident and proportional memory of the largest process that renders, which is the page's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if "--type=renderer" in (folder / "cmdline").read_text() and browser_pid in ancestors(folder):
                sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", (folder / "smaps_rollup").read_text(), re.MULTILINE))
                found.append((int(sizes["Rss"]) / 1024, int(sizes["Pss"]) / 1024))
    resident, proportional = max(found)
    return {"resident_mb": round(resident, 1), "proportional_mb": round(proportional, 1)}


def ancestors(folder: Path) -> Iterator[int]:
    while (pid := int((folder / "stat").read_text().rpartition(")")[2].split()[1])) > 1:
        yield pid
        folder = Path("/proc") / str(pid)


def load_seconds(tab: Tab, url: str) -> float:
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=DRAWN_AT)
    tab.open(url)
    tab.until("window.drawnAt", 120)
    return float(tab.run("window.drawnAt")) / 1000


def loads(url: str) -> dict[str, float]:
    """One after the other, each in a tab that has shown nothing."""
    seconds = []
    for _ in range(LOADS):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, browser(Path(profile)) as (tab, _):
            seconds.append(load_seconds(tab, url))
    return {
        "loads": LOADS,
        "load_seconds_p50": round(float(np.median(seconds)), 3),
        "load_seconds_max": round(max(seconds), 3),
    }


def turn(tab: Tab) -> None:
    """To the next page of features; from the last one to the first, by way of a feature and a request."""
    tab.run(
        """(() => {
          const find = (selector) => document.querySelector(selector);
          if (!find('#later').disabled) return find('#later').click();
          find('#features a').click();
          setTimeout(() => find('#flagged a')?.click(), 700);
          setTimeout(() => (find('#details').close(), find('#filter').dispatchEvent(new Event('input'))), 1500);
        })()"""
    )


def stay(tab: Tab) -> None:
    """On the page as it opened."""


def measure(view: str, action: Action, url: str, minutes: float, rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, browser(Path(profile)) as (tab, pid):
        tab.size(1440, 1000)
        row: dict[str, Any] = {"view": view, "features": MAX_FEATURES, "minutes": minutes}
        row |= {f"{name}_without_page": size for name, size in renderers_mb(pid).items()}
        load_seconds(tab, url)
        time.sleep(5)
        sizes = [renderers_mb(pid)]
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            action(tab)
            time.sleep(ACTION_SECONDS)
            sizes.append(renderers_mb(pid))
        row |= {f"{name}_at_start": size for name, size in sizes[0].items()}
        row |= {f"{name}_at_end": size for name, size in sizes[-1].items()}
        row |= {f"{name}_largest": max(size[name] for size in sizes) for name in sizes[0]}
        row["nodes_at_end"] = tab.run("document.querySelectorAll('*').length")
        assert tab.run("document.querySelector('#banner').hidden"), "the collector answered to the end"
        rows.append(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    load, rows = os.getloadavg()[0], list[dict[str, Any]]()
    with live_collector(60 * args.minutes + 600) as url:
        views = {"as it opens": stay, "turning through all features": turn}
        loading = loads(url)
        threads = [threading.Thread(target=measure, args=(*view, url, args.minutes, rows)) for view in views.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if len(rows) < len(views):
        return 1
    chromium = subprocess.run(["chromium", "--version"], capture_output=True, text=True).stdout.split()[1]
    result = {
        "what": "the live page in headless Chromium: time to the first features drawn, memory of its renderer",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"latentwatch": __version__, "python": platform.python_version(), "chromium": chromium},
        **loading,
        "load_average_before": round(load, 1),
        "load_average_after": round(os.getloadavg()[0], 1),
        "rows": sorted(rows, key=lambda row: str(row["view"])),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
