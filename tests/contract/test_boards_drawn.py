"""The dashboards as Grafana's own components draw them, on live series: no panel is empty, none is in error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.boards.draw import answers, build, draw
from tests.support.browser import Tab, browser
from tests.support.live_boards import BOARDS, live


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Tab]]:
    """A Prometheus with series, and a browser."""
    build()
    folder = tmp_path_factory.mktemp("boards")
    with live(folder) as url, browser(folder / "profile") as (tab, _):
        yield url, tab


def emptiness(found: dict[int, Any]) -> list[int]:
    return [panel for panel, queries in found.items() if not any(query["result"] for query in queries)]


@pytest.mark.e2e
@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_is_drawn_with_values_and_without_an_error(scene: tuple[str, Tab], name: str) -> None:
    url, tab = scene
    board = BOARDS[name]
    deadline = time.monotonic() + 90
    # Rates want two scrapes of a series, drift an end of a window, and a busy machine serves both late.
    while emptiness(found := answers(url, board, now := time.time())) and time.monotonic() < deadline:
        time.sleep(2)
    drawn = draw(tab, board, found, now, dark=False)
    panels = {panel["title"]: panel for panel in board["panels"] if panel["type"] != "row"}
    assert drawn.keys() == panels.keys()
    assert not {title: said["error"] for title, said in drawn.items() if "error" in said}
    empty = [title for title, said in drawn.items() if said["type"] != "text" and not (said["rows"] or said["values"])]
    assert not empty
    assert "NaN" not in tab.run("document.querySelector('#board').innerText")
    # Fonts and icons are on a Grafana's own server.
    assert not [problem for problem in tab.problems if "/public/" not in problem]
