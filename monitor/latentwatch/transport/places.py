"""Places that peers share: bounded in all and for each peer, and given up by whoever only waits when another comes.

One peer that takes many and does nothing with them loses its own oldest first, so that it holds up nobody else, and a
newcomer waits for no deadline.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Generic, TypeVar

T = TypeVar("T")


class Full(Exception):
    """No place is free, and whoever has one is at work."""


class Places(Generic[T]):
    """Who has a place, and who of them only waits."""

    def __init__(self, most: int, most_of_peer: int) -> None:
        """Args: most: places.   most_of_peer: of them for one peer."""
        self.most = most
        self._most_of_peer = most_of_peer
        self._peers: dict[T, str] = {}
        self._taken: Counter[str] = Counter()
        self._waiting: dict[str, dict[T, None]] = {}
        """By peer, the one that waits for longest first."""

    def __len__(self) -> int:
        return len(self._peers)

    def __contains__(self, item: T) -> bool:
        return item in self._peers

    def reserve(self, item: T, peer: str) -> T | None:
        """Give `item` a place, in which it waits. Returns who lost its place for it. Raises Full."""
        crowded = self._taken[peer] >= self._most_of_peer
        lost: T | None = None
        if crowded or len(self._peers) >= self.most:
            lost = self._oldest(peer if crowded else max(self._waiting, key=self._taken.__getitem__, default=peer))
            self.leave(lost)
        self._peers[item] = peer
        self._taken[peer] += 1
        self.wait(item)
        return lost

    def work(self, item: T) -> None:
        """It does what it came for: its place is safe. Nothing happens where it has none."""
        if (peer := self._peers.get(item)) is not None and peer in self._waiting:
            self._waiting[peer].pop(item, None)
            if not self._waiting[peer]:
                del self._waiting[peer]

    def wait(self, item: T) -> None:
        """It waits again, behind those that waited already. Nothing happens where it has no place."""
        if (peer := self._peers.get(item)) is not None:
            waiting = self._waiting.setdefault(peer, {})
            waiting.pop(item, None)
            waiting[item] = None

    def leave(self, item: T) -> None:
        """Its place is free. Nothing happens where it has none."""
        self.work(item)
        if (peer := self._peers.pop(item, None)) is not None:
            self._taken[peer] -= 1
            if not self._taken[peer]:
                del self._taken[peer]

    def _oldest(self, peer: str) -> T:
        if peer not in self._waiting:
            raise Full
        return next(iter(self._waiting[peer]))


def peer_of(host: str) -> str:
    """Who is behind an address: itself, or the /64 of an IPv6 one, in which a host takes as many as it likes."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, 64), strict=False))
        address = address.ipv4_mapped
    return str(address)
