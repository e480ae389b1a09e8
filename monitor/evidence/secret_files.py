"""Files that hold a secret: read only where nobody else may read them."""

from __future__ import annotations

from pathlib import Path

from monitor.errors import ConfigRefused


def read(path: Path, what: str, reason: str) -> bytes:
    """The file's content without surrounding space. Raises: ConfigRefused: missing, or open to others."""
    try:
        content, mode = path.read_bytes().strip(), path.stat().st_mode
    except OSError as error:
        raise refuse(
            path, what, error.strerror or str(error), "Give a file that this user can read.", reason
        ) from error
    if mode & 0o077:
        raise refuse(path, what, f"others may read it (mode {mode & 0o777:o})", f"Run: chmod 600 {path}", reason)
    return content


def refuse(path: Path, what: str, found: str, instead: str, reason: str) -> ConfigRefused:
    """The refusal of such a file."""
    return ConfigRefused(f"{what} {path}", found=found, instead=instead, reason=reason)
