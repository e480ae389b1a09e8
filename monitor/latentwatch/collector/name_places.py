"""Model names and engines as a collector's parts refer to them: which are in use, and what of them goes."""

from __future__ import annotations

from collections.abc import Sequence

from latentwatch.collector.served_names import NEW_SECONDS, Names
from latentwatch.collector.state import CollectorState, open_requests
from latentwatch.collector.step_listener import StepListener


class NamePlaces:
    """The places of names in one collector."""

    def __init__(self, state: CollectorState, listeners: Sequence[StepListener]) -> None:
        self._state = state
        self._listeners = tuple(listeners)

    def in_use(self, now: float) -> Names:
        """Names that an open request has, or an open stream that counted something or is new, or that are still to be
        told to a gateway."""
        state = self._state
        engines = {
            (boot.hello.model_name, boot.hello.engine)
            for boot in state.replicas.boots()
            if not boot.hello.forwards
            and (open_requests(boot) or (boot.streams and self._counts(boot.hello.model_name, boot.hello.engine, now)))
        }
        engines |= {(info.model_name, info.engine) for info in state.remote.infos()}
        owed = {name for listener in self._listeners for name in listener.owed_models()}
        return Names({model for model, _ in engines} | owed, engines | {e for e in state.engines if e[0] in owed})

    def let_go(self, names: Names) -> None:
        """Have nothing be counted under these names any more; whoever says one again begins at zero."""
        state = self._state
        state.replicas.names.let_go(names)
        for engine in names.engines:
            state.engines.pop(engine, None)
        for model in names.models:
            state.models.pop(model, None)
        for listener in self._listeners:
            listener.names_gone(names)

    def expire(self, now: float) -> None:
        """Let go of what was idle for too long."""
        names = self._state.replicas.names
        idle = names.idle(now - self._state.bounds.name_idle_seconds)
        if idle:
            used = self.in_use(now)
            self.let_go(Names(set(idle.models) - used.models, set(idle.engines) - used.engines))

    def _counts(self, model_name: str, engine: str, now: float) -> bool:
        key = model_name, engine
        counted = self._state.engines.get(key)
        if counted is None or key not in self._state.replicas.names.known.engines:
            return False
        return bool(counted.tokens.any()) or now - self._state.replicas.names.first_seconds(key) < NEW_SECONDS
