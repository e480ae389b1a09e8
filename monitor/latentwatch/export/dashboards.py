"""Where the rules, the boards and the sample Alertmanager configuration are, which are no part of the package."""

from __future__ import annotations

import re
import sysconfig
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Links:
    """Where an alert's links lead, and what share of tokens may be unseen by design."""

    runbook: str = "dashboards/runbook.md"
    """Where dashboards/runbook.md is published."""
    grafana: str = ""
    """Of Grafana; empty leaves its links as paths."""
    page: str = ""
    """Of the live page; empty is the collector's own address, by the label `instance`."""
    unseen_by_design: float = 0.95


_OWN_ADDRESS = re.compile(r"((?:page|request)_url: '?)http://\{\{.*?\}\}/")
"""Up to the first slash behind a template: those of collectors' addresses have none inside."""


def linked(rules: str, links: Links) -> str:
    """A rule file's text with every link of its alerts where `links` says; nothing else changes."""
    made = rules.replace("dashboards/runbook.md#", f"{links.runbook.rstrip('#')}#")
    made = re.sub(r"(dashboard_url: '?)/d/", lambda found: f"{found[1]}{links.grafana.rstrip('/')}/d/", made)
    if links.page:
        made = _OWN_ADDRESS.sub(lambda found: f"{found[1]}{links.page.rstrip('/')}/", made)
    share = f"{links.unseen_by_design:g}"
    return re.sub(r"(latentwatch_unseen_by_design:ratio_rate\w+ > )0\.95", lambda found: found[1] + share, made)
