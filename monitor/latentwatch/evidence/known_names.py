"""What somebody asks evidence for has to be a name that it has: a typing error would look like a quiet night."""

from __future__ import annotations

import difflib

from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.evidence.archive import Archive, Wanted


def check_wanted(archive: Archive, wanted: Wanted) -> None:
    """Raises ConfigRefused "name_unknown" for a feature or model that nothing in the folder was seen with.

    A folder without any segment knows no names, and refuses none.
    """
    for what, name, known in (
        ("feature", wanted.feature, archive.feature_ids),
        ("model", wanted.model_name, archive.model_names),
    ):
        if name is not None and (names := known()) and name not in names:
            raise unknown_name(f"{what} {name!r}", f"the evidence in {archive.folder}", name, names)


def unknown_name(what: str, where: str, name: str, names: set[str]) -> ConfigRefused:
    """Of something that is not among these names."""
    close = difflib.get_close_matches(name, sorted(names), 1)
    shown = ", ".join(sorted(names)[:8]) + (" and more" if len(names) > 8 else "")
    return ConfigRefused(
        what,
        found=f"{where} has none of this name",
        instead=f"Did you mean {close[0]}?" if close else f"Give one of {shown}.",
        reason=RefusalReason.NAME_UNKNOWN,
    )
