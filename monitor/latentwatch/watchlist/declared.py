"""What a reader knows of the names in a file: those that it uses, and those that it passes over with the reason why.

A key or tensor that no reader declares may change the numbers or the place. It is refused by name, never skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Known:
    """The names of one configuration, or of one section of it, that a reader knows."""

    used: frozenset[str] = frozenset()
    """Read by the reader, which refuses the values that it does not implement."""
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Names that would change the numbers at other values than these, which are the ones that the reader implements."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Names that activations do not depend on, each with the reason."""

    def __or__(self, other: Known) -> Known:
        return Known(self.used | other.used, {**self.only, **other.only}, {**self.unread, **other.unread})

    def unknown(self, fields: Mapping[str, object]) -> Iterator[str]:
        """The names in `fields` that are not known here."""
        return (name for name in fields if name not in self.used | self.only.keys() | self.unread.keys())

    def unimplemented(self, fields: Mapping[str, object]) -> Iterator[tuple[str, tuple[object, ...]]]:
        """The names in `fields` whose value is not implemented, with those that are."""
        for name, values in self.only.items():
            if name in fields and not any(_same(fields[name], value) for value in values):
                yield name, values


def passed_over(why: str, *names: str) -> Known:
    """Names that activations do not depend on, all for one reason."""
    return Known(unread=dict.fromkeys(names, why))


class Unread(NamedTuple):
    """A tensor that activations do not depend on."""

    why: str
    shape: tuple[int, ...] | None = None
    """That it must have if it is there; None for any."""


def _same(value: object, other: object) -> bool:
    """Equal and of one type: 1, 1.0 and True are three values."""
    return type(value) is type(other) and value == other
