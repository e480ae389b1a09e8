"""Pictures of every view of the live page, for a person to look at: `python -m tests.page.pictures FOLDER`.

A collector in this process with a watchlist of fifteen features, requests that exceed limits of each kind, an id that
was used twice, drift, and evidence; each view at three widths, light and dark.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.support.browser import Tab, browser
from tests.support.page_scene import TWICE, VIEWS, scene

WIDTHS = (1440, 800, 390)
_READY = {
    "": "document.querySelectorAll('#features tr').length",
    "#": "document.querySelector('#details-body').children.length > 1",
}


def take(tab: Tab, url: str, folder: Path) -> None:
    """One picture for each view, width and scheme."""
    for name, view in VIEWS.items():
        for width in WIDTHS:
            for dark in (False, True):
                tab.size(width, 1000, dark=dark)
                tab.open(f"{url}/{view}")
                tab.until(_READY[view[:1]])
                tab.run("new Promise((done) => setTimeout(done, 400))")
                tab.picture(folder / f"{name}-{width}-{'dark' if dark else 'light'}.png", whole=not view)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pictures go, outside the repository")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        (Path(work) / "profile").mkdir()
        with scene(Path(work)) as service, browser(Path(work) / "profile") as (tab, _):
            take(tab, service.http_url, folder)
    print(f"{len(list(folder.glob('*.png')))} pictures in {folder}; {TWICE} was used twice")


if __name__ == "__main__":
    main()
