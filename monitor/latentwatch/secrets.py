"""Files that hold a secret: the one way to read and to write them.

A file of this user is for this user alone. One of another user, such as root's in a Kubernetes Secret, can only be read
through a group or by everyone; the group is taken, everyone is not. (The rule by which PostgreSQL reads its TLS keys.)
A container that runs as root sees the same Secret as a file of its own; there it is the pod's group, any but root's,
that tells it.

Links are followed, since Kubernetes puts two before each Secret; what counts is the file that is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from latentwatch.errors import ConfigRefused, RefusalReason

MIN_TOKEN_CHARACTERS: Final = 16
MIN_KEY_BYTES: Final = 16
MAX_BYTES: Final = 1 << 16
"""Some thousand keys; what is larger is another file."""


def read(path: Path, what: str, reason: str) -> bytes:
    """The file's content without surrounding space. Raises ConfigRefused: missing, too large, or open to others."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        found = error.strerror or str(error)
        # Somebody may have given the secret itself, which is not to stand in a log too.
        hidden = (
            isinstance(error, FileNotFoundError) and len(path.parts) == 1 and len(path.name) >= MIN_TOKEN_CHARACTERS
        )
        instead = "Give a file that this user can read; every user of this host sees what stands on a command line."
        raise refuse(
            Path("(a name that may be the secret)") if hidden else path, what, found, instead, reason
        ) from error
    right = right_mode(status.st_uid, status.st_gid, os.geteuid())
    if status.st_mode & 0o777 & ~(right | 0o700):
        found = f"others may read it (mode {status.st_mode & 0o777:o})"
        raise refuse(path, what, found, f"Run: chmod {right:o} {path}", reason)
    if len(content) > MAX_BYTES:
        raise refuse(path, what, f"it has more than {MAX_BYTES} bytes", "Give the file with the secret alone.", reason)
    return content.strip()


def right_mode(owner: int, group: int, user: int) -> int:
    """What the mode may be at most, but for bits of the owner, of a file with this owner and group, for this user."""
    return 0o440 if owner != user or (user == 0 and group != 0) else 0o600


def read_token(path: Path, what: str = "token file", reason: RefusalReason = RefusalReason.TOKEN_UNUSABLE) -> str:
    """The bearer token in a file: one word. Raises ConfigRefused."""
    token = read(path, what, reason)
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or len(token.split()) != 1:
        instead = f"Write one word of at least {MIN_TOKEN_CHARACTERS} ASCII characters there, e.g. of openssl rand."
        raise refuse(path, what, f"its {len(token)} bytes are no token", instead, reason)
    return token.decode("ascii")


def read_key(path: Path, what: str, reason: str, instead: str) -> bytes:
    """The key of hashes in a file; `instead` says how to make one. Raises ConfigRefused."""
    key = read(path, what, reason)
    if len(key) < MIN_KEY_BYTES:
        raise refuse(path, what, f"its {len(key)} bytes are no key", instead, reason)
    return key


def write(path: Path, content: bytes) -> None:
    """A new file for this user alone. Raises OSError; FileExistsError where there is one."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)


def check_together(what: str, files: Mapping[str, Path | None]) -> None:
    """A certificate is of use only with its key, and what else it needs: files by the names that they are given under.

    Raises: ConfigRefused, "tls_unusable", where one is missing.
    """
    if not all(files.values()):
        raise ConfigRefused(
            what,
            found=", ".join(f"{name} is {path}" for name, path in files.items()),
            instead="Give both." if len(files) == 2 else "Give all of them.",
            reason=RefusalReason.TLS_UNUSABLE,
        )


def refuse(path: Path, what: str, found: str, instead: str, reason: str) -> ConfigRefused:
    """The refusal of such a file."""
    return ConfigRefused(f"{what} {path}", found=found, instead=instead, reason=reason)
