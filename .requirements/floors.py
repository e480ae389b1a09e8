"""The lowest versions that pyproject.toml accepts, one requirement a line: python .requirements/floors.py EXTRA...

Each `>=` becomes `==`: pip refuses floors that cannot be installed together, and what is given no floor is named.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_FLOOR = re.compile(r"([A-Za-z0-9._-]+)>=([^,;\s]+)(?:,<[^,;\s]+)?")


def floors(project: dict[str, object], extras: list[str]) -> list[str]:
    """`name==lowest` of the dependencies and of these extras. Raises: SystemExit: one of them has no floor."""
    optional = project["optional-dependencies"]
    # What tomllib gives is of no type that could be indexed.
    wanted = [*project["dependencies"], *(one for extra in extras for one in optional[extra])]  # type: ignore[index, misc]
    found = {one: _FLOOR.fullmatch(one) for one in dict.fromkeys(wanted)}
    if without := [one for one, match in found.items() if match is None]:
        raise SystemExit(f"pyproject.toml: {', '.join(without)}: no lowest version. Write NAME>=VERSION.")
    return [f"{match[1]}=={match[2]}" for match in found.values() if match]


if __name__ == "__main__":
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    print("\n".join(floors(tomllib.loads(text)["project"], sys.argv[1:])))
