"""Whether a request is meant for this collector, and comes from its own pages.

A browser asks whatever address a name stands for, also one that was changed to this host after its page was loaded
("DNS rebinding"): then the `Host` is the other's name. An address as `Host` cannot be made so.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import Final

from latentwatch.errors import ConfigRefused, RefusalReason

_AUTHORITY: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_.])?)(?::\d{1,5})?")
_SAFE_METHODS: Final = frozenset({"GET", "HEAD"})


class Hosts:
    """The names under which a collector may be asked."""

    def __init__(self, names: Sequence[str]) -> None:
        """
        Args:   names: the operator's, beside `localhost` and the addresses.
        Raises: ConfigRefused, "config_value".
        """
        self._listed: set[str] = set()
        for name in names:
            if _host_of(name) != (plain := name.lower().rstrip(".").strip("[]")):
                raise ConfigRefused(
                    f"--http-host {name}",
                    found="it is no name of a host",
                    instead="Give a name or an address alone, such as latentwatch.example.org.",
                    reason=RefusalReason.CONFIG_VALUE,
                )
            self._listed.add(plain)
        self._names = {"localhost", *self._listed}
        self._only_loopback = True

    def bound(self, asked: str, address: str) -> None:
        """The server listens there now. Args: asked: the host that --http names.   address: what it was bound to."""
        self._only_loopback = ipaddress.ip_address(address).is_loopback
        self._names |= {asked.lower().strip("[]"), address}
        if not self._only_loopback:
            self._names.add(socket.gethostname().lower())

    def is_ours(self, authority: str) -> bool:
        """Whether a `Host` is one of this collector's: a name, or an address by which it can be reached."""
        host = _host_of(authority)
        if host is None or host in self._names:
            return host is not None
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return not self._only_loopback or (mapped or address).is_loopback

    def is_cross_site(self, method: str, authority: str, headers: dict[bytes, bytes]) -> bool:
        """Whether a browser says that another site's page asks, and not by a link that somebody followed."""
        if (origin := headers.get(b"origin")) is not None:
            scheme, _, from_authority = origin.decode("latin-1").lower().partition("://")
            same = _with_port(from_authority, scheme) == _with_port(authority.lower(), scheme)
            listed = _host_of(from_authority) in self._listed
            return scheme not in ("http", "https") or not (same or listed)
        followed = headers.get(b"sec-fetch-mode") == b"navigate" and method in _SAFE_METHODS
        return headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site") and not followed


def _host_of(authority: str) -> str | None:
    match = _AUTHORITY.fullmatch(authority.lower())
    return match[1].rstrip(".").strip("[]") if match else None


def _with_port(authority: str, scheme: str) -> str:
    if re.search(r":\d+$", authority):
        return authority
    return f"{authority}:{443 if scheme == 'https' else 80}"
