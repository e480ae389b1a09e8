"""Where the rules, the boards and the sample Alertmanager configuration are, which are no part of the package."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import latentwatch
from latentwatch.errors import ConfigRefused, RefusalReason


def folder() -> Path:
    """The folder `dashboards`, in a checkout or where an installed package has put it.

    Raises: ConfigRefused, reason "rules_missing".
    """
    places = (
        Path(latentwatch.__file__).parents[2] / "dashboards",
        Path(sysconfig.get_path("data")) / "share" / "latentwatch" / "dashboards",
    )
    for place in places:
        if (place / "rules" / "alerts.yaml").exists():
            return place
    raise ConfigRefused(
        "alert rules",
        found=f"not in {' or '.join(map(str, places))}",
        instead="Install latentwatch whole, or run it from a checkout.",
        reason=RefusalReason.RULES_MISSING,
    )
