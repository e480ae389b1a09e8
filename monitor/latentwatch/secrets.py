"""Files that hold a secret: read only where nobody else may read them."""

from __future__ import annotations

import os
from pathlib import Path

from latentwatch.errors import ConfigRefused


def read(path: Path, what: str, reason: str) -> bytes:
    """The file's content without surrounding space. Raises: ConfigRefused: missing, or open to others.

    A file of this user is for this user alone. One of another user, such as root's in a Kubernetes Secret, can only be
    read through a group or by everyone; the group is taken. (The rule by which PostgreSQL reads its TLS keys.)
    """
    try:
        content, status = path.read_bytes().strip(), path.stat()
    except OSError as error:
        raise refuse(
            path, what, error.strerror or str(error), "Give a file that this user can read.", reason
        ) from error
    own = status.st_uid == os.geteuid()
    if status.st_mode & (0o077 if own else 0o037):
        found = f"others may read it (mode {status.st_mode & 0o777:o})"
        raise refuse(path, what, found, f"Run: chmod {'600' if own else '440'} {path}", reason)
    return content


def refuse(path: Path, what: str, found: str, instead: str, reason: str) -> ConfigRefused:
    """The refusal of such a file."""
    return ConfigRefused(f"{what} {path}", found=found, instead=instead, reason=reason)
