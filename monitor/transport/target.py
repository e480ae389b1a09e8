"""Addresses of a stream: `unix:///path` or `host:port`, the same spelling for a sender and a receiver."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from monitor.errors import ConfigRefused

MAX_SOCKET_PATH_BYTES: Final = 107
"""sockaddr_un.sun_path on Linux, less its terminating zero."""

_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class Target:
    """A parsed address; `str()` is the spelling that gRPC takes."""

    socket_path: str = ""
    """Absolute path of a Unix socket, empty for TCP."""
    host: str = ""
    port: int = 0
    """0 asks the system for a free port; only a receiver can."""

    def __str__(self) -> str:
        return f"unix://{self.socket_path}" if self.socket_path else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, listening: bool = False) -> Target:
        """Read an address. Raises ConfigRefused, reason "target_invalid", for one that cannot be used."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix://")
            if not path.startswith("/") or path.startswith("//") or path.endswith("/") or "\0" in path:
                raise _refused(text, "a Unix socket is named by its absolute path, unix:///run/latentwatch.sock")
            if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
                raise _refused(
                    text, f"its path has {len(path.encode())} bytes, the system takes {MAX_SOCKET_PATH_BYTES}"
                )
            return cls(socket_path=path)
        match = _HOST_PORT.fullmatch(text)
        if match is None:
            raise _refused(text, "it is neither unix:///path nor host:port")
        port = int(match["port"])
        if port > 65535 or (port == 0 and not listening):
            raise _refused(text, f"port {port} is not one of 1..65535")
        return cls(host=match["host"], port=port)


def _refused(text: str, found: str) -> ConfigRefused:
    return ConfigRefused(
        f"address {text!r}",
        found=found,
        instead="Give unix:///absolute/path.sock, or host:port such as 127.0.0.1:4319 or [::1]:4319.",
        reason="target_invalid",
    )
