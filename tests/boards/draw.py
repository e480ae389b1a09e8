"""Draws the dashboards for a person to look at: `python -m tests.boards.draw FOLDER`.

Each board of dashboards/grafana on live series: a real Prometheus that scrapes a collector under load, the panels drawn
by Grafana's own components (@grafana/ui and @grafana/data, in headless Chromium), one picture a board and scheme.
What is not Grafana's: the places of panels, and its heatmap, which that package does not have.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tests.support.browser import Tab, browser
from tests.support.live_boards import BOARDS, live, substituted
from tests.support.stack import ask

HERE: Final = Path(__file__).parent
VIEWER: Final = HERE / "node_modules" / ".viewer"
SHOWN_SECONDS: Final = 60.0
_PAGE: Final = """<!doctype html><meta charset="utf-8"><title>boards</title>
<link rel="stylesheet" href="viewer.css"><style>body{margin:8px}</style>
<div id="root"></div><script src="viewer.js"></script>"""


def build() -> None:
    """Bundles the viewer; `make tests/boards/node_modules/.installed` brought what it is made of."""
    subprocess.run(["npm", "--prefix", str(HERE), "run", "--silent", "build"], check=True, timeout=600)
    (VIEWER / "index.html").write_text(_PAGE)


def answers(url: str, board: Mapping[str, Any], now: float) -> dict[int, list[dict[str, Any]]]:
    """By a panel's id what Prometheus answers to each of its queries, over the last minute."""
    return {panel["id"]: list(_of_panel(url, panel, now)) for panel in board["panels"] if "targets" in panel}


def _of_panel(url: str, panel: Mapping[str, Any], now: float) -> Iterator[dict[str, Any]]:
    for target in panel["targets"]:
        asked = substituted(target["expr"])
        if target["instant"]:
            result = ask(url, "query", query=asked, time=now)["result"]
        else:
            result = ask(url, "query_range", query=asked, start=now - SHOWN_SECONDS, end=now, step=1)["result"]
        yield {"target": target, "result": result}


def draw(tab: Tab, board: Mapping[str, Any], found: Mapping[int, Any], now: float, *, dark: bool) -> dict[str, Any]:
    """Draws a board; what each panel showed, by its title: type, series, values, error."""
    tab.open((VIEWER / "index.html").as_uri())
    span = [1000 * (now - SHOWN_SECONDS), 1000 * now]
    mode = "dark" if dark else "light"
    width, height = tab.run(f"draw({json.dumps(board)}, {json.dumps(found)}, {json.dumps(span)}, {json.dumps(mode)})")
    tab.size(width + 16, height + 16, dark=dark)
    # Plots draw themselves in the frame after.
    tab.run("new Promise((done) => setTimeout(done, 500))")
    return dict(tab.run("window.drawn"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pictures go, outside the repository")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    build()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        (Path(work) / "profile").mkdir()
        with live(Path(work)) as url, browser(Path(work) / "profile") as (tab, _):
            time.sleep(SHOWN_SECONDS)
            for name, board in BOARDS.items():
                now = time.time()
                found = answers(url, board, now)
                for dark in (False, True):
                    drawn = draw(tab, board, found, now, dark=dark)
                    tab.picture(folder / f"{name}-{'dark' if dark else 'light'}.png")
                print(f"{name}: {len(drawn)} panels, {sum(each.get('values', 0) for each in drawn.values())} values")
            for problem in tab.problems:
                print("the browser complains:", problem)


if __name__ == "__main__":
    main()
