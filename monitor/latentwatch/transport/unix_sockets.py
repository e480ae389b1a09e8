"""Unix sockets on which gRPC listens: who may be there before, who may connect, and what is left behind."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.transport.address import Address, cannot_listen

_PROBE_SECONDS: Final = 0.2


class UnixSockets:
    """The sockets of one server."""

    def __init__(self) -> None:
        self._bound: list[tuple[Path, int]] = []

    def bind(self, target: Address, add_port: Callable[[str], int]) -> None:
        """Have gRPC listen there. Raises ConfigRefused, "socket_in_use" or "address_unusable"."""
        path = Path(target.socket_path)
        if not path.parent.is_dir():
            _make_folder(target, path.parent)
        _make_room(target, path)
        # Nobody but this user may connect, from the first moment at which the file exists.
        umask = os.umask(0o177)
        try:
            bound = add_port(str(target))
        except RuntimeError:
            bound = 0
        finally:
            os.umask(umask)
        if not bound:
            raise _why_not(target)
        self._bound.append((path, path.stat().st_ino))

    def remove(self) -> None:
        """Remove the files that are still ours."""
        for path, inode in self._bound:
            # gRPC may have removed it already, and another collector may have put its own in that place.
            if path.exists() and path.stat().st_ino == inode:
                path.unlink()
        self._bound.clear()


def _make_room(target: Address, path: Path) -> None:
    """Remove the socket that a killed collector left, and nothing else. Raises ConfigRefused, "socket_in_use"."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        found = "a file that is no socket is there"
    else:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PROBE_SECONDS)
            try:
                probe.connect(target.socket_path)
                found = "another process listens there"
            except ConnectionRefusedError:
                path.unlink()
                return
            except OSError as error:
                found = f"it cannot be told whether another process listens there: {error.strerror or error}"
    raise ConfigRefused(
        f"listening on {target}",
        found=found,
        instead="Stop the other collector, or give this one another path.",
        reason=RefusalReason.SOCKET_IN_USE,
    )


def _make_folder(target: Address, folder: Path) -> None:
    """The socket's, for this user, where only that is missing. Raises ConfigRefused, "address_unusable"."""
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigRefused(
            f"listening on {target}",
            found=f"there is no folder {folder}, and this user cannot make it: {error.strerror or error}",
            instead=f"Make it for this user (sudo install -d -o $USER {folder}), or listen in a folder of this user, "
            "such as --listen unix://$XDG_RUNTIME_DIR/latentwatch.sock.",
            reason=RefusalReason.ADDRESS_UNUSABLE,
        ) from error


def _why_not(target: Address) -> ConfigRefused:
    """Why gRPC could not bind a socket's path, by asking the system: gRPC itself does not say."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(target.socket_path)
        Path(target.socket_path).unlink()
    except OSError as error:
        return cannot_bind(target, error)
    return cannot_bind(target, OSError("gRPC cannot bind it"))


def cannot_bind(target: Address, error: OSError) -> ConfigRefused:
    """The system does not let this process listen there."""
    return cannot_listen(f"listening on {target}", error, instead="Stop what uses it, or listen on another address.")
