"""What a process of ours asks of its host and can do without.

A sandbox, a container without a user's line in /etc/passwd, a parent that closed everything: none of them decides
whether a process lives. What is needed is refused by name where it is used; what is asked here is not needed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import pwd
import resource
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_OPEN_FILES: Final = 65_536
"""Descriptors asked for, where the host lets a process have so many; a service manager's 1,024 are few connections."""
_STANDARD: Final = 3
"""Descriptors below are those of the standard streams."""
_SOCKET_PATH_BYTES: Final = 64
"""A folder for a Unix socket may have: the system takes 107 with the socket's own name."""


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Around a system call that only makes things better: refused or not there, it is a line in the log."""
    try:
        yield
    except Exception as error:
        # Python has many names for a call that was refused: os.sched_getaffinity makes an OverflowError of EINVAL.
        log.info("latentwatch goes on without %s: %s", what, error)


def prepare_process() -> None:
    """For the first line of a process of ours: the standard streams are open, files are its own, many may be open.

    Never raises. Without the first, a socket or a journal gets the number of a stream, and what some library writes to
    standard error stands in it.
    """
    with optional("open standard streams"):
        _open_standard_streams()
    # Whoever started it may have asked that files be for nobody, or for all the world to write.
    os.umask(os.umask(0o077) & ~0o700 | 0o002)
    with optional("a higher limit of open files"):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _open_standard_streams() -> None:
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < _STANDARD:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def user_name() -> str:
    """Who runs this process, by the system's list of users; `uid:10001` where it stands in none."""
    user = os.geteuid()
    try:
        return pwd.getpwuid(user).pw_name
    except (KeyError, OSError):
        return f"uid:{user}"


def host_name() -> str:
    """This host's name; empty where the system does not tell it."""
    with optional("the host's name"):
        return socket.gethostname()
    return ""


def is_loopback(host: str) -> bool:
    """Whether a host of a URL, in its brackets or without, is this one: then no proxy has any business with it."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or address.is_unspecified


def disk_bytes(folder: Path) -> tuple[int, int] | None:
    """Free for this user, and in all, of the disk under a folder; None where the system does not tell."""
    with contextlib.suppress(OSError):  # asked at every scrape: no line each time
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    return None


def socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder for Unix sockets that only this user can enter; gone when it is cleaned up.

    Raises OSError: no folder of the host can be written, or none whose path is short enough for a socket.
    """
    error = OSError("there is no folder for temporary files")
    for place in (None, "/dev/shm", "/run", "/var/run"):  # noqa: S108, a new folder in them, for this user alone
        try:
            made = tempfile.TemporaryDirectory(prefix="latentwatch-", dir=place, ignore_cleanup_errors=True)
        except OSError as refused:
            error = refused
            continue
        if len(os.fsencode(made.name)) <= _SOCKET_PATH_BYTES:
            return made
        made.cleanup()
        error = OSError(f"the path of {made.name} is too long for a socket")
    raise error
