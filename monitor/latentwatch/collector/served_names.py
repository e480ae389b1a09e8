"""Which model names and engines have counts here, and which of them go when they are idle or others need the place.

The rule. A name holds its place while an open request has it, or an open stream that counted something; one that was
just said holds it for a minute. Any other goes to a newcomer, the one that was heard of longest ago first, and by
itself after `Bounds.name_idle_seconds`. So whoever only says names cannot keep those out that serve requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Final, Generic, TypeAlias, TypeVar

Engine: TypeAlias = tuple[str, str]
"""Model name and engine."""
T = TypeVar("T", str, Engine)

NEW_SECONDS: Final = 60.0
"""For so long a name that counted nothing is not taken for idle: an engine may wait for its first request."""


@dataclass(frozen=True)
class Names:
    """Model names, and engines with theirs."""

    models: Set[str] = frozenset()
    engines: Set[Engine] = frozenset()

    def __or__(self, other: Names) -> Names:
        return Names(self.models | other.models, self.engines | other.engines)

    def __bool__(self) -> bool:
        return bool(self.models or self.engines)


InUse: TypeAlias = Callable[[], Names]
"""The names that hold their place now. Asked only where there is no room."""


@dataclass(frozen=True)
class NameState:
    """When a model name or an engine was first and last heard of."""

    model_name: str
    engine: str | None
    """None for the model name itself."""
    first_seconds: float
    last_seconds: float


class ServedNames:
    """Names with the time at which each was first and last heard of, bounded."""

    def __init__(self, models: int, engines: int) -> None:
        self._models = _Table[str](models)
        self._engines = _Table[Engine](engines)

    @property
    def known(self) -> Names:
        """Every name that has a place."""
        return Names(self._models.seen.keys(), self._engines.seen.keys())

    def first_seconds(self, engine: Engine) -> float:
        """When an engine that has a place was first heard of."""
        return self._engines.seen[engine][0]

    def room(self, wanted: Names, in_use: InUse) -> Names | None:
        """Who has to go so that all of these have a place; None where too few can go."""
        if not self._models.excess(wanted.models) and not self._engines.excess(wanted.engines):
            return Names()
        used = in_use() | wanted
        models = self._models.victims(wanted.models, used.models)
        if models is None:
            return None
        with_them = {engine for engine in self._engines.seen if engine[0] in models}
        others = self._engines.victims(wanted.engines, used.engines, with_them)
        return None if others is None else Names(frozenset(models), with_them | set(others))

    def see(self, names: Names, now: float) -> None:
        """They were heard of. There must be room."""
        self._models.see(names.models, now)
        self._engines.see(names.engines, now)

    def idle(self, before: float) -> Names:
        """Those that were last heard of earlier; of a model that goes every engine goes."""
        models = self._models.idle(before)
        return Names(
            models, self._engines.idle(before) | {engine for engine in self._engines.seen if engine[0] in models}
        )

    def let_go(self, names: Names) -> None:
        """Have their places be free."""
        for model in names.models:
            self._models.seen.pop(model, None)
        for engine in names.engines:
            self._engines.seen.pop(engine, None)

    def shift(self, seconds: float) -> None:
        """The clock jumped by so much."""
        self._models.shift(seconds)
        self._engines.shift(seconds)

    def state(self) -> list[NameState]:
        """Every name."""
        return [
            *(NameState(model, None, *seen) for model, seen in sorted(self._models.seen.items())),
            *(NameState(*engine, *seen) for engine, seen in sorted(self._engines.seen.items())),
        ]

    def restore(self, state: Sequence[NameState]) -> None:
        """Go on from `state`."""
        for name in state:
            seen = (name.first_seconds, name.last_seconds)
            if name.engine is None:
                self._models.seen[name.model_name] = seen
            else:
                self._engines.seen[name.model_name, name.engine] = seen


@dataclass
class _Table(Generic[T]):
    bound: int
    seen: dict[T, tuple[float, float]] = field(default_factory=dict)
    """First and last time."""

    def excess(self, wanted: Set[T], going: Set[T] = frozenset()) -> int:
        if wanted <= self.seen.keys():
            return 0
        return max(0, len((self.seen.keys() - going) | wanted) - self.bound)

    def victims(self, wanted: Set[T], used: Set[T], going: Set[T] = frozenset()) -> list[T] | None:
        excess = self.excess(wanted, going)
        idle = sorted(self.seen.keys() - used - going, key=lambda name: (self.seen[name][1], name))
        return None if len(idle) < excess else idle[:excess]

    def see(self, names: Iterable[T], now: float) -> None:
        for name in names:
            first, _ = self.seen.get(name, (now, now))
            self.seen[name] = (first, now)

    def idle(self, before: float) -> set[T]:
        return {name for name, (_, last) in self.seen.items() if last < before}

    def shift(self, seconds: float) -> None:
        self.seen = {name: (first + seconds, last + seconds) for name, (first, last) in self.seen.items()}
