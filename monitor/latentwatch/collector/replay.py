"""Recorded streams through a collector's logic, in recorded time and as fast as it goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from latentwatch.collector.core import Core
from latentwatch.drift.alarms import Alarm
from latentwatch.transport.recording import Recorded


@dataclass
class Replayed:
    """What a replay showed."""

    batches: int = 0
    first_seconds: float = 0.0
    last_seconds: float = 0.0
    alarms: list[tuple[float, str, Alarm]] = field(default_factory=list)
    """The end of the window, model and alarm, when each first came up."""


def replay(core: Core, recorded: Iterable[Recorded]) -> Replayed:
    """Give a collector everything, with the times at which it was recorded.

    Raises: StreamRefused: the recording is damaged, or is of another watchlist than the collector's.
    """
    done, greeted, windows = Replayed(), set(), 0
    known: set[tuple[str, str, str]] = set()

    def look(now: float) -> None:
        nonlocal windows
        core.ingest.tick(now)
        views = core.drift.views()
        if (count := sum(view.windows for view in views)) == windows:
            return
        windows = count
        for view in views:
            for alarm in view.alarms:
                key = view.model_name, alarm.feature, alarm.kind
                if key not in known:
                    known.add(key)
                    done.alarms.append((now, view.model_name, alarm))

    for item in recorded:
        if not done.batches:
            done.first_seconds = done.last_seconds = item.seconds
        if item.seconds - done.last_seconds >= 1.0 or item.hello not in greeted:
            look(item.seconds)
            done.last_seconds = item.seconds
        if item.hello not in greeted:
            greeted.add(item.hello)
            core.ingest.hello(item.hello, item.seconds)
        core.ingest.observe(item.hello, item.received, item.seconds)
        done.batches += 1
    # The last window ends behind the recording.
    look(done.last_seconds + 3600.0)
    return done
