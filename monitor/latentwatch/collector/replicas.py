"""Replicas and their boots: who may stream, and which sequence numbers are already held."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Final

from latentwatch.collector.clock_ahead import ClockAhead
from latentwatch.collector.config import Bounds
from latentwatch.collector.requests import HandleMap, HandleMapState
from latentwatch.collector.served_names import NEW_SECONDS, InUse, Names, NameState, ServedNames
from latentwatch.errors import RefusalReason, StreamRefused
from latentwatch.facts import IDENTITY_TEXT_CHARACTERS
from latentwatch.step.batch import EngineCounters
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import Report

_LABEL_BYTES: Final = {"replica": 253, "boot_id": 64, "engine": 64, "model_name": 253}
"""253 is the longest DNS name, which a pod's name is."""
_NO_NAMES: Final = Names()
_STREAMS: Final = 3
"""The standing of a replica that makes room for none: it streams."""


@dataclass
class Boot:
    """One life of an engine process."""

    hello: Hello
    handles: HandleMap = field(default_factory=HandleMap)
    high_sequence: int = 0
    streams: int = 0
    last_seen_seconds: float = 0.0
    counters: EngineCounters = field(default_factory=EngineCounters)
    forwarded_by: str = ""
    """The collector that forwards for it; empty for one that streams here itself."""
    remote_open_requests: int = 0
    """Open requests, as `forwarded_by` counts them."""
    shed_requests: int = 0
    """Of a collector that forwards: rows that it gave up since its boot."""
    shed_exceedances: int = 0
    clock: ClockAhead = field(default_factory=ClockAhead, compare=False)
    """Not stored: the next messages say it again."""


@dataclass(frozen=True)
class BootState:
    """A Boot, field by field."""

    hello: Hello
    handles: HandleMapState
    high_sequence: int
    streams: int
    last_seen_seconds: float
    counters: EngineCounters
    forwarded_by: str
    remote_open_requests: int
    shed_requests: int
    shed_exceedances: int


_SAME: Final = tuple(field.name for field in fields(BootState) if field.name != "handles")


@dataclass(frozen=True)
class ReplicasState:
    """Everything that a Replicas remembers."""

    names: list[NameState]
    """Model names and engines that were counted."""
    marks: list[tuple[str, str, int]]
    """Replica, boot id and highest sequence of boots that were let go."""
    boots: list[BootState]


@dataclass
class Replica:
    """A name and its boots, newest last; the newest is the one that health is shown of."""

    boots: OrderedDict[str, Boot] = field(default_factory=OrderedDict)

    @property
    def newest(self) -> Boot:
        """The boot that said hello last."""
        return next(reversed(self.boots.values()))


@dataclass(frozen=True)
class Room:
    """What has to go so that something else has a place."""

    replicas: tuple[str, ...]
    names: Names


@dataclass(frozen=True)
class Admitted:
    """A stream that was taken in."""

    boot: Boot
    over: list[Boot]
    """Boots that it shows to be over, or that made room for it."""
    gone: Names
    """Names that made room for it."""


class Replicas:
    """Every replica known, bounded."""

    def __init__(self, watchlist_sha256: str, bounds: Bounds) -> None:
        self._sha256 = watchlist_sha256
        self._bounds = bounds
        self.known: dict[str, Replica] = {}
        self.names = ServedNames(bounds.models, bounds.replicas)
        # Highest sequence of boots that were let go, the last one let go at the end.
        self._marks: OrderedDict[tuple[str, str], int] = OrderedDict()

    def admit(self, hello: Hello, now: float, in_use: InUse) -> Admitted:
        """Take a stream in, and let go of what has to make room for it.

        Raises: StreamRefused: "replica_name", "watchlist_mismatch", "too_many_replicas", "too_many_models" or
                "boot_changed".
        """
        room = self._check((hello,), now, in_use)
        over = self._clear(room)
        boot, others = self._boot(hello)
        self.names.see(_names_of((hello,)), now)
        boot.forwarded_by = ""
        boot.streams += 1
        boot.last_seen_seconds = now
        return Admitted(boot, over + others, room.names)

    def check_report(self, forwarder: Hello, report: Report, now: float, in_use: InUse) -> Room:
        """Refuse a report of engines that could not stream here themselves; what has to make room for it.

        Raises StreamRefused, as `admit` does.
        """
        for state in report.replicas:
            known = self.known.get(state.hello.replica)
            direct = known.boots.get(state.hello.boot_id) if known else None
            if state.hello.forwards or (direct and direct.streams and not direct.forwarded_by):
                raise StreamRefused(
                    f"replica {state.hello.replica} in a report of collector {forwarder.replica}",
                    found="it streams here itself, and would be counted twice",
                    instead="Let an engine stream to one collector only.",
                    reason=RefusalReason.REPLICA_TWICE,
                )
        hellos = tuple(state.hello for state in report.replicas)
        return self._check(hellos, now, in_use, _counted(report), forwarder.replica)

    def merge_report(self, forwarder: Hello, report: Report, room: Room, now: float) -> list[Boot]:
        """Take what a checked report says of engines; the boots that it shows to be over.

        When it last saw each one is by its clock, which may be any: here it is so long ago as it was there.
        """
        over = self._clear(room)
        for state in report.replicas:
            boot, others = self._boot(state.hello)
            for other in others:
                other.remote_open_requests = 0
            over += others
            boot.forwarded_by = forwarder.replica
            boot.streams = int(state.connected)
            boot.last_seen_seconds = now - max(0.0, report.time_unix_nano / 1e9 - state.last_seen_seconds)
            boot.remote_open_requests = state.open_requests
            boot.counters = state.counters
        self.names.see(_names_of([state.hello for state in report.replicas]) | _counted(report), now)
        return over

    def _boot(self, hello: Hello) -> tuple[Boot, list[Boot]]:
        """The boot of an accepted hello, and those that are over where it is new."""
        replica = self.known.setdefault(hello.replica, Replica())
        fresh = hello.boot_id not in replica.boots
        if fresh:
            held = self._marks.pop((hello.replica, hello.boot_id), 0)
            replica.boots[hello.boot_id] = Boot(hello, high_sequence=held)
        boot = replica.boots[hello.boot_id]
        boot.hello = hello
        over = [other for other in replica.boots.values() if other is not boot] if fresh else []
        while len(replica.boots) > self._bounds.boots_per_replica:
            self._forget(replica.boots.popitem(last=False)[1])
        return boot, over

    def _check(
        self, hellos: Sequence[Hello], now: float, in_use: InUse, counted: Names = _NO_NAMES, speaker: str = ""
    ) -> Room:
        for hello in hellos:
            _check_labels(hello)
            self._check_watchlist(hello)
            replica = self.known.get(hello.replica)
            if replica and (boot := replica.boots.get(hello.boot_id)):
                _check_same_engine(boot.hello, hello)
        for model_name, engine in (*counted.engines, *((name, "0") for name in counted.models)):
            _check_label("report", "model_name", model_name)
            _check_label("report", "engine", engine)
        # Whoever speaks makes no room for what it tells of.
        replicas = {hello.replica for hello in hellos} | ({speaker} & self.known.keys())
        return self._room(replicas, _names_of(hellos) | counted, now, in_use)

    def boot(self, hello: Hello) -> Boot:
        """The boot of an accepted stream. Raises StreamRefused "unknown_boot" when it was forgotten meanwhile."""
        replica = self.known.get(hello.replica)
        boot = replica.boots.get(hello.boot_id) if replica else None
        if boot is None:
            raise StreamRefused(
                f"boot {hello.boot_id!r} of replica {hello.replica!r}",
                found="this collector no longer knows it",
                instead="Open the stream again with a Hello.",
                reason=RefusalReason.UNKNOWN_BOOT,
            )
        return boot

    def disconnect(self, hello: Hello, now: float) -> None:
        """A stream ended; what it said stays."""
        replica = self.known.get(hello.replica)
        if replica and (boot := replica.boots.get(hello.boot_id)):
            boot.streams = max(0, boot.streams - 1)
            boot.last_seen_seconds = now
        if hello.forwards:
            # Nobody here knows how they are now.
            for other in self.boots():
                if other.forwarded_by == hello.replica:
                    other.streams = 0

    def gone(self, now: float) -> list[Boot]:
        """Boots without a stream for so long that their open requests are over. Forgets replicas gone for longer.

        Names of engines that stream are heard of now.
        """
        self.names.see(_names_of([boot.hello for boot in self.boots() if boot.streams]), now)
        silent = [
            (name, boot)
            for name, replica in self.known.items()
            for boot in replica.boots.values()
            if not boot.streams and now - boot.last_seen_seconds > self._bounds.stream_gone_seconds
        ]
        for name in {name for name, _ in silent}:
            boots = self.known[name].boots.values()
            newest = max(boot.last_seen_seconds for boot in boots)
            if not any(boot.streams for boot in boots) and now - newest > self._bounds.replica_forgotten_seconds:
                self._forget_replica(name)
        return [boot for _, boot in silent]

    def shift(self, seconds: float) -> None:
        """The clock jumped by so much: who was seen before was seen as long ago as it was."""
        self.names.shift(seconds)
        for boot in self.boots():
            boot.last_seen_seconds += seconds

    def disconnect_all(self) -> None:
        """No stream outlives the process that served it."""
        for boot in self.boots():
            boot.streams = 0

    def state(self) -> ReplicasState:
        """Every boot and mark."""
        return ReplicasState(
            names=self.names.state(),
            marks=[(*key, sequence) for key, sequence in self._marks.items()],
            boots=[
                BootState(**{name: getattr(boot, name) for name in _SAME}, handles=boot.handles.state())
                for boot in self.boots()
            ],
        )

    def restore(self, state: ReplicasState) -> dict[int, HandleMap]:
        """Go on from `state`. Returns the handles of each boot by the slots in them."""
        by_slot: dict[int, HandleMap] = {}
        self.names.restore(state.names)
        self._marks.update(((replica, boot_id), sequence) for replica, boot_id, sequence in state.marks)
        for boot_state in state.boots:
            boot = Boot(**{name: getattr(boot_state, name) for name in _SAME})
            boot.handles.restore(boot_state.handles)
            by_slot.update(dict.fromkeys(boot.handles.slots.tolist(), boot.handles))
            self.known.setdefault(boot.hello.replica, Replica()).boots[boot.hello.boot_id] = boot
        return by_slot

    def boots(self) -> Iterator[Boot]:
        """Every boot that is known."""
        for replica in self.known.values():
            yield from replica.boots.values()

    def _forget_replica(self, name: str) -> list[Boot]:
        boots = list(self.known.pop(name).boots.values())
        for boot in boots:
            self._forget(boot)
        return boots

    def _forget(self, boot: Boot) -> None:
        """Let a boot go, but not what it has delivered."""
        self._marks[boot.hello.replica, boot.hello.boot_id] = boot.high_sequence
        while len(self._marks) > self._bounds.sequence_marks:
            self._marks.popitem(last=False)

    def _check_watchlist(self, hello: Hello) -> None:
        if hello.armed and hello.watchlist_sha256 != self._sha256:
            raise StreamRefused(
                f"replica {hello.replica}",
                found=f"it scores with watchlist {hello.watchlist_sha256[:12] or '(none)'}, "
                f"this collector explains {self._sha256[:12]}",
                instead="Start both with the same watchlist file.",
                reason=RefusalReason.WATCHLIST_MISMATCH,
            )

    def _room(self, replicas: Set[str], names: Names, now: float, in_use: InUse) -> Room:
        """Who has to go so that these have a place. Raises StreamRefused, "too_many_replicas" or "too_many_models"."""
        gone = self.names.room(names, in_use)
        excess = len(replicas - self.known.keys()) and len(replicas | self.known.keys()) - self._bounds.replicas
        standing = {name: self._standing(name, now) for name in self.known.keys() - replicas} if excess > 0 else {}
        idle = sorted((name for name in standing if standing[name][0] < _STREAMS), key=lambda name: standing[name])
        name = min(replicas, default="report")
        if len(idle) < excess:
            found = f"this collector already knows {len(self.known)} replicas, and its bound is {self._bounds.replicas}"
            raise _full(name, found, RefusalReason.TOO_MANY_REPLICAS)
        if gone is None:
            known = self.names.known
            found = f"this collector already counts {len(known.models)} models and {len(known.engines)} engines"
            raise _full(name, found, RefusalReason.TOO_MANY_MODELS)
        return Room(tuple(idle[: max(0, excess)]), gone)

    def _standing(self, name: str, now: float) -> tuple[int, float]:
        """Who goes first: without stream and requests, without stream, without a batch so far; each by time."""
        boots = self.known[name].boots.values()
        seen = max(boot.last_seen_seconds for boot in boots)
        if any(boot.streams for boot in boots):
            holds = now - seen < NEW_SECONDS or any(boot.high_sequence for boot in boots)
            return (_STREAMS if holds else _STREAMS - 1), seen
        return int(any(len(boot.handles) or boot.remote_open_requests for boot in boots)), seen

    def _clear(self, room: Room) -> list[Boot]:
        """Forget the replicas that make room and the boots of names that do; these boots: their requests are over."""
        over = [boot for name in room.replicas for boot in self._forget_replica(name)]
        self.names.let_go(room.names)
        for name, replica in list(self.known.items()) if room.names else ():
            for boot_id, boot in list(replica.boots.items()):
                if not boot.hello.forwards and (boot.hello.model_name, boot.hello.engine) in room.names.engines:
                    self._forget(replica.boots.pop(boot_id))
                    over.append(boot)
            if not replica.boots:
                del self.known[name]
        return over


def _full(name: str, found: str, reason: RefusalReason) -> StreamRefused:
    instead = "Start another collector for it, one per pod."
    return StreamRefused(f"replica {name}", found=found, instead=instead, reason=reason)


def _names_of(hellos: Iterable[Hello]) -> Names:
    """Model names and engines of those that are engines."""
    engines = {(hello.model_name, hello.engine) for hello in hellos if not hello.forwards}
    return Names({model for model, _ in engines}, engines)


def _counted(report: Report) -> Names:
    """Every model name and engine that a report has counts or requests of."""
    engines = {(delta.model_name, delta.engine) for delta in report.engines}
    engines |= {(row.info.model_name, row.info.engine) for row in report.requests}
    models = {delta.model_name for delta in report.models}
    return Names(models | {model for model, _ in engines}, engines)


def _check_same_engine(first: Hello, again: Hello) -> None:
    if (first.model_name, first.engine) != (again.model_name, again.engine):
        raise StreamRefused(
            f"replica {again.replica}",
            found=f"its boot served model {first.model_name!r} as engine {first.engine!r}, "
            f"and now says {again.model_name!r} and {again.engine!r}",
            instead="Give each engine process a replica name of its own.",
            reason=RefusalReason.BOOT_CHANGED,
        )


def _check_labels(hello: Hello) -> None:
    for name in _LABEL_BYTES:
        # A collector that forwards has neither model nor engine of its own.
        if name in ("replica", "boot_id") or not hello.forwards:
            _check_label(f"hello of replica {hello.replica[:64]!r}", name, getattr(hello, name))
    for name in ("not_armed_reason", "not_armed_text", "plugin_version", "engine_version", "model_text"):
        if len(getattr(hello, name)) > IDENTITY_TEXT_CHARACTERS:
            raise StreamRefused(
                f"hello of replica {hello.replica}",
                found=f"{name} has {len(getattr(hello, name))} characters",
                instead=f"Use at most {IDENTITY_TEXT_CHARACTERS}.",
                reason=RefusalReason.REPLICA_NAME,
            )


def _check_label(what: str, name: str, text: str) -> None:
    encoded, most = text.encode("utf-8", "surrogatepass"), _LABEL_BYTES[name]
    if not text or len(encoded) > most or not text.isprintable():
        raise StreamRefused(
            what,
            found=f"{name} is {text[:64]!r}, {len(encoded)} bytes",
            instead=f"It becomes a label: use 1 to {most} bytes of printable text.",
            reason=RefusalReason.REPLICA_NAME,
        )
