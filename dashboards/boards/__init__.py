"""Grafana's dashboards, one file a board. `queries` has what PromQL they share, `parts` how their panels look."""

from __future__ import annotations

from typing import Final

from . import feature, health, overview, requests

BOARDS: Final = {
    "overview": overview.board,
    "feature": feature.board,
    "requests": requests.board,
    "health": health.board,
}
"""By the name of the file, of the JSON and of the address: /d/latentwatch-<name>."""
