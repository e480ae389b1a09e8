"""Settings of a stream's two ends: addresses, `unix:///path` or `host:port`, and numbers from the environment."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from latentwatch.errors import ConfigRefused, RefusalReason

MAX_SOCKET_PATH_BYTES: Final = 107
"""sockaddr_un.sun_path on Linux, less its terminating zero."""

_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class Address:
    """A parsed address; `str()` is the spelling that gRPC takes."""

    socket_path: str = ""
    """Absolute path of a Unix socket, empty for TCP."""
    host: str = ""
    port: int = 0
    """0 asks the system for a free port; only a receiver can."""

    def __str__(self) -> str:
        return f"unix://{self.socket_path}" if self.socket_path else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, listening: bool = False) -> Address:
        """Read an address. Raises ConfigRefused, reason "target_invalid", for one that cannot be used."""
        if not text.isprintable():
            # Bytes of the environment that are no text are among these, which no path or log could hold.
            raise _refused(text, "it holds what cannot be printed")
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


def positive(env: Mapping[str, str], name: str, unset: float, *, or_zero: bool = False) -> float:
    """A number above 0 from the environment. Raises ConfigRefused, reason "config_value", for any other text."""
    text = env.get(name, "")
    try:
        value = float(text) if text else unset
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9 or (value == 0 and not or_zero):
        raise ConfigRefused(
            name,
            found=f"it is {text!r}",
            instead=f"Give a number {'of 0 or more' if or_zero else 'above 0'}, or leave it out for {unset:g}.",
            reason=RefusalReason.CONFIG_VALUE,
        )
    return value


def check_guarded(option: str, listen: Sequence[str], guarded: bool, token_option: str) -> None:
    """Refuse to be open to other hosts by accident.

    Args: guarded: whether TLS or a token is asked for.   token_option: the option that names the token's file; empty
          where there is none.
    Raises: ConfigRefused "plain_address" for an address that other hosts reach and nothing guards; "target_invalid".
    """
    for text in listen:
        address = Address.parse(text, listening=True)
        if not guarded and not address.socket_path and not is_only_here(address.host):
            raise ConfigRefused(
                f"{option} {text}",
                found="other hosts reach it, and neither TLS nor a token says who may",
                instead=(f"Give it {token_option} FILE or a certificate, or listen" if token_option else "Listen")
                + " on 127.0.0.1 or a Unix socket; or say --insecure where the network itself lets in nobody else.",
                reason=RefusalReason.PLAIN_ADDRESS,
            )


def is_only_here(host: str) -> bool:
    """Whether what listens on this host, a name or an address, is reached from this machine alone.

    A name that does not resolve is refused when it is bound.
    """
    try:
        found = {str(row[4][0]) for row in socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)}
    except OSError:
        return host == "localhost"
    return all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found)


def cannot_listen(asked: str, error: OSError, *, instead: str) -> ConfigRefused:
    """Why an address was not bound, "port_in_use" or "address_unusable", in the system's words."""
    return ConfigRefused(
        asked,
        # asyncio words its own; a name that does not resolve has a negative number.
        found=os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error),
        instead=instead,
        reason=RefusalReason.PORT_IN_USE if error.errno == errno.EADDRINUSE else RefusalReason.ADDRESS_UNUSABLE,
    )


def _refused(text: str, found: str) -> ConfigRefused:
    return ConfigRefused(
        f"address {text!r}",
        found=found,
        instead="Give unix:///absolute/path.sock, or host:port such as 127.0.0.1:4319 or [::1]:4319.",
        reason=RefusalReason.TARGET_INVALID,
    )
