#!/usr/bin/env python3
"""Writes dashboards/grafana/*.json: `python dashboards/generate.py`. `--check` only compares.

The JSON is committed and never edited by hand; boards/ has one file a board.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from boards import BOARDS
from grafana_foundation_sdk.cog.encoder import JSONEncoder

FOLDER = Path(__file__).parent / "grafana"


def rendered() -> dict[str, str]:
    """File name to content."""
    return {f"{name}.json": json.dumps(made(), indent=1, cls=JSONEncoder) + "\n" for name, made in BOARDS.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file differs")
    check = parser.parse_args().check
    files = rendered()
    there = {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.json")}
    if check:
        stale = sorted(name for name in files.keys() | there.keys() if files.get(name) != there.get(name))
        for name in stale:
            print(f"dashboards/grafana/{name}: differs; run: python dashboards/generate.py", file=sys.stderr)
        return int(bool(stale))
    FOLDER.mkdir(exist_ok=True)
    for name in there.keys() - files.keys():
        (FOLDER / name).unlink()
    for name, text in files.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
