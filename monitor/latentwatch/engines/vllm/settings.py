"""What the operator asked for, from environment variables; and whether it can be armed at all."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from latentwatch import __version__, host
from latentwatch.errors import ConfigRefused, Refusal, RefusalReason
from latentwatch.watchlist import file as watchlist_file

# What stands under each is its row in the documents: docs/settings.md.
WATCHLIST: Final = "LATENTWATCH_WATCHLIST"
"""the built watchlist file; without this and the collector the plugin does nothing"""
COLLECTOR: Final = "LATENTWATCH_COLLECTOR"
"""where the collector listens, `unix:///path` or `host:port`"""
REPLICA: Final = "LATENTWATCH_REPLICA"
"""stable name of this server, to which the engine's index is added; the host's name if unset, which is a pod's own"""
DISABLE: Final = "LATENTWATCH_DISABLE"
"""`1`: the plugin is off from the next start of vLLM on, whatever else is set"""
STRICT_MODEL: Final = "LATENTWATCH_STRICT_MODEL"
"""`1`: a model that differs from the one that the watchlist states is not scored; otherwise that is only told"""
UNNAMED: Final = "unnamed"
"""The replica where neither the operator nor the system gives a name."""


@dataclass(frozen=True)
class PluginSettings:
    """The plugin's whole configuration; `wanted` is False where neither variable is set: installed, not asked for."""

    watchlist: str
    collector: str
    replica: str
    """Stable name of this server; the engine index is appended to it."""
    disabled: bool
    strict_model: bool = False
    """Whether a model that differs from the watchlist's is refused, and not only told."""

    @property
    def wanted(self) -> bool:
        return not self.disabled and bool(self.watchlist or self.collector)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> PluginSettings:
        return cls(
            watchlist=env.get(WATCHLIST, ""),
            collector=env.get(COLLECTOR, ""),
            replica=env.get(REPLICA, "") or host.host_name() or UNNAMED,
            disabled=env.get(DISABLE, "") not in ("", "0"),
            strict_model=env.get(STRICT_MODEL, "") not in ("", "0"),
        )


@functools.cache
def load_watchlist(settings: PluginSettings) -> watchlist_file.Watchlist | Refusal:
    """The watchlist, read once per process, or why there is none."""
    if not settings.watchlist:
        return ConfigRefused(
            WATCHLIST,
            found="it is not set",
            instead="Set it to the file that 'latentwatch watchlist build' wrote.",
            reason=RefusalReason.WATCHLIST_MISSING,
        )
    try:
        return watchlist_file.read(Path(settings.watchlist))
    except Refusal as refusal:
        return refusal


def graph_key(hooks: Iterable[watchlist_file.HookRows], readers: Iterable[str] = ()) -> str:
    """What the armed graph depends on: where equal, a compiled graph can be used again.

    Rows, limits and labels are not in it: they stand in buffers, which the graph is given. Sizes are.

    Args: readers: for each hook point, which function of hook.py reads its stream; none where that is not known yet.
    """
    shapes = [f"{rows.hook_point}[{len(rows.features)},{rows.w_hi_KD.shape[1]}]" for rows in hooks]
    return "/".join(["latentwatch", __version__, *shapes, *readers])
