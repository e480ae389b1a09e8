"""Errors that say what was asked, what was found and what to do instead.

Every refusal in the project is a `Refusal`: three sentences that an operator can act on, with the values
kept as attributes so that code (the wire, /metrics, tests) never parses prose.
"""

from __future__ import annotations


class Refusal(Exception):
    """Input that cannot be used. Its text is one line: what, found, instead.

    what:    what was asked for, or which input was read ("watchlist /etc/lw/prod.safetensors").
    found:   what is wrong with it, with the offending value.
    instead: what to do now.
    reason:  a short stable slug for metrics and tests, e.g. "watchlist_width".
    """

    def __init__(self, what: str, *, found: str, instead: str, reason: str) -> None:
        super().__init__(f"{what}: {found}. {instead}")
        self.what = what
        self.found = found
        self.instead = instead
        self.reason = reason


class WatchlistRefused(Refusal):
    """A watchlist file, YAML or source that cannot be loaded exactly."""


class EngineRefused(Refusal):
    """An engine configuration in which scores could not be attributed exactly."""


class StreamRefused(Refusal):
    """A stream or message that the collector does not accept."""


class StateRefused(Refusal):
    """State on disk that a collector cannot resume from."""


class ConfigRefused(Refusal):
    """A command line, environment variable or configuration value that cannot be used."""


class BaselineRefused(Refusal):
    """A baseline that is missing, damaged, too small, or of another model or watchlist."""
